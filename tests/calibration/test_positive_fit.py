"""The positive polynomial with the least error: its slopes, its bounds, and that none is better."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from edgeattn.calibration.positive_fit import (
    RowErrors,
    _coefficients,
    _squares,
    fit_positive,
    is_positive,
    taylor,
)
from edgeattn.ops.fft_rope_attention import least_value


def rows_of(spread: float, degree: int, *, near: float = 5.0) -> RowErrors:
    """Rows of 200 far keys with Gaussian scores, beside one near key of some weight."""
    count, keys, width = 300, 200, 8
    x = (spread * torch.randn(count, keys)).double()
    v, ours = torch.randn(count, keys, width).double(), torch.randn(count, 1, width).double()
    powers = torch.stack([x**r for r in range(degree + 1)], 1)
    exact = x.exp()
    total = exact.sum(-1) + near
    y = ((exact.unsqueeze(1) @ v).squeeze(1) + near * ours.squeeze(1)) / total.unsqueeze(-1)
    offset = torch.cat([near * ours, powers @ v], 1)
    weight = torch.cat([torch.full((count, 1), near).double(), powers.sum(-1)], 1)
    offset = offset - weight.unsqueeze(-1) * y.unsqueeze(1)
    importance = (1 / y.square().sum()).expand(count)
    return RowErrors(offset @ offset.mT, weight, importance)


@pytest.mark.parametrize("degree", [2, 4])
def test_squares_give_the_polynomial_back(degree: int) -> None:
    torch.testing.assert_close(_coefficients(_squares(taylor(degree))), taylor(degree))


@pytest.mark.parametrize("degree", [0, 2, 4])
def test_slopes_are_those_of_the_error(degree: int) -> None:
    rows, at = rows_of(0.7, degree), taylor(degree) * 1.1
    gradient, matrix = rows.slopes(at)
    for r in range(degree + 1):
        step = torch.zeros_like(at)
        step[r] = 1e-6
        numeric = (rows.square(at + step) - rows.square(at - step)) / 2e-6
        assert float(gradient[r]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9 * matrix.abs().max()


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("degree", [0, 2, 4])
def test_no_positive_neighbour_is_better(spread: float, degree: int) -> None:
    rows, bound = rows_of(spread, degree), 50.0
    found = fit_positive(rows, bound)
    assert torch.equal(found, found.float().double())
    assert is_positive(found, bound)
    least = rows.square(found)
    assert least <= rows.square(taylor(degree))
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(200):
            other = found * (1 + size * torch.randn_like(found))
            if is_positive(other, 1e3):
                # It is a minimum among squares, which polynomials beside it may undercut a little.
                assert rows.square(other) >= 0.995 * least


def test_fitted_is_better_than_taylor_where_scores_spread() -> None:
    rows = rows_of(1.0, 2)
    assert rows.square(fit_positive(rows, 20.0)) < 0.9 * rows.square(taylor(2))


def test_higher_degrees_fit_better() -> None:
    rows = rows_of(1.0, 4)
    errors = [rows.up_to(g).square(fit_positive(rows.up_to(g), 20.0)) for g in (0, 2, 4)]
    assert errors[2] < errors[1] < errors[0]


def test_positive_where_an_unconstrained_fit_is_not() -> None:
    rows = rows_of(2.0, 2, near=200.0)
    free = taylor(2)
    for _ in range(50):
        gradient, matrix = rows.slopes(free)
        free = free - 0.5 * torch.linalg.solve(matrix, gradient)
    assert least_value(free.tolist(), 100.0) < 0
    assert is_positive(fit_positive(rows, 100.0), 100.0)


def test_rows_that_weigh_nothing_change_nothing() -> None:
    rows = rows_of(0.8, 2)
    half = RowErrors(rows.gram, rows.weight, rows.importance.clone())
    half.importance[150:] = 0
    part = RowErrors(rows.gram[:150], rows.weight[:150], rows.importance[:150])
    at: Tensor = taylor(2)
    assert half.square(at) == pytest.approx(part.square(at))
