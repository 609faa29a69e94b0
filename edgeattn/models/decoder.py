"""The one decoder definition: what PyTorch runs, what is traced, and what ONNX is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.attention import Lion
from edgeattn.models.attention import (
    Attention,
    OperatorForm,
    RMSNorm,
)
from edgeattn.models.group_query import refuse_left_padding
from edgeattn.models.layer_inputs import LayerInputs, group_query_inputs, layer_inputs
from edgeattn.models.linear import Linear
from edgeattn.models.recurrent import RecurrentMixer, recurrent_mixer
from edgeattn.models.rotary import rotary_buffers
from edgeattn.recurrent import Recurrent
from edgeattn.shape import LayerKind, ModelShape

# What each layer hands on: keys and values, or what `LayerKind.states` says.
KVCache = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder step gives.

    Attributes:
        logits: `[B, T, vocab]` (or `[B, 1, vocab]` for last-position logits).
        present: per layer the joined keys and values, each `[B, Hkv, P + T, D]`; of a static cache
            all its slots, `[B, Hkv, C, D]`; of linear attention its states (`models.recurrent`).
        hidden: the residual stream before layer 0 and after each layer, `[B, T, hidden]`.
    """

    logits: Tensor
    present: KVCache
    hidden: tuple[Tensor, ...]


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.activation = shape.activation
        wide, narrow = shape.intermediate_size, shape.hidden_size
        self.fused = shape.fused
        if shape.fused:
            self.gate_up_proj = Linear(narrow, 2 * wide)
        else:
            self.gate_proj = Linear(narrow, wide)
            self.up_proj = Linear(narrow, wide)
        self.down_proj = Linear(wide, narrow)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`."""
        hidden: Tensor = self.down_proj(self.gated(x))
        return hidden

    def gated(self, x: Tensor) -> Tensor:
        """As `forward`, without the down projection: `[B, T, intermediate]`."""
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            gate = nn.functional.silu(gate)
        else:
            gate = nn.functional.gelu(gate, approximate="tanh")
        product: Tensor = gate * up
        return product


class DecoderLayer(nn.Module):
    """One pre-norm transformer block, with norms after attention and MLP where the shape says."""

    def __init__(self, shape: ModelShape, form: OperatorForm, kind: LayerKind) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.is_recurrent = isinstance(kind.attention, Recurrent)
        if isinstance(kind.attention, Recurrent):
            self.linear_attn = recurrent_mixer(shape, kind.attention)
        else:
            assert not isinstance(kind.attention, Lion), "LION is bidirectional"
            self.self_attn = Attention(shape, form, kind.attention)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape)
        if shape.output_norms:
            self.attention_output_norm: nn.Module = RMSNorm(shape.hidden_size, shape.norm_eps)
            self.mlp_output_norm: nn.Module = RMSNorm(shape.hidden_size, shape.norm_eps)
        else:
            self.attention_output_norm = self.mlp_output_norm = nn.Identity()

    @property
    def mixer(self) -> Attention | RecurrentMixer:
        """What mixes tokens: softmax attention, a variant of it, or linear attention."""
        return self.linear_attn if self.is_recurrent else self.self_attn

    def spell(self, form: OperatorForm) -> None:
        """Changes the spelling of softmax attention; linear attention has one."""
        if not self.is_recurrent:
            self.self_attn.form = form

    def forward(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See the mixer's `forward` for the arguments; returns the stream and what it hands on."""
        attended, present = self.mixer(self.input_layernorm(x), shared, past)
        x = x + self.attention_output_norm(attended)
        return x + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(x))), present


def embed(tokens: Tensor, shape: ModelShape) -> Tensor:
    """The residual stream before layer 0 from rows of the embedding, `[B, T, hidden]`."""
    return tokens if shape.embedding_scale == 1 else tokens * shape.embedding_scale


def soften(logits: Tensor, shape: ModelShape) -> Tensor:
    """Logits under the shape's softcap c: c tanh(logits / c)."""
    cap = shape.logits_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Decoder(nn.Module):
    """A decoder whose layers and options come from a `ModelShape`.

    Args:
        shape: the architecture.
        form: spelling of attention, see `edgeattn.models.attention`.
        last_logits_only: compute logits of the last position only.
    """

    def __init__(
        self, shape: ModelShape, *, form: OperatorForm = "standard", last_logits_only: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.form: OperatorForm = form
        self.last_logits_only = last_logits_only
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, form, shape.layer_kind(i)) for i in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if not shape.tied_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.reset_rotary()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: KVCache,
        write_indices: Tensor | None = None,
    ) -> DecoderOutput:
        """One step: prefill (empty past) or decode.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, P + T]`, 1 at valid places, past and new; `[B, C]` for a static
                cache.
            position_ids: `[B, T]` rotary positions.
            past: per layer keys and values `[B, Hkv, P, D]`; of a static cache all its slots,
                `[B, Hkv, C, D]`; of linear attention its states.
            write_indices: `[B]`, the slot of a static cache where a row's new tokens begin; None
                for a cache that grows.
        """
        x = embed(self.embed_tokens(input_ids), self.shape)
        if self.form == "group-query" or self.shape.has_variants:
            x = refuse_left_padding(x, attention_mask)
        shared = self._layer_inputs(attention_mask, position_ids, write_indices, x.dtype)
        hidden, present = [x], []
        for i, (layer, layer_past) in enumerate(zip(self.layers, past, strict=True)):
            x, joined = layer(x, shared[self.shape.layer_kind(i)], layer_past)
            hidden.append(x)
            present.append(joined)
        if self.last_logits_only:
            x = x[:, -1:]
        return DecoderOutput(self._logits(self.norm(x)), tuple(present), tuple(hidden))

    def _layer_inputs(
        self,
        attention_mask: Tensor,
        position_ids: Tensor,
        write_indices: Tensor | None,
        dtype: torch.dtype,
    ) -> dict[LayerKind, LayerInputs]:
        rotary = [buffer for name, buffer in self.named_buffers(recurse=False)]
        if self.form == "group-query":
            tables = list(zip(rotary[::2], rotary[1::2], strict=True))
            return group_query_inputs(self.shape, tables, attention_mask)
        return layer_inputs(
            self.shape,
            rotary,
            attention_mask,
            position_ids,
            write_indices=write_indices,
            dtype=dtype,
        )

    def _logits(self, x: Tensor) -> Tensor:
        head = self.embed_tokens if self.shape.tied_embeddings else self.lm_head
        return soften(nn.functional.linear(x, head.weight), self.shape)

    def reset_rotary(self) -> None:
        """Recomputes the rotary constants after the module was made, moved or emptied."""
        dtype = self.embed_tokens.weight.dtype
        constants = rotary_buffers(
            self.shape,
            by_position=self.form == "group-query",
            context=self.shape.max_context,
            dtype=dtype,
        )
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def convert(self, dtype: torch.dtype) -> Decoder:
        """Converts the parameters in place; rotary frequencies stay fp32, as in the graph."""
        self.to(dtype)
        self.reset_rotary()
        return self

    def empty_cache(self, batch_size: int) -> KVCache:
        """A past of length 0 for `batch_size` rows."""
        dtype = self.embed_tokens.weight.dtype
        return tuple(block.mixer.no_past(batch_size, dtype) for block in self.blocks())

    def blocks(self) -> Iterator[DecoderLayer]:
        """The transformer blocks in their order."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer
