"""Weights fitted to other inputs: least squares by numpy, what must not change anything, limits."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.quant.gptq import Hessian
from edgeattn.quant.refit import Drift

TOKENS, WIDTH, OUTPUTS = 1250, 12, 7


def inputs(seed: int, noise: float = 0.3, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs of the original network, and the same after it lost something.

    Four times the same: what is held out is like the rest, so that nothing speaks against a step.
    """
    exact, seen = other_inputs(seed, noise, tokens)
    return exact.repeat(4, 1), seen.repeat(4, 1)


def other_inputs(seed: int, noise: float, tokens: int, linear: float = 1) -> tuple[Tensor, Tensor]:
    """As `inputs`, all tokens of their own; `linear` of what is lost can be made up for."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(tokens, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1)
    mixed = exact @ torch.randn(WIDTH, WIDTH, generator=generator) * 0.1
    lost = linear * mixed + torch.randn(tokens, WIDTH, generator=generator)
    return exact, exact + noise * lost


def correction(exact: Tensor, seen: Tensor, damp: float = 1e-12, parts: int = 1) -> Tensor:
    """What becomes of the identity: the matrix that weights are multiplied with."""
    refit = drift_of(exact, seen, parts).finish(damp=damp)
    return refit(torch.eye(seen.shape[-1])).double()


def drift_of(exact: Tensor, seen: Tensor, parts: int = 1) -> Drift:
    drift = Drift(seen.shape[-1])
    for x, y in zip(exact.chunk(parts), seen.chunk(parts), strict=True):
        drift.add(x, y)
    return drift


def loss(weight: Tensor, target: Tensor, exact: Tensor, seen: Tensor) -> float:
    """Squared error of outputs."""
    return float((seen.double() @ weight.T - exact.double() @ target.T).square().sum())


def test_it_is_the_least_squares_solution() -> None:
    exact, seen = inputs(0)
    weight = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    found = weight @ correction(exact, seen)
    outputs = exact.double().numpy() @ weight.numpy().T
    best, *_ = np.linalg.lstsq(seen.double().numpy(), outputs, rcond=None)
    np.testing.assert_allclose(found.numpy(), best.T, rtol=1e-4, atol=1e-5)


def test_many_tokens_of_a_linear_loss_are_followed_all_the_way() -> None:
    exact, seen = other_inputs(6, 0.3, 20_000)
    found, whole = correction(exact, seen), correction(exact.repeat(4, 1), seen.repeat(4, 1))
    identity = torch.eye(WIDTH).double()
    assert (found - whole).norm() < 0.02 * (whole - identity).norm()


@pytest.mark.parametrize("seed", range(5))
def test_few_tokens_are_followed_a_part_of_the_way_and_help_others(seed: int) -> None:
    """Noise is fitted where tokens are few: all the way would do harm."""
    exact, seen = other_inputs(seed, 0.8, 4000, linear=0.3)
    few, others = slice(32), slice(32, None)
    found = correction(exact[few], seen[few])
    whole = correction(exact[few].repeat(4, 1), seen[few].repeat(4, 1))
    identity = torch.eye(WIDTH).double()
    losses = [loss(m, identity, exact[others], seen[others]) for m in (found, identity, whole)]
    assert losses[0] < 1.02 * losses[1]
    assert losses[0] < losses[2]
    assert (found - identity).norm() < 0.9 * (whole - identity).norm()


def test_too_few_tokens_to_hold_any_out_change_nothing() -> None:
    exact, seen = other_inputs(7, 0.3, 3)
    torch.testing.assert_close(correction(exact, seen, 0.01), torch.eye(WIDTH).double())


def test_the_hessian_is_that_of_what_the_layer_gets() -> None:
    exact, seen = other_inputs(8, 0.3, 1001)
    hessian = Hessian(WIDTH)
    hessian.add(seen)
    for parts in (1, 5):
        found = drift_of(exact, seen, parts).finish().hessian
        torch.testing.assert_close(found, hessian.matrix, rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), damp=st.sampled_from([1e-12, 0.01, 1.0]))
def test_no_weights_do_better_and_the_original_ones_do_worse(seed: int, damp: float) -> None:
    exact, seen = inputs(seed)
    weight = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    least = loss(weight @ correction(exact, seen), weight, exact, seen)
    assert least <= loss(weight @ correction(exact, seen, damp), weight, exact, seen) * (1 + 1e-9)
    assert loss(weight @ correction(exact, seen, damp), weight, exact, seen) < loss(
        weight, weight, exact, seen
    )


@pytest.mark.parametrize("damp", [1e-12, 0.01])
def test_inputs_that_are_as_they_were_change_nothing(damp: float) -> None:
    exact, _ = inputs(2)
    found = correction(exact, exact, damp)
    torch.testing.assert_close(found, torch.eye(WIDTH).double(), rtol=0, atol=1e-5)


def test_much_damping_changes_nothing() -> None:
    found = correction(*inputs(3), damp=1e9)
    torch.testing.assert_close(found, torch.eye(WIDTH).double(), rtol=0, atol=1e-6)


def test_inputs_that_are_always_zero_keep_their_weights_out() -> None:
    exact, seen = inputs(4)
    exact[:, 3], seen[:, 3] = 0, 0
    found = correction(exact, seen, 0.01)
    expected = torch.zeros(WIDTH).double()
    expected[3] = 1
    torch.testing.assert_close(found[3], expected, rtol=0, atol=1e-9)
    assert correction(torch.zeros(5, 4), torch.zeros(5, 4)).isfinite().all()


def test_parts_and_shapes_do_not_matter() -> None:
    exact, seen = inputs(5)
    whole, parts = correction(exact, seen), correction(exact, seen, parts=7)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-3)
    windows = correction(exact.view(10, -1, WIDTH), seen.view(10, -1, WIDTH))
    torch.testing.assert_close(windows, whole, rtol=0, atol=1e-6)


def test_a_loud_input_that_hardly_counts_does_not_vouch_for_the_others() -> None:
    """Of few tokens: what it lost can be made up for, the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    few, width = 100, 64
    exact = torch.randn(4000, width, generator=generator)
    exact[:, 0] *= 30
    seen = exact + 0.3 * torch.randn(4000, width, generator=generator)
    seen[:, 0] = 0.8 * exact[:, 0]
    weight = torch.randn(OUTPUTS, width, generator=generator)
    weight[:, 0] *= 1e-3
    found = drift_of(exact[:few], seen[:few]).finish()(weight).double()
    losses = [loss(w, weight.double(), exact[few:], seen[few:]) for w in (found, weight.double())]
    assert losses[0] < 1.05 * losses[1]


@pytest.mark.parametrize(
    ("side", "bad"), [(0, torch.inf), (0, torch.nan), (1, torch.inf), (1, torch.nan), (1, 1e30)]
)
def test_numbers_that_cannot_be_used_are_refused_in_a_sentence(side: int, bad: float) -> None:
    pair = other_inputs(9, 0.3, 50)
    pair[side][7, 3] = bad
    with pytest.raises(RuntimeInputError, match="finite activations, to calibrate on"):
        drift_of(*pair)
