"""The attention of the decoder in plain torch: rotary positions, mask, cached softmax attention.

Three spellings of one meaning exist; the graph a target's parser takes decides which is traced:
"standard" becomes the ONNX 23 operators Attention and RMSNormalization, "primitive" attention only
operators of ONNX 20, for parsers and head widths that have no Attention, and "group-query" ONNX
Runtime's own operator (see `edgeattn.models.group_query`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgeattn.attention import LayerAttention
from edgeattn.models.attention_variants import Tables, attend_variant
from edgeattn.models.group_query import KeyCounts, count_keys, group_query_attention
from edgeattn.models.linear import Linear
from edgeattn.models.packed_keys import PackedKeys, pack_keys
from edgeattn.quant.kv_cache import Int8Cache, to_int8
from edgeattn.shape import LayerKind, ModelShape, Rope, RopeScaling

OperatorForm = Literal["standard", "primitive", "group-query"]


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
    shape: ModelShape, form: OperatorForm, *, context: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The constants of rotary positions, by their names in the decoder and in the graph.

    Args:
        shape: the architecture.
        form: "group-query" takes tables by position, the others frequencies.
        context: positions of a table.
        dtype: of a table; frequencies are fp32.
    """
    found = {}
    for i, rope in enumerate(shape.ropes):
        if form == "group-query":
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


