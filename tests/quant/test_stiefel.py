"""Optimisation over orthogonal matrices against closed forms and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.quant.stiefel import (
    CayleySGD,
    cayley_step,
    nearest_orthogonal,
    orthogonality_error,
    skew_gradient,
)

Loss = Callable[[torch.Tensor], torch.Tensor]
seeds = st.integers(0, 2**32 - 1)


def rotation(n: int, seed: int = 0) -> torch.Tensor:
    """Of determinant 1: no path on the manifold leads from there to determinant -1."""
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = torch.linalg.qr(noise)[0]
    found[0] *= torch.linalg.det(found)
    return found


def procrustes(n: int, dtype: torch.dtype) -> tuple[Loss, torch.Tensor]:
    """The loss |A R - B|^2, and the rotation that minimises it."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) / (4 * n) ** 0.5
    b = a @ rotation(n, 2) + 0.01 * torch.randn(4 * n, n, generator=generator).double()
    left, _, right = torch.linalg.svd(a.T @ b)
    best = left @ right
    assert torch.linalg.det(best) > 0
    a, b = a.to(dtype), b.to(dtype)
    return lambda r: (a @ r - b).square().sum(), best.to(dtype)


def train(optimizer: torch.optim.Optimizer, r: torch.Tensor, loss: Loss, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(r)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("n", [2, 16, 96])
def test_stays_orthogonal_in_single_precision(n: int, momentum: float) -> None:
    loss, _ = procrustes(n, torch.float32)
    r = torch.nn.Parameter(torch.eye(n))
    losses = train(CayleySGD([r], lr=0.5, momentum=momentum), r, loss, 200)
    assert losses[-1] < 0.1 * losses[0]
    assert orthogonality_error(r) < 1e-6


def test_a_plain_step_leaves_the_manifold() -> None:
    """The test above can tell a wrong optimiser from a right one."""
    loss, _ = procrustes(16, torch.float32)
    r = torch.nn.Parameter(torch.eye(16))
    train(torch.optim.SGD([r], lr=0.5), r, loss, 1)
    assert orthogonality_error(r) > 1e-2


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 500), (0.9, 250)])
def test_reaches_the_optimum_of_procrustes(momentum: float, steps: int) -> None:
    loss, best = procrustes(16, torch.float64)
    r = torch.nn.Parameter(rotation(16, 3))
    losses = train(CayleySGD([r], lr=0.3, momentum=momentum), r, loss, steps)
    assert losses[-1] == pytest.approx(float(loss(best)), rel=1e-7)
    torch.testing.assert_close(r.detach(), best, rtol=0, atol=1e-3)
    if not momentum:
        assert all(after <= before + 1e-12 for before, after in pairwise(losses))


def test_momentum_is_faster_and_remembers() -> None:
    loss, best = procrustes(16, torch.float64)
    reached = {}
    for momentum in (0.0, 0.9):
        r = torch.nn.Parameter(torch.eye(16, dtype=torch.float64))
        optimizer = CayleySGD([r], lr=0.05, momentum=momentum)
        reached[momentum] = train(optimizer, r, loss, 150)[-1] - float(loss(best))
    assert reached[0.9] < 0.1 * reached[0.0]
    # Without any gradient it keeps turning the same way.
    before, remembered = r.detach().clone(), optimizer.state[r]["momentum"].clone()
    r.grad = torch.zeros_like(r)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[r]["momentum"], 0.9 * remembered)
    torch.testing.assert_close(r.detach(), cayley_step(before, 0.9 * remembered, 0.05))


@given(seed=seeds)
@settings(max_examples=20)
def test_the_gradient_agrees_with_a_finite_difference(seed: int) -> None:
    """The loss along the curve `cayley_step(R, S, t)` has slope -<W, S> at t = 0."""
    r = rotation(6, seed).requires_grad_()
    noise = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(seed)).double()

    def loss(r: torch.Tensor) -> torch.Tensor:
        return ((noise[0] @ r).sin() + r.pow(3)).sum()

    (gradient,) = torch.autograd.grad(loss(r), r)
    r = r.detach()
    skew, along = skew_gradient(r, gradient), noise[1] - noise[1].T
    slope = (loss(cayley_step(r, along, 1e-5)) - loss(cayley_step(r, along, -1e-5))) / 2e-5
    torch.testing.assert_close(slope, -(skew * along).sum(), rtol=1e-6, atol=1e-6)


@given(seed=seeds)
@settings(max_examples=20)
def test_formulas_of_the_paper(seed: int) -> None:
    """Ghat with the term that `skew_gradient` leaves out; the transform by an explicit inverse."""
    r = rotation(6, seed)
    g = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()
    ghat = g @ r.T - r @ r.T @ g @ r.T / 2
    w = skew_gradient(r, g)
    torch.testing.assert_close(w, ghat - ghat.T)
    identity = torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(identity + 0.35 * w) @ (identity - 0.35 * w) @ r
    torch.testing.assert_close(cayley_step(r, w, 0.7), expected)


