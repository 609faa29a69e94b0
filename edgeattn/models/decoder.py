"""The one decoder definition: what PyTorch runs, what is traced, and what ONNX is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.models.attention import (
    Attention,
    LayerInputs,
    OperatorForm,
    RMSNorm,
    inverse_frequencies,
    layer_inputs,
)
from edgeattn.shape import ModelShape

KVCache = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder step gives.

    Attributes:
        logits: `[B, T, vocab]` (or `[B, 1, vocab]` for last-position logits).
        present: per layer the joined keys and values, each `[B, Hkv, P + T, D]`.
        hidden: the residual stream before layer 0 and after each layer, `[B, T, hidden]`.
    """

    logits: Tensor
    present: KVCache
    hidden: tuple[Tensor, ...]


def rotary_name(index: int) -> str:
    """Name of the frequencies of `shape.ropes[index]`, in the decoder and in the graph."""
    return f"inv_freq_{index}"


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.activation = shape.activation
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`."""
        gate = self.gate_proj(x)
        if self.activation == "silu":
            gate = nn.functional.silu(gate)
        else:
            gate = nn.functional.gelu(gate, approximate="tanh")
        hidden: Tensor = self.down_proj(gate * self.up_proj(x))
        return hidden


class DecoderLayer(nn.Module):
    """One pre-norm transformer block, with norms after attention and MLP where the shape says."""

    def __init__(self, shape: ModelShape, form: OperatorForm) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape, form)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape)
        if shape.output_norms:
            self.attention_output_norm: nn.Module = RMSNorm(shape.hidden_size, shape.norm_eps)
            self.mlp_output_norm: nn.Module = RMSNorm(shape.hidden_size, shape.norm_eps)
        else:
            self.attention_output_norm = self.mlp_output_norm = nn.Identity()

    def forward(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Attention.forward` for the arguments; returns the stream and the joined cache."""
        attended, present = self.self_attn(self.input_layernorm(x), shared, past)
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
        self.layers = nn.ModuleList(DecoderLayer(shape, form) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if not shape.tied_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for i, rope in enumerate(shape.ropes):
            self.register_buffer(rotary_name(i), inverse_frequencies(rope), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: KVCache
    ) -> DecoderOutput:
        """One step: prefill (empty past) or decode.

        Args:
            input_ids: `[B, T]` token ids.
            attention_mask: `[B, P + T]`, 1 at valid places, past and new.
            position_ids: `[B, T]` rotary positions.
            past: per layer keys and values `[B, Hkv, P, D]`.
        """
        x = embed(self.embed_tokens(input_ids), self.shape)
        shared = layer_inputs(
            self.shape,
            [self.get_buffer(rotary_name(i)) for i in range(len(self.shape.ropes))],
            attention_mask,
            position_ids,
            dtype=x.dtype,
            form=self.form,
        )
        hidden, present = [x], []
        for i, (layer, layer_past) in enumerate(zip(self.layers, past, strict=True)):
            x, joined = layer(x, shared[self.shape.layer_kind(i)], layer_past)
            hidden.append(x)
            present.append(joined)
        if self.last_logits_only:
            x = x[:, -1:]
        return DecoderOutput(self._logits(self.norm(x)), tuple(present), tuple(hidden))

    def _logits(self, x: Tensor) -> Tensor:
        head = self.embed_tokens if self.shape.tied_embeddings else self.lm_head
        return soften(nn.functional.linear(x, head.weight), self.shape)

    def reset_rotary(self) -> None:
        """Recomputes the rotary frequencies, in fp32, after the module was moved or emptied."""
        for i, rope in enumerate(self.shape.ropes):
            self.register_buffer(rotary_name(i), inverse_frequencies(rope), persistent=False)

    def convert(self, dtype: torch.dtype) -> Decoder:
        """Converts the parameters in place; rotary frequencies stay fp32, as in the graph."""
        self.to(dtype)
        self.reset_rotary()
        return self

    def empty_cache(self, batch_size: int) -> KVCache:
        """A past of length 0 for `batch_size` rows."""
        weight = self.embed_tokens.weight
        size = (batch_size, self.shape.num_kv_heads, 0, self.shape.head_dim)
        return tuple(
            (weight.new_zeros(size), weight.new_zeros(size)) for _ in range(self.shape.num_layers)
        )
