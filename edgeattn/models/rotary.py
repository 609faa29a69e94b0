"""Rotary positions: frequencies, their sines and cosines, and what they do to queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgeattn.encoder_shape import AnyShape
from edgeattn.shape import Rope, RopeScaling


def inverse_frequencies(rope: Rope) -> Tensor:
    """Rotary frequencies in radians per position, `[rope.dim / 2]`, fp32.

    The llama3 stretch follows the formula published with Llama 3.1: wavelengths longer than
    original_context / low_freq_factor are divided by the factor, those shorter than
    original_context / high_freq_factor are kept, and those between are interpolated.
    """
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    frequencies = 1.0 / rope.theta**exponent
    scaling = rope.scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.divisors) * rope.theta**exponent)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotary_caches(
    rope: Rope, inv_freq: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, T, rope.dim / 2]` of each position; the angle is computed in fp32.

    Args:
        rope: for the magnitude.
        inv_freq: `[rope.dim / 2]` radians per position.
        position_ids: `[B, T]` integer positions.
        dtype: of the result.
    """
    angle = position_ids.unsqueeze(1).unsqueeze(3).to(inv_freq.dtype) * inv_freq
    cos, sin = angle.cos(), angle.sin()
    if rope.scaling.magnitude != 1:
        cos, sin = cos * rope.scaling.magnitude, sin * rope.scaling.magnitude
    return cos.to(dtype), sin.to(dtype)


def rotary_tables(rope: Rope, places: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[places, rope.dim / 2]` of every position up to `places`."""
    positions = torch.arange(places).unsqueeze(0)
    cos, sin = rotary_caches(rope, inverse_frequencies(rope), positions, dtype)
    return cos[0, 0], sin[0, 0]


def rotary_buffers(
    shape: AnyShape, *, by_position: bool, context: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The constants of rotary positions, by their names in the decoder and in the graph.

    Args:
        shape: the architecture.
        by_position: tables by position, as the group-query form takes them, not frequencies.
        context: positions of a table.
        dtype: of a table; frequencies are fp32.
    """
    found = {}
    for i, rope in enumerate(shape.ropes):
        if by_position:
            found[f"cos_cache_{i}"], found[f"sin_cache_{i}"] = rotary_tables(rope, context, dtype)
        else:
            found[f"inv_freq_{i}"] = inverse_frequencies(rope)
    return found


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + R/2) of the first R = 2 cos.shape[-1] elements of each head.

    This is the "rotate half" layout of ONNX RotaryEmbedding; `x` is `[B, H, T, D]`.
    """
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
