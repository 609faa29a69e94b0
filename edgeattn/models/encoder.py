"""The one encoder definition: what PyTorch runs, what is traced, and what ONNX is compared with.

Every token sees every other that is no padding. What comes out depends on the shape's task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.attention import Lion
from edgeattn.encoder_shape import EncoderShape, PatchInput, TokenInput
from edgeattn.models.attention import OperatorForm, RMSNorm, attend
from edgeattn.models.linear import Linear
from edgeattn.models.lion import (
    attend_lion,
    log_decay_of_heads,
    log_decay_of_tokens,
    no_log_decay,
)
from edgeattn.models.rotary import apply_rotary, rotary_buffers, rotary_caches
from edgeattn.shape import LayerKind, Rope

Rotary = tuple[Tensor, Tensor]
# Below this a vector has no direction (torch.nn.functional.normalize).
_SHORTEST = 1e-12


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder gives.

    Attributes:
        output: of the shape's task: token states `[B, T, hidden]`, normalised vectors
            `[B, hidden]`, or logits `[B, labels]`.
        hidden: the residual stream before layer 0 and after each layer, `[B, T, hidden]`.
    """

    output: Tensor
    hidden: tuple[Tensor, ...]


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Which keys each query sees, `[B, 1, T, T]` bool, from a mask `[B, T]` of valid places.

    Its own place always, so that no row is empty (see `layer_inputs.causal_mask`).
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    own = places.unsqueeze(0) == places.unsqueeze(1)
    return (attention_mask.to(torch.bool).unsqueeze(1) | own).unsqueeze(1)


class EncoderAttention(nn.Module):
    """Self attention without a cache; parameter names are those of the decoder's."""

    def __init__(self, shape: EncoderShape, form: OperatorForm, kind: LayerKind) -> None:
        super().__init__()
        self.form: OperatorForm = form
        self.lion = kind.attention if isinstance(kind.attention, Lion) else None
        self.heads = (shape.num_heads, shape.head_dim)
        self.kv_heads = (shape.num_kv_heads, shape.head_dim)
        d, bias = shape.hidden_size, shape.qkv_bias
        self.q_proj = Linear(d, shape.q_size, bias=bias)
        self.k_proj = Linear(d, shape.kv_size, bias=bias)
        self.v_proj = Linear(d, shape.kv_size, bias=bias)
        if self.lion is not None and self.lion.variant == "s":
            self.gate_proj = Linear(d, shape.num_heads, bias=True)
        if self.lion is not None and self.lion.variant == "d":
            self.decay = nn.Parameter(torch.zeros(shape.num_heads))
        self.o_proj = Linear(shape.q_size, d, bias=shape.bias)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None) -> Tensor:
        """Attends from every token to every one that is seen.

        Args:
            x: `[B, T, hidden]`.
            mask: of keys that are seen, `[B, 1, T, T]` bool, of a LION layer `[B, T]`; None where
                there is no padding.
            rotary: cosine and sine `[1, 1, T, R/2]`; None for a layer without.
        """
        q = torch.unflatten(self.q_proj(x), -1, self.heads).transpose(1, 2)
        k = torch.unflatten(self.k_proj(x), -1, self.kv_heads).transpose(1, 2)
        v = torch.unflatten(self.v_proj(x), -1, self.kv_heads).transpose(1, 2)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.lion is None:
            y = attend(q, k, v, mask, self.form)
        else:
            decay = self._log_decay(x)
            y = attend_lion(self.lion, q, k, v, decay, mask, differentiable=self.training)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return output

    def _log_decay(self, x: Tensor) -> Tensor:
        """Of a LION layer, fp32 `[B, H, T]`."""
        assert self.lion is not None
        if self.lion.variant == "s":
            return log_decay_of_tokens(self.gate_proj(x))
        if self.lion.variant == "d":
            return log_decay_of_heads(self.decay, x)
        return no_log_decay(x, self.heads[0])


class EncoderMLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x))."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.activation, self.gated = shape.activation, shape.gated
        narrow, wide, bias = shape.hidden_size, shape.intermediate_size, shape.bias
        if shape.gated:
            self.gate_proj = Linear(narrow, wide, bias=bias)
        self.up_proj = Linear(narrow, wide, bias=bias)
        self.down_proj = Linear(wide, narrow, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`."""
        up = self.up_proj(x)
        wide = self._activate(self.gate_proj(x)) * up if self.gated else self._activate(up)
        down: Tensor = self.down_proj(wide)
        return down

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return nn.functional.silu(x)
        if self.activation == "relu":
            return nn.functional.relu(x)
        tanh = self.activation == "gelu-tanh"
        return nn.functional.gelu(x, approximate="tanh" if tanh else "none")


class EncoderLayer(nn.Module):
    """One transformer block, its norms before attention and MLP or behind their sums."""

    def __init__(self, shape: EncoderShape, form: OperatorForm, kind: LayerKind) -> None:
        super().__init__()
        self.pre_norm, self.layer_scale = shape.pre_norm, shape.layer_scale
        if shape.pre_norm:
            self.input_layernorm = norm_of(shape)
        self.self_attn = EncoderAttention(shape, form, kind)
        self.post_attention_layernorm = norm_of(shape)
        self.mlp = EncoderMLP(shape)
        if not shape.pre_norm:
            self.post_mlp_layernorm = norm_of(shape)
        if shape.layer_scale:
            self.attention_scale = nn.Parameter(torch.ones(shape.hidden_size))
            self.mlp_scale = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None) -> Tensor:
        """See `EncoderAttention.forward`; returns the residual stream `[B, T, hidden]`."""
        if not self.pre_norm:
            x = self.post_attention_layernorm(x + self._attention(x, mask, rotary))
            normed: Tensor = self.post_mlp_layernorm(x + self._mlp(x))
            return normed
        x = x + self._attention(self.input_layernorm(x), mask, rotary)
        return x + self._mlp(self.post_attention_layernorm(x))

    def _attention(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None) -> Tensor:
        y: Tensor = self.self_attn(x, mask, rotary)
        return y * self.attention_scale if self.layer_scale else y

    def _mlp(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        return y * self.mlp_scale if self.layer_scale else y


class Encoder(nn.Module):
    """An encoder whose layers and options come from an `EncoderShape`.

    Args:
        shape: the architecture.
        form: spelling of attention, "standard" or "primitive".
    """

    def __init__(self, shape: EncoderShape, *, form: OperatorForm = "standard") -> None:
        super().__init__()
        self.shape = shape
        if isinstance(shape.input, PatchInput):
            self._add_patches(shape.input)
        else:
            self._add_tokens(shape.input)
        kinds = [shape.layer_kind(i) for i in range(shape.num_layers)]
        self.layers = nn.ModuleList(EncoderLayer(shape, form, kind) for kind in kinds)
        self.norm = norm_of(shape) if shape.pre_norm else nn.Identity()
        if shape.task == "classification":
            both = shape.head == "first-and-mean"
            inputs = (2 if both else 1) * shape.hidden_size
            if shape.head == "pooler":
                self.pooler = nn.Linear(shape.hidden_size, shape.hidden_size)
            self.classifier = nn.Linear(inputs, shape.num_labels)
        self.reset_rotary(torch.get_default_dtype())

    def _add_tokens(self, read: TokenInput) -> None:
        width = self.shape.hidden_size
        self.embed_tokens = nn.Embedding(read.vocab_size, width)
        if read.learned_positions:
            self.embed_positions = nn.Embedding(read.max_positions, width)
        if read.token_types:
            self.embed_types = nn.Embedding(read.token_types, width)
        if read.norm:
            self.embed_norm = norm_of(self.shape)

    def _add_patches(self, read: PatchInput) -> None:
        width = self.shape.hidden_size
        self.embed_patches = nn.Conv2d(read.channels, width, read.patch, stride=read.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, read.tokens, width))

    def forward(
        self,
        values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """All tokens at once.

        Args:
            values: ids `[B, T]`, or pixels `[B, C, height, width]`.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding; None for images.
            token_type_ids: `[B, T]`, for families that tell segments.
        """
        x = self.embed(values, token_type_ids)
        shared = self.layer_inputs(x, attention_mask)
        hidden = [x]
        for index, layer in enumerate(self.layers):
            x = layer(x, *shared[self.shape.layer_kind(index)])
            hidden.append(x)
        return EncoderOutput(self._output(self.norm(x), attention_mask), tuple(hidden))

    def embed(self, values: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """The residual stream before layer 0, `[B, T, hidden]`."""
        read = self.shape.input
        if isinstance(read, PatchInput):
            patches = self.embed_patches(values).flatten(2).transpose(1, 2)
            first = self.class_token.expand(values.shape[0], -1, -1)
            return torch.cat((first, patches), dim=1) + self.position_embeddings
        x: Tensor = self.embed_tokens(values)
        if read.token_types:
            assert token_type_ids is not None
            x = x + self.embed_types(token_type_ids)
        if read.learned_positions:
            x = x + self.embed_positions(torch.arange(values.shape[1], device=values.device))
        if read.norm:
            normed: Tensor = self.embed_norm(x)
            return normed
        return x

    def layer_inputs(
        self, x: Tensor, attention_mask: Tensor | None
    ) -> dict[LayerKind, tuple[Tensor | None, Rotary | None]]:
        """Mask and rotary positions for every kind of layer; see `EncoderAttention.forward`.

        Args:
            x: the residual stream before layer 0, `[B, T, hidden]`.
            attention_mask: as for `forward`.
        """
        rotary, valid = self._rotary(x), None
        if attention_mask is not None:
            valid = attention_mask.to(torch.bool)
        mask = None if valid is None else padding_mask(valid)
        return {
            kind: (
                valid if isinstance(kind.attention, Lion) else mask,
                rotary[kind.rope] if kind.rope else None,
            )
            for kind in self.shape.layer_kinds
        }

    def _rotary(self, x: Tensor) -> dict[Rope, Rotary]:
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        buffers = (buffer for _, buffer in self.named_buffers(recurse=False))
        return {
            rope: rotary_caches(rope, frequencies, places, x.dtype)
            for rope, frequencies in zip(self.shape.ropes, buffers, strict=True)
        }

    def _output(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.shape.task == "hidden":
            return x
        if self.shape.task == "embedding":
            assert attention_mask is not None
            return embedding_of(x, attention_mask, first=self.shape.pooling == "first")
        first = x[:, 0]
        if self.shape.head == "pooler":
            first = torch.tanh(self.pooler(first))
        elif self.shape.head == "first-and-mean":
            first = torch.cat((first, x[:, 1:].mean(dim=1)), dim=-1)
        logits: Tensor = self.classifier(first)
        return logits

    def reset_rotary(self, dtype: torch.dtype) -> None:
        """Recomputes the rotary constants after the module was made, moved or emptied.

        Args:
            dtype: of activations; frequencies are fp32.
        """
        constants = rotary_buffers(
            self.shape, by_position=False, context=self.shape.max_context, dtype=dtype
        )
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def convert(self, dtype: torch.dtype) -> Encoder:
        """Converts the parameters in place; rotary frequencies stay fp32, as in the graph."""
        self.to(dtype)
        self.reset_rotary(dtype)
        return self

    def blocks(self) -> Iterator[EncoderLayer]:
        """The transformer blocks in their order."""
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            yield layer


def norm_of(shape: EncoderShape) -> nn.Module:
    """A norm over the residual stream."""
    if shape.norm == "rms":
        return RMSNorm(shape.hidden_size, shape.norm_eps)
    return nn.LayerNorm(shape.hidden_size, shape.norm_eps)


def embedding_of(x: Tensor, attention_mask: Tensor, *, first: bool = False) -> Tensor:
    """One vector of length 1 for each text, `[B, hidden]`; pooled and normalised in fp32.

    Args:
        x: token states `[B, T, hidden]`.
        attention_mask: `[B, T]`.
        first: of the first token, not the mean of all that are no padding.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if first:
        pooled = wide[:, 0]
    else:
        weights = attention_mask.unsqueeze(-1).to(wide.dtype)
        pooled = (wide * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    length = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True)
    unit: Tensor = pooled / length.clamp(min=_SHORTEST)
    return unit.to(x.dtype)
