"""Weights that make up for what the layers before have lost, before they are rounded themselves.

A quantised network gives a linear layer other inputs x than the original one, x'. Of all weights V,
those that come closest to the original outputs W x' from what they are given, that is the least
mean |V x - W x'|^2, are

    V = W C H^-1,    C = mean of x' x^T,    H = mean of x x^T

(least squares), and rounding V to Q then costs tr (V - Q) H (V - Q)^T more, which is what GPTQ
makes small. The same aim, reached column by column instead of at once: arXiv 2504.02692.

Few tokens tell little of K^2 numbers. A quarter of them is held out, to see how far the step from W
to V leads the right way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.quant.gptq import Hessian

# Share of the tokens that come at once.
_HELD_OUT = 0.25
_CHUNK_TOKENS = 2048


class Drift:
    """How the inputs of a linear layer have moved away from the original network's.

    Args:
        size: K, the inputs of the layer.
    """

    def __init__(self, size: int) -> None:
        self._parts = _Sums(size), _Sums(size)

    def add(self, exact: Tensor, seen: Tensor) -> None:
        """Counts in inputs `[..., K]` of the original network, and what the layer gets instead.

        Raises:
            RuntimeInputError: see `Hessian.add`.
        """
        exact, seen = (x.reshape(-1, x.shape[-1]).float() for x in (exact, seen))
        held = int(_HELD_OUT * len(seen))
        for part, rows in zip(self._parts, (slice(held, None), slice(held)), strict=True):
            part.add(exact[rows], seen[rows])

    @property
    def hessian(self) -> Tensor:
        """H, `[K, K]` fp64."""
        fitted, held = self._parts
        return (fitted.hessian + held.hessian) / (fitted.tokens + held.tokens)

    def correction(self, *, damp: float = 0.01) -> Tensor:
        """The matrix that weights `[outputs, K]` are multiplied with, `[K, K]` fp64.

        C H^-1, or the point on the way there from the identity that suits the tokens held out.

        Args:
            damp: share of the mean of H's diagonal that is added to the diagonals of H and C.
        """
        fitted, held = self._parts
        share = _best_share(_step(fitted.hessian, fitted.cross, damp), held)
        step = _step(fitted.hessian + held.hessian, fitted.cross + held.cross, damp)
        return torch.eye(len(step), dtype=step.dtype) + share * step


class _Sums:
    """Sums over tokens, which are multiplied in fp32 some thousand at once and added in fp64."""

    def __init__(self, size: int) -> None:
        self._seen = Hessian(size)
        self.cross = torch.zeros(size, size, dtype=torch.float64)

    def add(self, exact: Tensor, seen: Tensor) -> None:
        self._seen.add(seen)
        for x, y in zip(_chunks(exact), _chunks(seen), strict=True):
            self.cross += x.T @ y

    @property
    def tokens(self) -> int:
        return self._seen.tokens

    @property
    def hessian(self) -> Tensor:
        return self._seen.matrix * self.tokens if self.tokens else torch.zeros_like(self.cross)


def _chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, _CHUNK_TOKENS)


def _step(hessian: Tensor, cross: Tensor, damp: float) -> Tensor:
    """(C + d I) (H + d I)^-1 - I."""
    added = (damp * hessian.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(hessian + added * torch.eye(len(hessian), dtype=torch.float64))
    return torch.cholesky_solve((cross - hessian).T, factor).T


def _best_share(step: Tensor, held: _Sums) -> float:
    """Which part of `step` comes closest to the original inputs, of 0 to 1."""
    wanted = float((step * (held.cross - held.hessian)).sum())
    squares = float(((step @ held.hessian) * step).sum())
    return min(max(wanted / squares, 0.0), 1.0) if squares > 0 else 0.0
