"""Weights that make up for what the layers before have lost, before they are rounded themselves.

A quantised network gives a linear layer other inputs x than the original one, x'. Of all weights V,
those that come closest to the original outputs W x' from what they are given, that is the least
mean |V x - W x'|^2, are

    V = W C H^-1,    C = mean of x' x^T,    H = mean of x x^T

(least squares), and rounding V to Q then costs tr (V - Q) H (V - Q)^T more, which is what GPTQ
makes small. The same aim, reached column by column instead of at once: arXiv 2504.02692.

Few tokens tell little of K^2 numbers. A quarter of them is held out, to see how far the step from W
to V leads the right way for the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeattn.quant.gptq import damped_cholesky
from edgeattn.quant.observer import not_finite

# Share of the tokens that come at once.
_HELD_OUT = 0.25
# Tokens multiplied in fp32; the products are summed in fp64.
_CHUNK_TOKENS = 2048


class Drift:
    """How the inputs of a linear layer have moved away from the original network's.

    Args:
        size: K, the inputs of the layer.
    """

    def __init__(self, size: int) -> None:
        self._fitted = _Sums(size, torch.float64)
        # They decide about one number, for which fp32 will do.
        self._held = _Sums(size, torch.float32)

    def add(self, exact: Tensor, seen: Tensor) -> None:
        """Counts in inputs `[..., K]` of the original network, and what the layer gets instead.

        Raises:
            RuntimeInputError: NaN, infinity, or numbers whose products overflow fp32.
        """
        exact, seen = (x.reshape(-1, x.shape[-1]).float() for x in (exact, seen))
        held = int(_HELD_OUT * len(seen))
        self._held.add(exact[:held], seen[:held])
        self._fitted.add(exact[held:], seen[held:])

    def finish(self, *, damp: float = 0.01) -> Refit:
        """What all tokens tell; nothing can be added then.

        Args:
            damp: share of the mean of H's diagonal that is added to the diagonals of H and C.

        Raises:
            RuntimeInputError: H is far from positive semidefinite.
        """
        fitted, held = self._fitted, self._held
        part = fitted.step(damp)
        fitted.hessian += held.hessian
        fitted.cross += held.cross
        whole = fitted.step(damp)
        held.cross -= held.hessian
        mean = fitted.hessian.div_(fitted.tokens + held.tokens)
        return Refit(mean, whole, part, held.cross, held.hessian)


class Refit:
    """Moves weights from W towards V.

    Attributes:
        hessian: H, `[K, K]` fp64.
    """

    def __init__(
        self, hessian: Tensor, step: Tensor, judged: Tensor, wanted: Tensor, squares: Tensor
    ) -> None:
        self.hessian = hessian
        self._step = step  # C H^-1 - I, of all tokens
        self._judged = judged  # the same without those held out, of which
        self._wanted, self._squares = wanted, squares  # C - H, and H

    def __call__(self, weight: Tensor) -> Tensor:
        """`[outputs, K]` -> `[outputs, K]` fp32, as far towards V as the tokens held out say."""
        weight = weight.float()
        return weight + self._share(weight) * (weight @ self._step)

    def _share(self, weight: Tensor) -> float:
        """The part of the step, 0 to 1, that makes the least error of outputs held out."""
        move = weight @ self._judged
        gain = float((move * (weight @ self._wanted)).sum(dtype=torch.float64))
        squares = float((move * (move @ self._squares)).sum(dtype=torch.float64))
        return min(max(gain / squares, 0.0), 1.0) if squares > 0 else 0.0


class _Sums:
    """Sums of x x^T and x' x^T over tokens."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(size, size, dtype=dtype)
        self.cross = torch.zeros(size, size, dtype=dtype)

    def add(self, exact: Tensor, seen: Tensor) -> None:
        for x, y in zip(_chunks(exact), _chunks(seen), strict=True):
            hessian, cross = y.T @ y, x.T @ y
            if not (hessian.sum() + cross.sum()).isfinite():
                raise not_finite("some hold NaN, infinity or numbers whose squares overflow")
            self.hessian += hessian
            self.cross += cross
            self.tokens += len(y)

    def step(self, damp: float) -> Tensor:
        """(C + d I) (H + d I)^-1 - I, `[K, K]` fp32."""
        if not self.tokens:
            return torch.zeros_like(self.cross, dtype=torch.float32)
        factor = damped_cholesky(self.hessian, damp)
        return torch.cholesky_solve((self.cross - self.hessian).T, factor).T.float()


def _chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, _CHUNK_TOKENS)
