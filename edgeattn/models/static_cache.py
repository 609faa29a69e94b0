"""A cache of fixed capacity: keys and values are written into slots of a buffer.

The buffer has C slots per row from the first step on. A step writes its T tokens one behind the
other from a slot the caller names, so that every step has the same shapes whatever came before, and
nothing is copied where past and present are one buffer. Which slots hold tokens is the attention
mask's to say, so that padding may lie anywhere and rows may begin in different slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, library

from edgeattn.ops.spec import DOMAIN


@dataclass(frozen=True)
class StaticKeys:
    """Where the keys of a step lie in C slots.

    Attributes:
        mask: which slots each query sees, `[B, 1, T, C]`.
        write_indices: slot of each row's first new token, `[B]` int64.
    """

    mask: Tensor
    write_indices: Tensor

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        """All slots `[B, Hkv, C, D]` after the new keys or values `[B, Hkv, T, D]`."""
        joined: Tensor = TENSOR_SCATTER(past, new, self.write_indices)
        return joined


def static_keys(
    attention_mask: Tensor, write_indices: Tensor, query_len: int, window: int | None = None
) -> StaticKeys:
    """The keys of a step.

    A query sees valid slots up to its own, the last `window` of them, and its own always, as in
    `edgeattn.models.layer_inputs.causal_mask`. Slots behind its own are hidden whatever the mask
    says: what an earlier text left there does no harm.

    Args:
        attention_mask: `[B, C]`, 1 at valid slots, past and new.
        write_indices: `[B]` int64, slot of each row's first new token.
        query_len: T; `write_indices` + T is at most C.
        window: keys a query sees, itself included; None for all.
    """
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    own = write_indices.unsqueeze(1) + torch.arange(query_len, device=attention_mask.device)
    places = own.unsqueeze(2)  # [B, T, 1]
    visible = (slots <= places) & attention_mask.unsqueeze(1).to(torch.bool)
    if window is not None:
        order = attention_mask.cumsum(1)
        visible = visible & (order.unsqueeze(1) > order.gather(1, own).unsqueeze(2) - window)
    return StaticKeys((visible | (slots == places)).unsqueeze(1), write_indices)


def _write(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    slots = write_indices.unsqueeze(1) + torch.arange(new.shape[2], device=new.device)
    return past.scatter(2, slots[:, None, :, None].expand_as(new), new)


_operator = library.custom_op(
    f"{DOMAIN}::tensor_scatter",
    _write,
    mutates_args=(),
    schema="(Tensor past, Tensor new, Tensor write_indices) -> Tensor",
)


@_operator.register_fake
def _shape(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(past)


TENSOR_SCATTER = torch.ops.edgeattn.tensor_scatter.default
"""`past` `[B, Hkv, C, D]` with `new` `[B, Hkv, T, D]` from slot `write_indices` `[B]` on.

Source: ONNX TensorScatter-24 with axis 2 and mode linear, which the exporter makes of it.
"""
