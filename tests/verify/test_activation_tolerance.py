"""The bounds of schemes that round at run time, where a last bit may decide about a whole step."""

from __future__ import annotations

import numpy as np
import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.compare import KL, MAX_KL, Agreement, compare
from edgeattn.verify.drive import Tensors
from edgeattn.verify.golden import Golden
from edgeattn.verify.tolerance import FLOORS_QUANTIZED

# Two steps of six tokens each, in two cases.
STEPS = tuple(
    StepInputs(
        np.zeros((1, 6), np.int64), np.ones((1, 6 * n), np.int64), np.zeros((1, 6), np.int64)
    )
    for n in (1, 2)
)
CASES = tuple(Case(name, STEPS) for name in ("sequence", "text"))


def random_rows(seed: int, count: int) -> np.ndarray:
    """Tokens of root mean square 1."""
    rows = np.random.default_rng(seed).normal(size=(count, 32))
    return (rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True))).astype(np.float32)


# Logits and residual stream by step, cache by layer.
EXPECTED = {
    f"{case}.{rest}": random_rows(i, 12 if "present" in rest else 6)
    for case in ("sequence", "text")
    for i, rest in enumerate(
        ("0.logits", "1.logits", "present.0.key", "present.1.key", "0.hidden.1", "1.hidden.1")
    )
}
# As the steps of a case are judged together.
JOINED = ("logits", "present.0.key", "present.1.key", "hidden.1")
ALL = (*EXPECTED, *(f"{case.name}.{rest}" for case in CASES for rest in JOINED))
ROUNDED, WEIGHTS_ONLY = "w8a8", "w8-rtn"


def lowering(quant: str, dtype: str = "fp16") -> Lowering:
    return plan_lowering(Recipe("cpu", quant=quant, dtype=dtype), parse_target("cpu"))


def golden(errors: dict[str, float], *, kl: float | None = None) -> Golden:
    """Golden vectors with these errors of plain torch, 0 elsewhere."""
    known = {name: errors.get(name, 0.0) for name in ALL}
    return Golden(CASES, EXPECTED, known if kl is None else {**known, KL: kl})


def off_by(share: float, *names: str) -> Tensors:
    """What was expected, but these tensors are off by a share of their root mean square."""
    found = dict(EXPECTED)
    for name in names:
        noise = np.sign(np.random.default_rng(99).normal(size=found[name].shape))
        rms = np.sqrt(np.square(found[name]).mean())
        found[name] = (found[name] + share * rms * noise).astype(np.float32)
    return found


def passed(found: Tensors, plain: Golden, quant: str, dtype: str = "fp16") -> bool:
    return compare("other", found, plain, lowering(quant, dtype)).passed


def allowed(agreement: Agreement) -> dict[str, float]:
    return {comparison.tensor: comparison.allowed for comparison in agreement.comparisons}


def test_the_largest_error_of_a_kind_stands_for_all_of_it() -> None:
    plain = golden({"text.logits": 0.03, "sequence.present.1.key": 0.02})
    floor = FLOORS_QUANTIZED["fp16"]
    bounds = allowed(compare("other", dict(EXPECTED), plain, lowering(ROUNDED)))
    for name, bound in bounds.items():
        low = {"logits": 0.03, "1.key": 0.02}
        expected = next((v for ending, v in low.items() if name.endswith(ending)), 0.0)
        assert bound == pytest.approx(2 * expected + floor), name


def test_layers_and_keys_and_values_do_not_stand_for_each_other() -> None:
    plain = golden({"sequence.present.1.key": 0.02})
    for other in ("text.present.0.key", "text.0.hidden.1", "text.0.logits"):
        assert not passed(off_by(0.03, other), plain, ROUNDED)
    assert passed(off_by(0.03, "text.present.1.key"), plain, ROUNDED)


def test_without_rounded_activations_each_tensor_has_its_own_bound() -> None:
    plain = golden({"text.1.logits": 0.03, "text.logits": 0.03})
    assert passed(off_by(0.05, "text.1.logits"), plain, WEIGHTS_ONLY)
    assert passed(off_by(0.05, "text.1.logits"), plain, ROUNDED)
    assert not passed(off_by(0.05, "sequence.0.logits"), plain, WEIGHTS_ONLY)
    assert passed(off_by(0.05, "sequence.0.logits"), plain, ROUNDED)


