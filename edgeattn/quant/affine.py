"""Symmetric quantisation of weight matrices as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeattn.quant.scheme import Clip, WeightFormat
from edgeattn.quant.threads import for_each

# Scales tried by the clipping search, as fractions of the one that maps the largest weight to the
# largest integer: first a coarse grid by squared error, then its neighbourhood by the 2.375-norm,
# which minds outliers a little more (GPTQ's implementations use 2.4 for the same purpose).
_COARSE_FRACTIONS = tuple(1.0 - 0.03 * i for i in range(17))
_FINE_STEPS = tuple(0.01 * i for i in range(-4, 5))
# Weights searched at once: small enough that the temporaries stay in a core's cache.
_CHUNK_WEIGHTS = 1 << 17


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix as integers and scales.

    Attributes:
        qdata: `[outputs, inputs]` int8, within the format's range.
        scale: `[outputs, inputs / group_size]`, or `[outputs, 1]` per channel, floating point.
        format: bits and group size.
    """

    qdata: Tensor
    scale: Tensor
    format: WeightFormat

    def dequantize(self) -> Tensor:
        """`[outputs, inputs]` in the dtype of the scales, multiplied once, as ONNX defines it."""
        groups = self.qdata.view(*self.scale.shape, -1).to(self.scale.dtype)
        return (groups * self.scale.unsqueeze(-1)).view(self.qdata.shape)


def quantize_symmetric(
    weight: Tensor,
    format: WeightFormat,
    *,
    clip: Clip,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """Round-to-nearest quantisation.

    Scales are rounded to `scale_dtype` before the weights are divided by them, so that the integers
    are the best ones for the scales that are stored.

    Args:
        weight: `[outputs, inputs]`, floating point.
        format: bits and group size; the group divides `inputs`.
        clip: "max" or "mse", see `Scheme.clip`.
        scale_dtype: dtype the scales are stored in.
    """
    group = format.group_size or weight.shape[1]
    rows = weight.shape[0]
    grouped = weight.reshape(-1, group)
    qdata = torch.empty(grouped.shape, dtype=torch.int8)
    scale = torch.empty(grouped.shape[0], 1, dtype=scale_dtype)
    step = max(1, _CHUNK_WEIGHTS // group)

    def quantize_rows(start: int) -> None:
        part = grouped[start : start + step].float()
        chosen = choose_scale(part, format, clip=clip, scale_dtype=scale_dtype)
        scale[start : start + step] = chosen
        qdata[start : start + step] = quantize(part, chosen.float(), format)

    for_each(quantize_rows, range(0, grouped.shape[0], step))
    return QuantizedTensor(qdata.view(rows, -1), scale.view(rows, -1), format)


def choose_scale(
    groups: Tensor,
    format: WeightFormat,
    *,
    clip: Clip,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One positive scale per row of `groups` `[n, group]` fp32, as `[n, 1]` in `scale_dtype`.

    A scale that rounds to zero (a row of zeros, or of weights far below the dtype) becomes the
    smallest normal number: TensorRT demands positive scales.
    """
    largest = groups.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    fraction = _best_fraction(groups, largest, format) if clip == "mse" else 1.0
    scale = (largest * fraction / format.high).to(scale_dtype)
    return torch.where(scale > 0, scale, torch.finfo(scale_dtype).tiny)


def _best_fraction(groups: Tensor, largest: Tensor, format: WeightFormat) -> Tensor:
    """Per row the fraction of `largest` whose scale gives the least error, `[n, 1]`.

    Rows are first normalised so that each coarse candidate is one number for all rows: scalars
    vectorise several times better than a broadcast column.
    """
    normalised = groups * (format.high / largest)
    buffer, root = torch.empty_like(normalised), torch.empty_like(normalised)
    coarse = torch.ones_like(largest)
    least = torch.full_like(largest, torch.inf)
    for fraction in _COARSE_FRACTIONS:
        torch.mul(normalised, 1 / fraction, out=buffer)
        buffer.round_().clamp_(format.low, format.high)
        torch.add(normalised, buffer, alpha=-fraction, out=buffer)
        error = torch.linalg.vector_norm(buffer, dim=1, keepdim=True)
        coarse[error < least] = fraction
        least = torch.minimum(least, error)
    best = coarse
    least = torch.full_like(largest, torch.inf)
    for step in _FINE_STEPS:
        fractions = coarse + step
        torch.div(normalised, fractions, out=buffer)
        buffer.round_().clamp_(format.low, format.high).mul_(fractions)
        torch.sub(normalised, buffer, out=buffer)
        # x ** 2.375 as x ** (2 + 1/4 + 1/8): a power would take most of the search's time.
        torch.sqrt(buffer.abs_(), out=root).sqrt_()
        buffer.square_().mul_(root).mul_(root.sqrt_())
        error = buffer.sum(dim=1, keepdim=True)
        best = torch.where(error < least, fractions, best)
        least = torch.minimum(least, error)
    return best


def quantize(groups: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """round(groups / scale) clamped to the format's range, int8; ties to even, as in ONNX."""
    return (groups / scale).round_().clamp_(format.low, format.high).to(torch.int8)