def causal_mask(attention_mask: Tensor, query_len: int, window: int | None = None) -> Tensor:
    """Which keys each query sees, `[B, 1, T, S]` bool.

    A query sees valid keys up to its own place, the last `window` of them; its own place always, so
    that a padding row is never empty (softmax of an empty row is NaN in some runtimes and would
    spread). Distance is counted in valid keys, so that padding does not shorten the window.

    Args:
        attention_mask: `[B, S]`, 1 at valid keys, past and new.
        query_len: T; the queries are the last T of the S places.
        window: keys a query sees, itself included; None for all.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device).unsqueeze(0)
    places = torch.arange(query_len, device=attention_mask.device).unsqueeze(1)
    places = places + (total - query_len)
    visible = (keys <= places) & attention_mask.unsqueeze(1).to(torch.bool)
    if window is not None:
        order = attention_mask.cumsum(1)
        own = order[:, total - query_len :]
        visible = visible & (order.unsqueeze(1) > own.unsqueeze(2) - window)
    return (visible | (keys == places)).unsqueeze(1)


@dataclass(frozen=True)
class LayerInputs:
    """What the layers of one kind share in a step, beside the residual stream and their caches.

    Attributes:
        rotary: cosine and sine, each `[B, 1, T, R/2]`, or in the group-query form `[C, R/2]` by
            position; None for a layer without.
        keys: which keys are seen: a mask `[B, 1, T, S]`, counts in the group-query form, or where
            they lie in a packed cache, which models with an attention variant have.
    """

    rotary: tuple[Tensor, Tensor] | None
    keys: Tensor | KeyCounts | PackedKeys


def layer_inputs(
    shape: ModelShape,
    inv_freq: Sequence[Tensor],
    attention_mask: Tensor,
    position_ids: Tensor,
    *,
    dtype: torch.dtype,
) -> dict[LayerKind, LayerInputs]:
    """The shared inputs of every kind of layer in `shape`, in the forms with a mask.

    Args:
        shape: the architecture.
        inv_freq: frequencies of each of `shape.ropes`.
        attention_mask: `[B, S]`.
        position_ids: `[B, T]`.
        dtype: of activations.
    """
    rotary = {
        rope: rotary_caches(rope, frequencies, position_ids, dtype)
        for rope, frequencies in zip(shape.ropes, inv_freq, strict=True)
    }
    length, windows = position_ids.shape[1], {kind.window for kind in shape.layer_kinds}
    keys_of = pack_keys if shape.has_variants else causal_mask
    masks = {window: keys_of(attention_mask, length, window) for window in windows}
    return {
        kind: LayerInputs(rotary[kind.rope] if kind.rope else None, masks[kind.window])
        for kind in shape.layer_kinds
    }


def group_query_inputs(
    shape: ModelShape, tables: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor
) -> dict[LayerKind, LayerInputs]:
    """The shared inputs of every kind of layer in the group-query form.

    Args:
        shape: the architecture.
        tables: cosine and sine by position of each of `shape.ropes`.
        attention_mask: `[B, S]`.
    """
    assert not shape.has_windows, "GroupQueryAttention is not used for sliding windows"
    rotary = dict(zip(shape.ropes, tables, strict=True))
    counts = count_keys(attention_mask)
    return {
        kind: LayerInputs(rotary[kind.rope] if kind.rope else None, counts)
        for kind in shape.layer_kinds
    }


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, form: OperatorForm, softcap: float | None = None
) -> Tensor:
    """Softmax attention with grouped KV heads; scale 1 / sqrt(D).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hkv, S, D]`; Hkv divides H.
        v: `[B, Hkv, S, D]`.
        mask: `[B, 1, T, S]` bool, True where a query sees a key.
        form: "standard" or "primitive", see module docstring.
        softcap: bound c of the scores, c tanh(s / c); always spelled out, for TensorRT ignores
            the attribute of ONNX's Attention.

    Returns:
        `[B, H, T, D]`.
    """
    if form == "standard" and softcap is None:
        shared = q.shape[1] != k.shape[1]  # the exporter refuses enable_gqa for equal heads
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=shared
        )
    batch, heads, length, width = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], length, width)
    # Scaling the queries, not the scores, keeps fp16 scores inside the range.
    scores = ((grouped * width**-0.5) @ k.unsqueeze(2).transpose(-1, -2)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(torch.float32).min
    scores = torch.where(mask.unsqueeze(1), scores, lowest)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def _joined(past: Tensor, new: Tensor, keys: Tensor | PackedKeys) -> Tensor:
    """Past and new keys or values, slot by slot or packed."""
    if isinstance(keys, PackedKeys):
        return keys.join(past, new)
    return torch.cat((past, new), dim=2)


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
    """Self attention over past and new keys; parameter names are Hugging Face's.

    Attributes:
        cache: int8 format of past and present; None holds them as they are computed. A traced layer
            holds them so, the exporter inserts the rest.

    Args:
        shape: of the model.
        form: spelling of softmax attention.
        variant: what computes attention instead of softmax.
    """

    def __init__(
        self, shape: ModelShape, form: OperatorForm, variant: LayerAttention | None = None
    ) -> None:
        super().__init__()
        self.variant = variant
        self.tables = None if variant is None else Tables(variant, shape)
        self.heads = (shape.num_heads, shape.head_dim)
        self.kv_heads = (shape.num_kv_heads, shape.head_dim)
        self.form: OperatorForm = form
        self.softcap = shape.attention_softcap
        self.cache: Int8Cache | None = None
        self.sizes = [shape.q_size, shape.kv_size, shape.kv_size]
        self.fused = shape.fused
        if shape.fused:
            self.qkv_proj = Linear(shape.hidden_size, sum(self.sizes), bias=shape.qkv_bias)
        else:
            self.q_proj = Linear(shape.hidden_size, shape.q_size, bias=shape.qkv_bias)
            self.k_proj = Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
            self.v_proj = Linear(shape.hidden_size, shape.kv_size, bias=shape.qkv_bias)
        self.o_proj = Linear(shape.q_size, shape.hidden_size)
        self.qk_norm = shape.qk_norm
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attends from the new tokens to past and new ones.

        Args:
            x: `[B, T, hidden]`.
            shared: rotary positions and visible keys.
            past: keys (rotated) and values, each `[B, Hkv, P, D]`.

        Returns:
            The output `[B, T, hidden]` and the joined keys and values `[B, Hkv, P + T, D]`.
        """
        y, present = self.mix(x, shared, past)
        return self.o_proj(y), present

    def mix(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `forward`, without the output projection: `[B, T, H * D]`, and the joined cache."""
        if isinstance(shared.keys, KeyCounts):
            assert self.cache is None, "GroupQueryAttention holds its cache as computed"
            return group_query_attention(
                self._group_query_inputs(x),
                past,
                shared.rotary,
                shared.keys,
                heads=self.heads[0],
                softcap=self.softcap,
            )
        q, k, v = self.heads_of(x, shared.rotary)
        if self.cache is not None:
            q, k = self.cache.rotate(q), self.cache.rotate(k)
            k, v = to_int8(k, self.cache.key_scale), to_int8(v, self.cache.value_scale)
        present = _joined(past[0], k, shared.keys), _joined(past[1], v, shared.keys)
        keys, values = present
        if self.cache is not None:
            keys = keys.to(q.dtype) * self.cache.key_scale
            values = values.to(q.dtype) * self.cache.value_scale
        y = self._attend(x, q, keys, values, shared.keys)
        return y.transpose(1, 2).flatten(2), present

    def _attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | PackedKeys
    ) -> Tensor:
        if self.variant is not None:
            assert self.tables is not None
            assert isinstance(keys, PackedKeys)
            return attend_variant(self.variant, self.tables, x, q, k, v, keys)
        mask = keys.mask if isinstance(keys, PackedKeys) else keys
        return attend(q, k, v, mask, self.form, self.softcap)

    def heads_of(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, D]`, keys and values `[B, Hkv, T, D]` of new tokens.

        Args:
            x: `[B, T, hidden]`.
            rotary: positions of queries and keys, see `LayerInputs`.
        """
        q, k, v = self._project(x)
        q = torch.unflatten(q, -1, self.heads).transpose(1, 2)
        k = torch.unflatten(k, -1, self.kv_heads).transpose(1, 2)
        v = torch.unflatten(v, -1, self.kv_heads).transpose(1, 2)
        if rotary is None:
            return q, k, v
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def no_past(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values before the first token, `[rows, Hkv, 0, D]` each.

        Args:
            rows: B.
            dtype: of activations, which a cache has that is not int8.
        """
        heads, width = self.kv_heads
        held = dtype if self.cache is None else torch.int8
        empty = torch.zeros(rows, heads, 0, width, dtype=held, device=self.o_proj.weight.device)
        return empty, empty

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q `[B, T, H * D]`, k and v `[B, T, Hkv * D]`, normalised but not rotated."""
        if self.fused:
            q, k, v = torch.split(self.qkv_proj(x), self.sizes, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm:
            q = self.q_norm(torch.unflatten(q, -1, self.heads)).flatten(2)
            k = self.k_norm(torch.unflatten(k, -1, self.kv_heads)).flatten(2)
        return q, k, v

    def _group_query_inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `_project`; the stacked projection as it is where nothing is done to its parts."""
        if self.fused and not self.qk_norm:
            return self.qkv_proj(x), None, None
        return self._project(x)
