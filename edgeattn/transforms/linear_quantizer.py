"""Quantises the linear layers that read one input, from what that input is like on a text."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from edgeattn.calibration.store import StoredLinear
from edgeattn.quant.affine import QuantizedTensor, quantize_symmetric
from edgeattn.quant.gptq import Hessian, gptq
from edgeattn.quant.observer import Observer
from edgeattn.quant.refit import Drift, Refit
from edgeattn.quant.scheme import INT8_PER_CHANNEL, Scheme


class LinearQuantizer:
    """Counts in inputs, then quantises.

    Args:
        scheme: what to do.
        width: K, the inputs of the layers.
        scale_dtype: dtype of scales, the one the graph computes in.
    """

    def __init__(self, scheme: Scheme, width: int, scale_dtype: torch.dtype) -> None:
        self._scheme, self._scale_dtype = scheme, scale_dtype
        self._hessian = Hessian(width) if scheme.method == "gptq" and not scheme.refit else None
        self._drift = Drift(width) if scheme.refit else None  # has the Hessian, too
        self._observer = Observer() if scheme.activation_bits is not None else None

    def add(self, inputs: Tensor, exact: Tensor | None) -> None:
        """Counts in inputs.

        Args:
            inputs: `[..., K]`, what the layers read in the quantised network.
            exact: the same in the original network, for a scheme that refits weights.
        """
        if self._hessian is not None:
            self._hessian.add(inputs)
        if self._drift is not None:
            assert exact is not None
            self._drift.add(exact, inputs)
        if self._observer is not None:
            self._observer.add(inputs)

    def quantize(self, name: str, weight: Tensor, *, keep: bool = False) -> StoredLinear:
        """One of the layers.

        Args:
            name: of the layer.
            weight: `[outputs, K]`, floating point.
            keep: leave it at the next higher precision: int8 weights, inputs as they are.
        """
        format = INT8_PER_CHANNEL if keep else self._scheme.format_of(name)
        assert format is not None
        if self._refit is not None:
            weight = self._refit(weight)
        if self._scheme.method == "rtn" or format.bits == 8:
            quantized = quantize_symmetric(
                weight, format, clip=self._scheme.clip, scale_dtype=self._scale_dtype
            )
        else:
            quantized = self._gptq(weight, name)
        return StoredLinear(quantized, None if keep else self._input_scale)

    def _gptq(self, weight: Tensor, name: str) -> QuantizedTensor:
        scheme, format = self._scheme, self._scheme.format_of(name)
        assert format is not None
        return gptq(
            weight,
            self._hessian_matrix,
            format,
            clip=scheme.clip,
            scale_dtype=self._scale_dtype,
            act_order=scheme.act_order,
        )

    @functools.cached_property
    def _refit(self) -> Refit | None:
        if self._drift is None:
            return None
        drift, self._drift = self._drift, None
        return drift.finish()

    @functools.cached_property
    def _hessian_matrix(self) -> Tensor:
        if self._refit is not None:
            return self._refit.hessian
        assert self._hessian is not None
        return self._hessian.matrix

    @functools.cached_property
    def _input_scale(self) -> float | None:
        if self._observer is None:
            return None
        return self._observer.scale(self._scheme.range, self._scale_dtype)
