"""Attention as ONNX Runtime's GroupQueryAttention, for its CPU only, which it makes fast.

Positions follow from how many keys a row has, whatever position_ids say; for a row whose padding
lies on the right of the prefill these are the same.

Its cache is not slot by slot: the valid keys of a row lie together at the front, whatever padding
the attention mask shows, and a buffer given as both past and present is written in place. Hence
padding may lie on the right of a prefill only. The operator is silently wrong for a row padded on
the left; the graph makes such a row NaN (`refuse_left_padding`).

A sliding window is not asked of it: its attribute counts the query itself in ONNX Runtime 1.31 and
does not in 1.23 (measured), so that one file would mean two models.

The operator has no meaning in torch: a decoder in this form is traced, never run. What it must
equal is the standard form, which is what the proof compares it with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyCounts:
    """How many keys there are, as GroupQueryAttention takes it.

    Attributes:
        last: `[B]` int32, valid keys of each row, past and new, minus one.
        total: scalar int32, places of the longest row.
    """

    last: Tensor
    total: Tensor


def count_keys(attention_mask: Tensor) -> KeyCounts:
    """Counts the keys of `attention_mask` `[B, S]`."""
    last = attention_mask.sum(1) - 1
    total = torch.full((), attention_mask.shape[1], dtype=torch.int32)
    return KeyCounts(last.to(torch.int32), total)


def refuse_left_padding(x: Tensor, attention_mask: Tensor) -> Tensor:
    """`x` `[B, T, hidden]`, NaN in every row whose first place is padding."""
    valid = attention_mask[:, :1].unsqueeze(2) != 0
    return x * torch.where(valid, 1.0, torch.nan).to(x.dtype)


def group_query_attention(
    qkv: tuple[Tensor, Tensor | None, Tensor | None],
    past: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor] | None,
    counts: KeyCounts,
    *,
    heads: int,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The node com.microsoft::GroupQueryAttention (ContribOperators.md of ONNX Runtime).

    Args:
        qkv: `[B, T, H * D]` and twice `[B, T, Hkv * D]`, or the three side by side and None.
        past: keys (rotated) and values, each `[B, Hkv, P, D]`.
        rotary: cosine and sine by position, each `[C, R/2]`; None for a layer without.
        counts: valid keys.
        heads: H.
        softcap: bound of the scores.

    Returns:
        The output `[B, T, H * D]` and the joined keys and values `[B, Hkv, P + T, D]`.
    """
    batch, length, _ = qkv[0].shape
    kv_heads, width = past[0].shape[1], past[0].shape[3]
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": kv_heads}
    if softcap is not None:
        attributes["softcap"] = softcap
    inputs = [*qkv, *past, counts.last, counts.total]
    if rotary is not None:
        attributes["do_rotary"] = 1
        inputs += rotary
    joined = (batch, kv_heads, past[0].shape[2] + length, width)
    y, keys, values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,  # type: ignore[arg-type]
        dtypes=[past[0].dtype] * 3,
        shapes=[(batch, length, heads * width), joined, joined],
        version=1,
    )
    return y, (keys, values)
