"""The attention of the decoder in plain torch: projections, caches, softmax attention.

Three spellings of one meaning exist; the graph a target's parser takes decides which is traced:
"standard" becomes the ONNX 23 operators Attention and RMSNormalization, "primitive" attention only
operators of ONNX 20, for parsers and head widths that have no Attention, and "group-query" ONNX
Runtime's own operator (see `edgeattn.models.group_query`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from edgeattn.attention import SoftmaxVariant
from edgeattn.models.attention_variants import Tables, attend_variant
from edgeattn.models.group_query import KeyCounts, group_query_attention
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.linear import Linear
from edgeattn.models.packed_keys import PackedKeys
from edgeattn.models.rotary import apply_rotary
from edgeattn.models.static_cache import StaticKeys
from edgeattn.quant.kv_cache import Int8Cache, to_int8
from edgeattn.shape import ModelShape

OperatorForm = Literal["standard", "primitive", "group-query"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    form: OperatorForm,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention with grouped KV heads; scale 1 / sqrt(D).

    Args:
        q: `[B, H, T, D]`.
        k: `[B, Hkv, S, D]`; Hkv divides H.
        v: `[B, Hkv, S, D]`.
        mask: `[B, 1, T, S]` bool, True where a query sees a key; None where each sees all.
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
    if mask is not None:
        lowest = torch.finfo(torch.float32).min
        scores = torch.where(mask.unsqueeze(1), scores, lowest)
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def _joined(past: Tensor, new: Tensor, keys: Tensor | PackedKeys | StaticKeys) -> Tensor:
    """Past and new keys or values, one behind the other or as `keys` has them."""
    return torch.cat((past, new), dim=2) if isinstance(keys, Tensor) else keys.join(past, new)


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
        self, shape: ModelShape, form: OperatorForm, variant: SoftmaxVariant | None = None
    ) -> None:
        super().__init__()
        self.variant = variant
        self.tables = None if variant is None else Tables(variant, shape)
        self.heads = (shape.num_heads, shape.head_dim)
        self.kv_heads = (shape.num_kv_heads, shape.head_dim)
        self.form: OperatorForm = form
        self.softcap = shape.attention_softcap
        self.cache: Int8Cache | None = None
        self.output_gate = shape.output_gate
        assert not (shape.output_gate and shape.fused), "no family has both"
        self.sizes = [shape.q_size, shape.kv_size, shape.kv_size]
        self.fused = shape.fused
        if shape.fused:
            self.qkv_proj = Linear(shape.hidden_size, sum(self.sizes), bias=shape.qkv_bias)
        else:
            self.q_proj = Linear(
                shape.hidden_size,
                (2 if shape.output_gate else 1) * shape.q_size,
                bias=shape.qkv_bias,
            )
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
            The output `[B, T, hidden]` and the joined keys and values `[B, Hkv, P + T, D]`; in a
            static cache both are `[B, Hkv, C, D]`.
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
        q, k, v, gate = self._gated_heads_of(x, shared.rotary)
        if self.cache is not None:
            q, k = self.cache.rotate(q), self.cache.rotate(k)
            k, v = to_int8(k, self.cache.key_scale), to_int8(v, self.cache.value_scale)
        present = _joined(past[0], k, shared.keys), _joined(past[1], v, shared.keys)
        keys, values = present
        if self.cache is not None:
            keys = keys.to(q.dtype) * self.cache.key_scale
            values = values.to(q.dtype) * self.cache.value_scale
        y = self._attend(x, q, keys, values, shared.keys).transpose(1, 2).flatten(2)
        return (y if gate is None else y * torch.sigmoid(gate)), present

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor | PackedKeys | StaticKeys,
    ) -> Tensor:
        if self.variant is not None:
            assert self.tables is not None
            assert isinstance(keys, PackedKeys)
            arguments = (self.variant, self.tables, x, q, k, v, keys)
            return attend_variant(*arguments, training=self.training)
        mask = keys if isinstance(keys, Tensor) else keys.mask
        return attend(q, k, v, mask, self.form, self.softcap)

    def heads_of(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, T, D]`, keys and values `[B, Hkv, T, D]` of new tokens.

        Args:
            x: `[B, T, hidden]`.
            rotary: positions of queries and keys, see `LayerInputs`.
        """
        return self._gated_heads_of(x, rotary)[:3]

    def _gated_heads_of(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `heads_of`, and what the output's gate is a sigmoid of, `[B, T, H * D]`."""
        q, k, v, gate = self._project(x)
        q = torch.unflatten(q, -1, self.heads).transpose(1, 2)
        k = torch.unflatten(k, -1, self.kv_heads).transpose(1, 2)
        v = torch.unflatten(v, -1, self.kv_heads).transpose(1, 2)
        if rotary is None:
            return q, k, v, gate
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v, gate

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

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Q `[B, T, H * D]`, k and v `[B, T, Hkv * D]`, normed but not rotated, and the gate."""
        gate = None
        if self.fused:
            q, k, v = torch.split(self.qkv_proj(x), self.sizes, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.output_gate:
            pairs = torch.unflatten(q, -1, (self.heads[0], 2, self.heads[1]))
            q, gate = (part.flatten(2) for part in pairs.unbind(3))
        if self.qk_norm:
            q = self.q_norm(torch.unflatten(q, -1, self.heads)).flatten(2)
            k = self.k_norm(torch.unflatten(k, -1, self.kv_heads)).flatten(2)
        return q, k, v, gate

    def _group_query_inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `_project`; the stacked projection as it is where nothing is done to its parts."""
        if self.fused and not self.qk_norm:
            return self.qkv_proj(x), None, None
        assert not self.output_gate, "gated attention is never traced in the group-query form"
        return self._project(x)[:3]