def test_a_huge_learning_rate_turns_by_at_most_53_degrees() -> None:
    r = torch.nn.Parameter(rotation(12))
    before = r.detach().clone()
    r.grad = 1e6 * torch.randn(12, 12, dtype=torch.float64)
    CayleySGD([r], lr=1e6).step()
    angles = torch.linalg.eigvals(r.detach() @ before.T).angle().rad2deg()
    assert 5 < angles.abs().max() < 53.2


def test_a_training_resumed_from_disk_goes_the_same_way(tmp_path: Path) -> None:
    loss, _ = procrustes(8, torch.float32)
    r = torch.nn.Parameter(torch.eye(8))
    optimizer = CayleySGD([r], lr=0.3, momentum=0.9)
    train(optimizer, r, loss, 5)
    state = optimizer.state_dict()
    save_file({"r": r.detach(), "momentum": state["state"][0]["momentum"]}, tmp_path / "state")
    expected = train(optimizer, r, loss, 10)

    stored = load_file(tmp_path / "state")
    resumed = torch.nn.Parameter(stored["r"])
    again = CayleySGD([resumed], lr=1.0)
    again.load_state_dict({**state, "state": {0: {"momentum": stored["momentum"]}}})
    assert train(again, resumed, loss, 10) == expected
    assert torch.equal(resumed, r)


def test_parameters_with_options_of_their_own_and_without_gradients() -> None:
    still, slow, fast = (torch.nn.Parameter(rotation(4)) for _ in range(3))
    optimizer = CayleySGD([{"params": [still, slow]}, {"params": [fast], "lr": 0.2}], lr=0.1)
    gradient = 0.1 * torch.randn(4, 4).double()
    slow.grad, fast.grad = gradient.clone(), gradient.clone()
    assert optimizer.step(lambda: 3.5) == 3.5
    start = rotation(4)
    assert torch.equal(still, start)
    for r, lr in ((slow, 0.1), (fast, 0.2)):
        expected = cayley_step(start, skew_gradient(start, gradient), lr)
        torch.testing.assert_close(r.detach(), expected)


def test_a_gradient_of_zero_changes_nothing() -> None:
    r = torch.nn.Parameter(torch.eye(4))
    r.grad = torch.zeros(4, 4)
    CayleySGD([r], lr=0.1, momentum=0.9).step()
    assert torch.equal(r, torch.eye(4))


def test_refuses_a_gradient_that_is_not_finite() -> None:
    r = torch.nn.Parameter(torch.eye(4))
    r.grad = torch.full((4, 4), torch.nan)
    optimizer = CayleySGD([r], lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeInputError, match="finite gradients of the rotations"):
        optimizer.step()
    assert torch.equal(r, torch.eye(4))
    assert not optimizer.state[r]


@pytest.mark.parametrize(
    "start",
    [torch.ones(3, 3), torch.eye(3)[:2], torch.eye(3).half(), torch.full((2, 2), torch.nan)],
    ids=["not orthogonal", "not square", "fp16", "nan"],
)
def test_refuses_a_start_off_the_manifold(start: torch.Tensor) -> None:
    with pytest.raises(RuntimeInputError, match="orthogonal matrices in fp32 or fp64"):
        CayleySGD([torch.nn.Parameter(start)], lr=0.1)


@pytest.mark.parametrize(("lr", "momentum"), [(0.0, 0.0), (-1.0, 0.0), (0.1, 1.0), (0.1, -0.1)])
def test_refuses_options_out_of_range(lr: float, momentum: float) -> None:
    with pytest.raises(UsageError, match="a positive learning rate"):
        CayleySGD([torch.nn.Parameter(torch.eye(2))], lr, momentum)


@given(seed=seeds)
@settings(max_examples=20)
def test_the_nearest_orthogonal_matrix(seed: int) -> None:
    """Exact, closer than others, and the factor of a polar decomposition."""
    start = rotation(6, seed)
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()
    matrix = start + 0.05 * noise
    nearest = nearest_orthogonal(matrix)
    assert orthogonality_error(nearest) < 1e-14
    factor = nearest.T @ matrix
    torch.testing.assert_close(factor, factor.T)
    assert torch.linalg.eigvalsh(factor).min() > 0
    other = cayley_step(nearest, noise - noise.T, 0.01)
    assert (nearest - matrix).norm() < (other - matrix).norm()
    torch.testing.assert_close(nearest_orthogonal(nearest.float()), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "matrix", [torch.ones(3, 3), torch.zeros(2, 2), torch.full((2, 2), torch.inf)]
)
def test_no_orthogonal_matrix_is_nearest(matrix: torch.Tensor) -> None:
    with pytest.raises(RuntimeInputError, match="a matrix near a rotation"):
        nearest_orthogonal(matrix)


def test_the_orthogonality_error_is_the_largest_element() -> None:
    matrix = torch.eye(3)
    matrix[2, 2] = 2.0
    assert orthogonality_error(matrix) == 3.0
    assert orthogonality_error(torch.eye(3).bfloat16()) == 0.0
