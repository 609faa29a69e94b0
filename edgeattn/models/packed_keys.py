"""A cache in which each row's valid keys lie together at the front, for operators that take counts.

edgeattn's attention operators know how many keys a row has, not which: a mask with gaps means
nothing to them. So new keys are joined with past ones right behind a row's last, and padding may
lie on the right of new tokens only. As in the group-query form the graph makes a row that begins
with padding NaN (`edgeattn.models.group_query.refuse_left_padding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedKeys:
    """Where the keys of a step lie; S = P + T places for P past and T new ones.

    Attributes:
        mask: which keys each query sees, `[B, 1, T, S]`, for layers of softmax attention.
        source: for each place of the joined cache, its place in past and new keys one behind the
            other, `[B, S]`.
        count: valid keys of each row, `[B]` int32.
        delay: `[B, 1]`, rows by which an operator that takes the last T of `count` positions for
            the queries' has them later than the tensor: the padding behind them, as far as there
            is a past.
    """

    mask: Tensor
    source: Tensor
    count: Tensor
    delay: Tensor

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        """Past `[B, Hkv, P, D]` and new `[B, Hkv, T, D]` keys or values, `[B, Hkv, S, D]`."""
        return take(torch.cat((past, new), dim=2), self.source)

    def delayed(self, queries: Tensor) -> Tensor:
        """`[B, H, T, D]` with each valid row where the operators expect it."""
        rows = torch.arange(queries.shape[2], device=queries.device)
        return take(queries, (rows - self.delay).clamp(min=0))

    def in_time(self, y: Tensor) -> Tensor:
        """The inverse of `delayed`, for valid rows."""
        length = y.shape[2]
        rows = torch.arange(length, device=y.device)
        return take(y, (rows + self.delay).clamp(max=length - 1))


def pack_keys(attention_mask: Tensor, query_len: int, window: int | None = None) -> PackedKeys:
    """The keys of a step.

    Args:
        attention_mask: `[B, S]`, 1 at valid places, past and new.
        query_len: T; the queries are the last T of the S places.
        window: keys a query sees, itself included; None for all.
    """
    total = attention_mask.shape[1]
    past_len = total - query_len
    past = attention_mask[:, :past_len].sum(1, keepdim=True)  # [B, 1]
    new = attention_mask[:, past_len:].sum(1, keepdim=True)
    places = torch.arange(total, device=attention_mask.device)
    source = torch.where(places < past, places, places - past + past_len).clamp(max=total - 1)
    delay = torch.minimum(past, query_len - new)
    own = past.unsqueeze(2) + places[:query_len].unsqueeze(1)  # [B, T, 1]
    visible = (places <= own) & (places < (past + new).unsqueeze(2))
    if window is not None:
        visible = visible & (places > own - window)
    # A row of padding sees a key, too: softmax of none is NaN in some runtimes and would spread.
    visible = visible | (places == own.clamp(max=total - 1))
    count = (past + new).squeeze(1).to(torch.int32)
    return PackedKeys(visible.unsqueeze(1), source, count, delay)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, M]` of every head of `x` `[B, H, N, D]`, as `[B, H, M, D]`."""
    batch, heads, length, width = x.shape
    first = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1) * length
    rows = (first + index.unsqueeze(1)).flatten()
    taken = torch.index_select(x.flatten(0, 2), 0, rows)
    return taken.reshape(batch, heads, index.shape[1], width)
