"""Coefficients of a positive polynomial with the least error of a head's output.

The error is that of `edgeattn.calibration.far_sums`, Σ_i u_i z·G_i z / (z·n_i)² with z = (1, c). A
polynomial of degree 2m that is nowhere negative is the sum of two squares,

    P(x) = (a_0 + … + a_m x^m)² + (b_0 + … + b_(m−1) x^(m−1))²,

and as many numbers a and b as it has coefficients are left free: Levenberg-Marquardt finds them.
Odd degrees are not fitted, for none is positive far on both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeattn.ops.fft_rope_attention import least_value

_STEPS = 40
# A step that gains less than this share is the last one.
_LEAST_GAIN = 1e-6
# A descent is begun again so often, that share towards Taylor's, while it gains so much.
_STARTS, _INSIDE, _LEAST_RESTART_GAIN = 5, 0.1, 1e-3
# Damping at first, how it shrinks and grows, and where a step that still gains nothing gives up.
_DAMPING, _SHRINK, _GROW, _MOST_DAMPING = 1e-3, 0.2, 10.0, 1e8


@dataclass(frozen=True)
class RowErrors:
    """What the error of some rows depends on, for polynomials of degree g.

    Attributes:
        gram: G, `[R, g + 2, g + 2]` fp64.
        weight: n, `[R, g + 2]` fp64.
        importance: u, `[R]` fp64: 1 / Σ |y*|² over a window's rows makes the error relative.
    """

    gram: Tensor
    weight: Tensor
    importance: Tensor

    def up_to(self, degree: int) -> RowErrors:
        """The same for polynomials of a lower degree."""
        count = degree + 2
        gram = self.gram[:, :count, :count].contiguous()
        return RowErrors(gram, self.weight[:, :count].contiguous(), self.importance)

    def square(self, coefficients: Tensor) -> float:
        """The error, a mean square, for coefficients `[g + 1]` fp64."""
        z = _with_one(coefficients)
        squares = self.gram.flatten(1) @ z.outer(z).flatten()
        return float(self.importance @ (squares / (self.weight @ z).square()))

    def slopes(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient `[g + 1]` of `square`, and its Gauss-Newton matrix."""
        z, gram = _with_one(coefficients), self.gram
        total = (self.weight @ z).unsqueeze(-1)
        product, shares = (gram.flatten(0, 1) @ z).view_as(self.weight), self.weight / total
        square = (product @ z).unsqueeze(-1)
        importance = self.importance.unsqueeze(-1) / total.square()
        gradient = 2 * (importance * (product - square * shares)).sum(0)
        # Σ u J_rᵀ J_s with J_r = (B_r − e n_r) / total, e = Σ z_r B_r / total the row's error.
        cross = (importance * product).T @ shares
        matrix = (importance.squeeze(-1) @ gram.flatten(1)).view_as(gram[0])
        matrix = matrix - cross - cross.T + (importance * square * shares).T @ shares
        return gradient[1:], 2 * matrix[1:, 1:]


def taylor(degree: int) -> Tensor:
    """Coefficients of exp, `[degree + 1]` fp64."""
    return torch.tensor([1 / math.factorial(r) for r in range(degree + 1)], dtype=torch.float64)


def is_positive(coefficients: Tensor, bound: float) -> bool:
    """Whether a polynomial is positive from −bound to bound."""
    return least_value(coefficients.tolist(), bound) > 0


def fit_positive(rows: RowErrors, bound: float) -> Tensor:
    """The polynomial of the rows' degree, an even one, that fits best and is nowhere negative.

    Args:
        rows: to fit.
        bound: up to which it is positive in fp32, too.

    Returns:
        `[g + 1]` fp64, exact in fp32; on these rows no worse than Taylor's.
    """
    start = taylor(rows.weight.shape[1] - 2)
    found = start
    for _ in range(_STARTS):
        # Where both squares share a root, steps see no way out: from a little inside they do.
        inside = (1 - _INSIDE) * found + _INSIDE * start
        reached = _coefficients(_descend(rows, _squares(inside)))
        gained = rows.square(reached) < (1 - _LEAST_RESTART_GAIN) * rows.square(found)
        found = min((reached, found), key=rows.square)
        if not gained:
            break
    return min((_lifted(found, bound), start.float().double()), key=rows.square)


def _descend(rows: RowErrors, at: Tensor) -> Tensor:
    """Levenberg-Marquardt steps from the numbers a and b."""
    value, damping = rows.square(_coefficients(at)), _DAMPING
    for _ in range(_STEPS):
        gradient, matrix = rows.slopes(_coefficients(at))
        jacobian = _jacobian(at)
        gradient, matrix = jacobian.T @ gradient, jacobian.T @ matrix @ jacobian
        # Powers of a logit have sizes far apart: steps are scaled by the diagonal.
        scale = matrix.diagonal().clamp(min=1e-12 * float(matrix.diagonal().max()) + 1e-300).rsqrt()
        scaled, downhill = matrix * scale.outer(scale), -scale * gradient
        while damping < _MOST_DAMPING:
            damped = scaled + damping * torch.eye(len(at), dtype=at.dtype)
            reached = at + scale * torch.linalg.solve(damped, downhill)
            if (lower := rows.square(_coefficients(reached))) < value:
                break
            damping *= _GROW
        else:
            break
        at, gain, value, damping = reached, value - lower, lower, damping * _SHRINK
        if gain < _LEAST_GAIN * value:
            break
    return at


def _squares(coefficients: Tensor) -> Tensor:
    """The numbers a and b, `[2m + 1]`, of a positive polynomial.

    Half of its roots make a polynomial whose real part is a, and whose imaginary part b.
    """
    roots = np.polynomial.Polynomial(coefficients.numpy()).roots()
    half = np.atleast_1d(np.poly(roots[np.imag(roots) > 0]))[::-1]
    half = half * math.sqrt(float(coefficients[-1]))
    return torch.from_numpy(np.concatenate([np.real(half), np.imag(half)[:-1]]))


def _coefficients(squares: Tensor) -> Tensor:
    """The coefficients of a and b, a quadratic form."""
    return _jacobian(squares) @ squares / 2


def _jacobian(squares: Tensor) -> Tensor:
    """∂c / ∂(a, b), `[2m + 1, 2m + 1]`."""
    count = len(squares) // 2 + 1
    matrix = torch.zeros(len(squares), len(squares), dtype=squares.dtype)
    for first, half in ((0, squares[:count]), (count, squares[count:])):
        for place in range(len(half)):
            matrix[place : place + len(half), first + place] = 2 * half
    return matrix


def _lifted(coefficients: Tensor, bound: float) -> Tensor:
    """In fp32, and the least bit higher that makes it positive."""
    lift, found = 0.0, coefficients.float().double()
    while not is_positive(found, bound):
        lift = max(10 * lift, 1e-7)
        found = coefficients.clone()
        found[0] = found[0] * (1 + lift) + 1e-30
        found = found.float().double()
    return found


def _with_one(coefficients: Tensor) -> Tensor:
    return torch.cat([torch.ones(1, dtype=torch.float64), coefficients])
