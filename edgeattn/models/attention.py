"""The attention of the decoder in plain torch: rotary positions, mask, cached softmax attention.

Two spellings of one meaning exist; the graph a target's parser takes decides which is traced:
"standard" becomes the ONNX 23 operators Attention and RMSNormalization, "primitive" attention only
operators of ONNX 20, for parsers and head widths that have no Attention.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from edgeattn.shape import ModelShape, RopeScaling

OperatorForm = Literal["standard", "primitive"]


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Rotary frequencies in radians per position, `[head_dim / 2]`, fp32.

    The llama3 stretch follows the formula published with Llama 3.1: wavelengths longer than
    original_context / low_freq_factor are stretched by `factor`, those shorter than
    original_context / high_freq_factor are kept, and those between are interpolated.
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponent
    scaling = shape.rope_scaling
    return frequencies if scaling.kind == "none" else _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotary_caches(
    inv_freq: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[B, 1, T, D/2]` of each position; the angle is computed in fp32.

    Args:
        inv_freq: `[D/2]` radians per position.
        position_ids: `[B, T]` integer positions.
        dtype: of the result.
    """
    angle = position_ids.unsqueeze(1).unsqueeze(3).to(inv_freq.dtype) * inv_freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of `x` `[B, H, T, D]` (the "rotate half" layout of ONNX)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_mask(attention_mask: Tensor, query_len: int) -> Tensor:
    """Which keys each query sees, `[B, 1, T, S]` bool.

    A query sees valid keys up to its own place; its own place always, so that a padding row is
    never empty (softmax of an empty row is NaN in some runtimes and would spread).

    Args:
        attention_mask: `[B, S]`, 1 at valid keys, past and new.
        query_len: T; the queries are the last T of the S places.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device).unsqueeze(0)
    places = torch.arange(query_len, device=attention_mask.device).unsqueeze(1)
    places = places + (total - query_len)
    visible = (keys <= places) & attention_mask.unsqueeze(1).to(torch.bool)
    return (visible | (keys == places)).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, form: OperatorForm) -> Tensor:
    """Softmax attention with grouped KV heads; scale 1 / sqrt(D).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hkv, S, D]`; Hkv divides H.
        v: `[B, Hkv, S, D]`.
        mask: `[B, 1, T, S]` bool, True where a query sees a key.
        form: see module docstring.

    Returns:
        `[B, H, T, D]`.
    """
    if form == "standard":
        shared = q.shape[1] != k.shape[1]  # the exporter refuses enable_gqa for equal heads
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=shared
        )
    batch, heads, length, width = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], length, width)
    # Scaling the queries, not the scores, keeps fp16 scores inside the range.
    scores = (grouped * width**-0.5) @ k.unsqueeze(2).transpose(-1, -2)
    lowest = torch.finfo(torch.float32).min
    scores = torch.where(mask.unsqueeze(1), scores.float(), lowest)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32.

    Source: ONNX RMSNormalization-23 with stash_type 1; in low precision the gain is applied in fp32
    too by the primitive spelling, which rounds once less.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> `[..., size]`."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Self attention over past and new keys; parameter names are Hugging Face's."""

    def __init__(self, shape: ModelShape, form: OperatorForm) -> None:
        super().__init__()
        self.heads = (shape.num_heads, shape.head_dim)
        self.kv_heads = (shape.num_kv_heads, shape.head_dim)
        self.form: OperatorForm = form
        self.q_proj = nn.Linear(shape.hidden_size, shape.q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.q_size, shape.hidden_size, bias=False)
        if shape.qk_norm:
            self.q_norm: nn.Module = RMSNorm(shape.head_dim, shape.norm_eps)
            self.k_norm: nn.Module = RMSNorm(shape.head_dim, shape.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attends from the new tokens to past and new ones.

        Args:
            x: `[B, T, hidden]`.
            cos: `[B, 1, T, D/2]`.
            sin: `[B, 1, T, D/2]`.
            mask: `[B, 1, T, P + T]` bool.
            past: keys (rotated) and values, each `[B, Hkv, P, D]`.

        Returns:
            The output `[B, T, hidden]` and the joined keys and values `[B, Hkv, P + T, D]`.
        """
        q = self.q_norm(self.q_proj(x).unflatten(-1, self.heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, self.kv_heads)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, self.kv_heads).transpose(1, 2)
        keys = torch.cat((past[0], apply_rotary(k, cos, sin)), dim=2)
        values = torch.cat((past[1], v), dim=2)
        y = attend(apply_rotary(q, cos, sin), keys, values, mask, self.form)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (keys, values)
