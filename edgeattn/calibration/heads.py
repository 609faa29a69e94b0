"""Attention heads as a layer runs over windows: watched, or some of them left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.stream import batches

# From the normed input `[n, L, hidden]` and the heads' outputs `[n, L, H, D]` of a few windows to
# which heads are active `[n, L, H]` bool; None for all.
Select = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class HeadActivity:
    """What a router of one layer learns from, for M = N L tokens.

    Attributes:
        normed: what q_proj reads, `[M, hidden]`.
        norms: length of each query head's output, before o_proj, `[M, H]`.
    """

    normed: Tensor
    norms: Tensor


def run_heads(layer: DecoderLayer, hidden: Tensor, shared: LayerInputs, select: Select) -> None:
    """Passes `hidden` through one layer in place; heads that are not active give zeros.

    As in decoding, every token has its keys and values in the cache, whichever heads it used.

    Args:
        layer: with softmax attention.
        hidden: the residual stream before it, `[N, L, hidden]`; becomes the one behind it.
        shared: of windows of L tokens.
        select: which heads are active.
    """
    attention = layer.self_attn
    for rows in batches(hidden):
        normed = layer.input_layernorm(rows)
        mixed, _ = attention.mix(normed, shared, attention.no_past(len(rows), rows.dtype))
        heads = torch.unflatten(mixed, -1, attention.heads)
        active = select(normed, heads)
        if active is not None:
            heads = heads * active.unsqueeze(-1)
        rows += layer.attention_output_norm(attention.o_proj(heads.flatten(-2)))
        rows += layer.mlp_output_norm(layer.mlp(layer.post_attention_layernorm(rows)))


@torch.inference_mode()
def observe_heads(layer: DecoderLayer, hidden: Tensor, shared: LayerInputs) -> HeadActivity:
    """Passes `hidden` through one layer in place, all heads active, and says what they did."""
    normed, norms = [], []

    def watch(rows: Tensor, heads: Tensor) -> None:
        normed.append(rows.flatten(0, 1))
        norms.append(heads.norm(dim=-1).flatten(0, 1))

    run_heads(layer, hidden, shared, watch)
    return HeadActivity(torch.cat(normed), torch.cat(norms))
