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
        past: valid keys of the past, `[B, 1]`.
        padding: new tokens that are none, `[B, 1]`.
    """

    mask: Tensor
    source: Tensor
    count: Tensor
    past: Tensor
    padding: Tensor

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        """Past `[B, Hkv, P, D]` and new `[B, Hkv, T, D]` keys or values, `[B, Hkv, S, D]`."""
        return take(torch.cat((past, new), dim=2), self.source)

    def expand(self, rows: int) -> PackedKeys:
        """The same for so many rows, of keys for one."""
        fields = (self.mask, self.source, self.count, self.past, self.padding)
        return PackedKeys(*(x.expand(rows, *x.shape[1:]) for x in fields))


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
    own = past.unsqueeze(2) + places[:query_len].unsqueeze(1)  # [B, T, 1]
    visible = (places <= own) & (places < (past + new).unsqueeze(2))
    if window is not None:
        visible = visible & (places > own - window)
    # A row of padding sees a key, too: softmax of none is NaN in some runtimes and would spread.
    visible = visible | (places == own.clamp(max=total - 1))
    count = (past + new).squeeze(1).to(torch.int32)
    return PackedKeys(visible.unsqueeze(1), source, count, past, query_len - new)


def delayed(queries: Tensor, rows: Tensor) -> Tensor:
    """`[B, H, T, D]`, each row `rows` `[B, 1]` places later, as operators expect valid ones."""
    places = torch.arange(queries.shape[2], device=queries.device)
    return take(queries, (places - rows).clamp(min=0))


def in_time(y: Tensor, rows: Tensor) -> Tensor:
    """The inverse of `delayed`, for valid rows."""
    length = y.shape[2]
    places = torch.arange(length, device=y.device)
    return take(y, (places + rows).clamp(max=length - 1))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, M]` of every head of `x` `[B, H, N, D]`, as `[B, H, M, D]`."""
    batch, heads, length, width = x.shape
    first = torch.arange(batch * heads, device=x.device).reshape(batch, heads, 1) * length
    rows = (first + index.unsqueeze(1)).flatten()
    taken = torch.index_select(x.flatten(0, 2), 0, rows)
    return taken.reshape(batch, heads, index.shape[1], width)
