"""The bounds of schemes that round activations, where a last bit may decide about a whole step."""

from __future__ import annotations

import numpy as np
import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.verify.compare import KL, MAX_KL, Agreement, compare
from edgeattn.verify.drive import Tensors
from edgeattn.verify.golden import Golden
from edgeattn.verify.tolerance import FLOORS_QUANTIZED

# Tensors of two cases: logits by step, cache and residual stream by layer.
EXPECTED = {
    name: np.random.default_rng(i).normal(size=(6, 32)).astype(np.float32)
    for i, name in enumerate(
        f"{case}.{rest}"
        for case in ("sequence", "text")
        for rest in ("0.logits", "1.logits", "present.0.key", "present.1.key", "0.hidden.1")
    )
}
ROUNDED, WEIGHTS_ONLY = "w8a8", "w8-rtn"


def lowering(quant: str, dtype: str = "fp16") -> Lowering:
    return plan_lowering(Recipe("cpu", quant=quant, dtype=dtype), parse_target("cpu"))


def golden(errors: dict[str, float], *, kl: float | None = None) -> Golden:
    """Golden vectors with these errors of plain torch, 0 elsewhere."""
    known = {name: errors.get(name, 0.0) for name in EXPECTED}
    return Golden((), EXPECTED, known if kl is None else {**known, KL: kl})


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
    plain = golden({"text.1.logits": 0.03, "sequence.present.1.key": 0.02})
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
    plain = golden({"text.1.logits": 0.03})
    assert passed(off_by(0.05, "text.1.logits"), plain, WEIGHTS_ONLY)
    assert passed(off_by(0.05, "text.1.logits"), plain, ROUNDED)
    assert not passed(off_by(0.05, "sequence.0.logits"), plain, WEIGHTS_ONLY)
    assert passed(off_by(0.05, "sequence.0.logits"), plain, ROUNDED)


@pytest.mark.parametrize("quant", [ROUNDED, "w8a8-spinquant:keep=0"])
@pytest.mark.parametrize(("dtype", "share"), [("fp32", 1e-3), ("fp16", 0.08), ("bf16", 0.2)])
def test_more_than_twice_the_largest_never_passes(dtype: str, share: float, quant: str) -> None:
    plain = golden(dict.fromkeys(EXPECTED, share / 2.5 - FLOORS_QUANTIZED[dtype] / 2))
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
    plain = golden(dict.fromkeys(EXPECTED, 0.5), kl=kl)
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
            assert not passed(found, golden(dict.fromkeys(EXPECTED, 10.0), kl=10.0), quant)


def test_plain_torchs_own_divergence_is_no_tensor() -> None:
    names = [
        c.tensor for c in compare("o", EXPECTED, golden({}, kl=1), lowering(ROUNDED)).comparisons
    ]
    assert KL not in names
    assert names == list(EXPECTED)
