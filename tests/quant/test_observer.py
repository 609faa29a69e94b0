"""Int8 scales from a histogram, against trying every scale on the numbers themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.quant.observer import Observer
from edgeattn.quant.scheme import Clip

COUNT = 20_000
# As documented for "mse": shares of the scale that clips nothing.
SHARES = np.logspace(-1, 0, 60)
GRID_STEP = SHARES[1] / SHARES[0]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
seeds = st.integers(0, 2**32 - 1)


def student_t(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(3, COUNT)


def with_outliers(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate((rng.normal(size=COUNT), rng.normal(size=20) * 40))


DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=COUNT),
    "uniform": lambda rng: rng.uniform(-1, 1, COUNT),
    "laplace": lambda rng: rng.laplace(size=COUNT),
    "student-t": student_t,
    "lognormal": lambda rng: rng.lognormal(sigma=1.5, size=COUNT),
    "outliers": with_outliers,
    "one-outlier": lambda rng: np.append(rng.normal(size=COUNT), 300),
}
HEAVY_TAILED = ("laplace", "student-t", "lognormal", "one-outlier")
# So many that one outlier is clipped away: as rounding errs by a step / sqrt(12), from 12 * 127²
# numbers on it does not pay for itself.
MANY = 600_000


def numbers(kind: str, seed: int = 0) -> Tensor:
    return torch.from_numpy(DATA[kind](np.random.default_rng(seed)).astype(np.float32))


def observed(parts: Iterable[Tensor]) -> Observer:
    observer = Observer()
    for part in parts:
        observer.add(part)
    return observer


def scale_of(parts: Iterable[Tensor], clip: Clip, dtype: torch.dtype = torch.float32) -> float:
    return observed(parts).scale(clip, dtype)


def error(x: Tensor, scale: float) -> float:
    """Mean squared error of symmetric int8 in fp64."""
    exact = x.double().numpy()
    rounded = np.clip(np.rint(exact / scale), -127, 127) * scale
    return float(np.square(rounded - exact).mean())


def best_scale(x: Tensor) -> float:
    scales = SHARES * (float(x.abs().max()) / 127)
    return float(min(scales, key=lambda scale: error(x, scale)))


@pytest.mark.parametrize("kind", DATA)
def test_max_is_the_largest_magnitude_over_127(kind: str) -> None:
    x = numbers(kind)
    assert scale_of([x], "max") == pytest.approx(np.abs(x.numpy()).max() / 127, rel=1e-7)
    assert scale_of([-x], "max") == scale_of([x], "max")


@pytest.mark.parametrize("kind", DATA)
def test_mse_is_the_best_of_all_scales_tried_but_for_one_step(kind: str) -> None:
    x = numbers(kind)
    found, best = scale_of([x], "mse"), best_scale(x)
    assert best / (1.001 * GRID_STEP) < found < best * (1.001 * GRID_STEP)
    assert error(x, found) < 1.01 * error(x, best)


def many_and_one() -> Tensor:
    return torch.cat((numbers("uniform").repeat(MANY // COUNT), torch.tensor([8.0])))


def test_one_outlier_among_very_many_is_clipped() -> None:
    x = many_and_one()
    found, best = scale_of([x], "mse"), best_scale(x)
    assert best / (1.001 * GRID_STEP) < found < best * (1.001 * GRID_STEP)
    assert found < 0.7 * scale_of([x], "max")
    assert error(x, found) < 0.8 * error(x, scale_of([x], "max"))


@pytest.mark.parametrize("kind", ["normal", "student-t"])
def test_scales_that_the_comparison_must_tell_apart(kind: str) -> None:
    x = numbers(kind)
    best = best_scale(x)
    for wrong in (best * 127 / 255, best * GRID_STEP**4, best / GRID_STEP**4):
        assert error(x, wrong) > 1.01 * error(x, best)


def test_signs_do_not_matter() -> None:
    x = numbers("lognormal")
    assert scale_of([-x], "mse") == scale_of([x], "mse")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", HEAVY_TAILED)
def test_where_tails_are_heavy_clipping_errs_less(kind: str, seed: int) -> None:
    x = numbers(kind, seed)
    clipped, whole = (scale_of([x], clip) for clip in ("mse", "max"))
    assert clipped < whole
    assert error(x, clipped) < 0.98 * error(x, whole)


@given(kind=st.sampled_from(sorted(DATA)), seed=seeds)
def test_mse_never_errs_more_than_max(kind: str, seed: int) -> None:
    x = numbers(kind, seed)
    assert error(x, scale_of([x], "mse")) <= 1.001 * error(x, scale_of([x], "max"))


def test_what_is_not_heavy_tailed_is_not_clipped() -> None:
    assert scale_of([numbers("uniform")], "mse") == scale_of([numbers("uniform")], "max")


@given(
    kind=st.sampled_from(sorted(DATA)),
    seed=seeds,
    cuts=st.lists(st.integers(0, COUNT), max_size=6),
    ascending=st.booleans(),
)
def test_it_does_not_matter_how_numbers_are_cut_into_parts(
    kind: str, seed: int, cuts: list[int], ascending: bool
) -> None:
    """Growing, the range comes out up to twice as wide and its bins with it, not more."""
    x = numbers(kind, seed)
    pieces = x[x.abs().argsort()] if ascending else x
    places = [0, *sorted(cuts), len(x)]
    parts = [pieces[begin:end] for begin, end in itertools.pairwise(places)]
    assert scale_of(parts, "max") == scale_of([x], "max")
    assert error(x, scale_of(parts, "mse")) < 1.02 * error(x, best_scale(x))


@given(seed=seeds)
def test_the_order_of_parts_and_the_shape_do_not_matter(seed: int) -> None:
    x = numbers("student-t", seed).view(40, 5, -1)
    # The first part has the range that the last one would have grown to.
    largest = x.abs().flatten(1).amax(1).argmax()
    parts = [x[largest], *x[:largest], *x[largest + 1 :]]
    assert scale_of(parts, "mse") == scale_of([x], "mse") == scale_of([x.flatten()], "mse")


def test_asking_changes_nothing() -> None:
    x = numbers("laplace")
    observer = observed([x])
    first = observer.scale("mse")
    observer.scale("max", torch.float16)
    assert observer.scale("mse") == first
    observer.add(x)
    assert observer.scale("mse") == first, "twice the numbers have the same best scale"


@pytest.mark.parametrize("first", [1e-20, 1e-3, 1.0])
def test_a_range_that_doubles_many_times_forgets_nothing(first: float) -> None:
    x = numbers("student-t")
    powers = torch.logspace(float(np.log10(first)), 0, 70)
    scale = scale_of([*(powers * 1e-3), x], "mse")
    assert error(x, scale) < 1.02 * error(x, best_scale(x))
    assert scale_of([*powers, x], "max") == scale_of([x], "max")


def test_small_numbers_count_after_the_range_has_grown() -> None:
    """Alone, the last part asks for a coarse scale; all numbers but one lie far below it."""
    x = many_and_one()
    found = scale_of([x[:-1], x[-1:]], "mse")
    assert found < 0.7 * scale_of([x[-1:]], "mse")
    assert error(x, found) < 1.02 * error(x, best_scale(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize(
    "parts",
    [[], [torch.zeros(0)], [torch.zeros(2, 3)], [torch.zeros(5), torch.full((3,), 1e-30)]],
    ids=["nothing", "empty", "zeros", "next-to-zero"],
)
def test_a_scale_is_never_zero(parts: list[Tensor], clip: Clip, dtype: torch.dtype) -> None:
    scale = scale_of(parts, clip, dtype)
    assert scale == pytest.approx(max(1e-6, torch.finfo(dtype).tiny), rel=0.02)
    assert torch.tensor(scale, dtype=dtype) > 0


def test_zeros_and_empty_parts_beside_numbers_count_as_such() -> None:
    x = numbers("student-t")
    zeros = torch.zeros(1000)
    expected = scale_of([torch.cat((zeros, x))], "mse")
    assert scale_of([zeros, torch.zeros(0), x], "mse") == expected
    assert scale_of([x, torch.zeros(0, 4), zeros], "mse") == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", ["max", "mse"])
@pytest.mark.parametrize("kind", DATA)
def test_the_scale_is_a_number_of_the_dtype_asked_for(
    kind: str, clip: Clip, dtype: torch.dtype
) -> None:
    x = numbers(kind)
    found = scale_of([x], clip, dtype)
    assert found == float(torch.tensor(found, dtype=dtype))
    assert found == float(torch.tensor(scale_of([x], clip)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("clip", ["max", "mse"])
def test_numbers_of_any_dtype_are_seen(clip: Clip, dtype: torch.dtype) -> None:
    x = numbers("student-t").to(dtype)
    assert scale_of([x], clip) == pytest.approx(scale_of([x.float()], clip), rel=1e-6)


def test_the_largest_half_precision_numbers_do_not_overflow() -> None:
    x = torch.full((100,), 65504.0, dtype=torch.float16)
    assert scale_of([x / 4, x], "max", torch.float16) == float(torch.tensor(65504 / 127).half())
    assert scale_of([x], "mse") == pytest.approx(65504 / 127)


def test_what_is_seen_is_left_alone() -> None:
    x = numbers("normal")
    before = x.clone()
    observed([x]).scale("mse")
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("later", [False, True])
def test_numbers_that_are_not_finite_are_refused_in_a_sentence(bad: float, later: bool) -> None:
    observer = Observer()
    if later:
        observer.add(torch.ones(5))
    with pytest.raises(RuntimeInputError, match="NaN or infinite"):
        observer.add(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e9])
def test_a_scale_is_positive_and_finite_where_fp16_would_not_hold_it(magnitude: float) -> None:
    observer = Observer()
    observer.add(torch.full((9,), magnitude))
    for clip in ("max", "mse"):
        scale = observer.scale(clip, torch.float16)  # type: ignore[arg-type]
        assert torch.finfo(torch.float16).tiny <= scale <= torch.finfo(torch.float16).max