@pytest.mark.parametrize("quant", [ROUNDED, "w8a8-spinquant:keep=0"])
@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1e-3), ("fp16", 0.08), ("bf16", 0.2)])
def test_more_than_twice_the_largest_never_passes(dtype: str, share: float, quant: str) -> None:
    plain = golden(dict.fromkeys(ALL, share / 2.5 - FLOORS_QUANTIZED[dtype] / 2))
    low = lowering(quant, "fp16" if dtype == "bf16" else dtype)
    low = Lowering(**{**vars(low), "dtype": dtype})
    for name in EXPECTED:
        assert not compare("other", off_by(share, name), plain, low).passed
        assert compare("other", off_by(share * 0.75, name), plain, low).passed


def test_rounding_adds_a_bound_on_the_distribution() -> None:
    exact = golden({})
    rounded, weights_only = (
        compare("other", dict(EXPECTED), exact, lowering(quant))
        for quant in (ROUNDED, WEIGHTS_ONLY)
    )
    assert (rounded.max_kl, weights_only.max_kl) == (MAX_KL, None)
    assert rounded.kl == 0
    assert rounded.top1 == 1


def test_the_distribution_may_be_as_far_off_as_twice_plain_torchs() -> None:
    found = compare("other", dict(EXPECTED), golden({}, kl=0.3), lowering(ROUNDED))
    assert found.max_kl == pytest.approx(2 * 0.3 + MAX_KL)


@pytest.mark.parametrize(("kl", "expected"), [(None, False), (0.0, False), (1.0, True)])
def test_a_distribution_too_far_off_fails_although_every_tensor_is_within_its_bound(
    kl: float | None, expected: bool
) -> None:
    logits = [name for name in EXPECTED if name.endswith("logits")]
    plain = golden(dict.fromkeys(ALL, 0.5), kl=kl)
    found = off_by(0.6, *logits)
    rounded = compare("other", found, plain, lowering(ROUNDED))
    assert all(comparison.passed for comparison in rounded.comparisons)
    assert rounded.kl > MAX_KL
    assert rounded.passed == expected
    assert compare("other", found, plain, lowering(WEIGHTS_ONLY)).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("quant", [ROUNDED, WEIGHTS_ONLY])
def test_what_is_no_number_never_passes(bad: float, quant: str) -> None:
    for name in EXPECTED:
        found = dict(EXPECTED)
        found[name] = np.full_like(found[name], bad)
        with np.errstate(invalid="ignore"):
            assert not passed(found, golden(dict.fromkeys(ALL, 10.0), kl=10.0), quant)


def test_plain_torchs_own_divergence_is_no_tensor() -> None:
    names = [
        c.tensor for c in compare("o", EXPECTED, golden({}, kl=1), lowering(ROUNDED)).comparisons
    ]
    assert KL not in names
    assert sorted(names) == sorted(f"{case.name}.{rest}" for case in CASES for rest in JOINED)


def test_one_token_proves_nothing_where_numbers_are_rounded() -> None:
    """A number on the other side of a boundary is a whole step of its token."""
    found = {name: value.copy() for name, value in EXPECTED.items()}
    for value in found.values():
        value[0] *= 1.5
    plain = golden({}, kl=1.0)
    assert passed(found, plain, ROUNDED)
    assert not passed(found, plain, WEIGHTS_ONLY)


def test_a_sequence_does_not_hide_behind_the_others() -> None:
    """A wrong mask or position spoils the padded row of a batch alone."""
    mask = np.array([[1] * 8, [0] * 5 + [1] * 3])
    step = StepInputs(np.zeros((2, 8), np.int64), mask, np.zeros((2, 8), np.int64))
    rows = random_rows(0, 11)
    expected = {"ragged.0.logits": rows, "ragged.present.0.key": rows}
    plain = Golden((Case("ragged", (step,)),), expected, {KL: 1.0})
    for name in expected:
        wrong = rows.copy()
        wrong[8:] *= 1.1
        agreement = compare("other", {**expected, name: wrong}, plain, lowering(ROUNDED))
        assert [c.error for c in agreement.comparisons if not c.passed] == [pytest.approx(0.1)]


def test_a_graph_of_last_logits_has_one_for_each_row_that_ends_there() -> None:
    mask = np.array([[1, 1], [1, 0]])
    step = StepInputs(np.zeros((2, 2), np.int64), mask, np.zeros((2, 2), np.int64))
    expected = {"ragged.0.logits": random_rows(0, 1)}
    plain = Golden((Case("ragged", (step,)),), expected, {KL: 1.0})
    assert compare("other", expected, plain, lowering(ROUNDED)).passed
    assert not compare("other", {}, plain, lowering(ROUNDED)).passed
