"""The one decoder definition: what PyTorch runs, what is traced, and what ONNX is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.models.attention import (
    Attention,
    OperatorForm,
    RMSNorm,
    causal_mask,
    inverse_frequencies,
    rotary_caches,
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


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`."""
        hidden: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class DecoderLayer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, shape: ModelShape, form: OperatorForm) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape, form)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Attention.forward` for the arguments; returns the stream and the joined cache."""
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """A Llama-like decoder whose layers and options come from a `ModelShape`.

    Args:
        shape: the architecture.
        form: spelling of attention, see `edgeattn.models.attention`.
        last_logits_only: compute logits of the last position only.
    """

    inv_freq: Tensor

    def __init__(
        self, shape: ModelShape, *, form: OperatorForm = "standard", last_logits_only: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.last_logits_only = last_logits_only
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape, form) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if not shape.tied_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(shape), persistent=False)

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
        x = self.embed_tokens(input_ids)
        cos, sin = rotary_caches(self.inv_freq, position_ids, x.dtype)
        mask = causal_mask(attention_mask, input_ids.shape[1])
        hidden, present = [x], []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, joined = layer(x, cos, sin, mask, layer_past)
            hidden.append(x)
            present.append(joined)
        if self.last_logits_only:
            x = x[:, -1:]
        return DecoderOutput(self._logits(self.norm(x)), tuple(present), tuple(hidden))

    def _logits(self, x: Tensor) -> Tensor:
        head = self.embed_tokens if self.shape.tied_embeddings else self.lm_head
        return nn.functional.linear(x, head.weight)

    def reset_rotary(self) -> None:
        """Recomputes the rotary frequencies, in fp32, after the module was moved or emptied."""
        self.inv_freq = inverse_frequencies(self.shape)

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
