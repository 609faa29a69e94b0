"""Which int8 scale suits numbers that are seen a part at a time, as those of a calibration text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.quant.activation import INT8_HIGH
from edgeattn.quant.scheme import Clip

_BINS = 4096
# torch counts in fp32: beyond 2^24 in one bin a further number would add nothing.
_MOST_COUNTED = 2**24
# Scales tried by "mse", as shares of the one that clips nothing; the least is some 2 bins wide.
_SHARES = torch.logspace(-1, 0, 60, dtype=torch.float64)
# A scale must not be 0 in any dtype, whatever was seen.
_LEAST_SCALE = 1e-6


class Observer:
    """A histogram of magnitudes, whose range grows with what is seen."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._range = 0.0  # where the last bin ends
        self._largest = 0.0

    def add(self, x: Tensor) -> None:
        """Counts numbers of any shape.

        Raises:
            RuntimeInputError: NaN or infinity among them.
        """
        largest = float(x.abs().amax()) if x.numel() else 0.0
        if not math.isfinite(largest):
            raise not_finite("some are NaN or infinite")
        if largest == 0:
            self._counts[0] += x.numel()
            return
        self._largest = max(self._largest, largest)
        self._widen(largest)
        for part in torch.split(x.abs().float().flatten(), _MOST_COUNTED):
            self._counts += torch.histc(part, _BINS, 0, self._range).double()

    def _widen(self, largest: float) -> None:
        """Doubles the range until it holds `largest`; two bins become one each time."""
        if self._range == 0:
            self._range = largest
        while self._range < largest:
            pairs = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat((pairs, torch.zeros_like(pairs)))
            self._range *= 2

    def scale(self, clip: Clip, dtype: torch.dtype = torch.float32) -> float:
        """The scale of symmetric int8, a number of `dtype`.

        Args:
            clip: "max" maps the largest magnitude to 127, "mse" clips it where that makes the mean
                squared error of all numbers less.
            dtype: in which the graph stores it.
        """
        whole = max(self._largest / INT8_HIGH, _LEAST_SCALE)
        share = 1.0 if clip == "max" else self._best_share(whole)
        # Positive and finite in the graph, too.
        limits = torch.finfo(dtype)
        scale = min(max(share * whole, _LEAST_SCALE, limits.tiny), limits.max)
        return float(torch.tensor(scale).to(dtype))

    def _best_share(self, whole: float) -> float:
        seen = self._counts.nonzero().squeeze(1)
        values = (seen.double() + 0.5) * (self._range / _BINS)
        scales = (_SHARES * whole).unsqueeze(1)
        rounded = (values / scales).round().clamp(max=INT8_HIGH) * scales
        errors = ((rounded - values).square() * self._counts[seen]).sum(1)
        return float(_SHARES[errors.argmin()])


def not_finite(came: str) -> RuntimeInputError:
    """The error for activations that tell nothing of how to quantise.

    Args:
        came: what is wrong with them, as a clause.
    """
    return RuntimeInputError(
        expected="finite activations, to calibrate on",
        came=came,
        todo="check that the model gives finite results in fp32 on the calibration text",
    )
