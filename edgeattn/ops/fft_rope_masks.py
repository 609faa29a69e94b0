"""Which keys a row of `FftRopeAttention` sees, which of them are far, and their biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Masks(NamedTuple):
    """What stands where.

    Attributes:
        offset: p_i − j, `[B, Tq, S]`.
        seen: whether a row sees a key, `[B, 1, Tq, S]`.
        far: seen, neither one of the first keys nor in the window, likewise.
        is_row: `[B, 1, Tq, 1]`, not of padding.
        is_key: `[B, 1, S, 1]`, likewise.
    """

    offset: Tensor
    seen: Tensor
    far: Tensor
    is_row: Tensor
    is_key: Tensor


def masks_of(
    kv_len: Tensor, rows: int, capacity: int, *, sink: int, window: int, causal: int
) -> Masks:
    """The masks of sequences of kv_len keys, `[B]`, in tensors of `rows` queries and S keys."""
    import torch

    lengths = kv_len.long().reshape(-1, 1, 1)
    position = torch.arange(rows, device=kv_len.device).unsqueeze(-1)
    position = position + (lengths - rows).clamp(min=0)  # [B, Tq, 1]
    key = torch.arange(capacity, device=kv_len.device)
    offset, is_key = position - key, key < lengths
    seen = is_key & (offset >= 0) if causal else is_key.expand_as(offset)
    near = (key < sink) | (offset.abs() < window)
    per_head = (seen, seen & ~near, position < lengths, is_key.mT)
    return Masks(offset, *(mask.unsqueeze(1) for mask in per_head))


def bias_of(log_bias: Tensor, offset: Tensor) -> Tensor:
    """Log T(offset), `[B, 1 or H, Tq, S]`, of the table `[1 or H, N]`."""
    middle = log_bias.shape[-1] // 2
    return log_bias[:, (offset + middle).clamp(0, 2 * middle)].transpose(0, 1)
