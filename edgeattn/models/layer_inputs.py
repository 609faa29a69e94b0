"""What the layers of one kind share in a step: positions, and which keys are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from edgeattn.models.group_query import KeyCounts, count_keys
from edgeattn.models.packed_keys import PackedKeys, pack_keys
from edgeattn.models.rotary import rotary_caches
from edgeattn.models.static_cache import StaticKeys, static_keys
from edgeattn.shape import LayerKind, ModelShape


def causal_mask(attention_mask: Tensor, query_len: int, window: int | None = None) -> Tensor:
    """Which keys each query sees, `[B, 1, T, S]` bool.

    A query sees valid keys up to its own place, the last `window` of them; its own place always, so
    that a padding row is never empty (softmax of an empty row is NaN in some runtimes and would
    spread). Distance is counted in valid keys, so that padding does not shorten the window.

    Args:
        attention_mask: `[B, S]`, 1 at valid keys, past and new.
        query_len: T; the queries are the last T of the S places.
        window: keys a query sees, itself included; None for all.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device).unsqueeze(0)
    places = torch.arange(query_len, device=attention_mask.device).unsqueeze(1)
    places = places + (total - query_len)
    visible = (keys <= places) & attention_mask.unsqueeze(1).to(torch.bool)
    if window is not None:
        order = attention_mask.cumsum(1)
        own = order[:, total - query_len :]
        visible = visible & (order.unsqueeze(1) > own.unsqueeze(2) - window)
    return (visible | (keys == places)).unsqueeze(1)


@dataclass(frozen=True)
class LayerInputs:
    """What the layers of one kind share in a step, beside the residual stream and their caches.

    Attributes:
        rotary: cosine and sine, each `[B, 1, T, R/2]`, or in the group-query form `[C, R/2]` by
            position; None for a layer without.
        keys: which keys are seen: a mask `[B, 1, T, S]`, counts in the group-query form, where they
            lie in a packed cache, which models with an attention variant have, or where the new
            ones go in a static cache.
    """

    rotary: tuple[Tensor, Tensor] | None
    keys: Tensor | KeyCounts | PackedKeys | StaticKeys

    def to(self, device: torch.device | int | str) -> LayerInputs:
        """The same on a device; accelerate asks for it where blocks lie on several GPUs."""
        return _moved(self, device)


_Held = TypeVar("_Held")


def _moved(value: _Held, device: torch.device | int | str) -> _Held:
    """Tensors on a device, and what holds them."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.to(device)
    elif isinstance(value, tuple):
        found = tuple(_moved(x, device) for x in value)
    elif isinstance(value, LayerInputs | KeyCounts | PackedKeys | StaticKeys):
        held = {f.name: _moved(getattr(value, f.name), device) for f in fields(value)}
        found = replace(value, **held)
    return cast("_Held", found)


def layer_inputs(
    shape: ModelShape,
    inv_freq: Sequence[Tensor],
    attention_mask: Tensor,
    position_ids: Tensor,
    *,
    write_indices: Tensor | None = None,
    dtype: torch.dtype,
) -> dict[LayerKind, LayerInputs]:
    """The shared inputs of every kind of layer in `shape`, in the forms with a mask.

    Args:
        shape: the architecture.
        inv_freq: frequencies of each of `shape.ropes`.
        attention_mask: `[B, S]`.
        position_ids: `[B, T]`.
        write_indices: `[B]` for a static cache, whose slots S are; None for one that grows.
        dtype: of activations.
    """
    rotary = {
        rope: rotary_caches(rope, frequencies, position_ids, dtype)
        for rope, frequencies in zip(shape.ropes, inv_freq, strict=True)
    }
    length, windows = position_ids.shape[1], {kind.window for kind in shape.layer_kinds}
    keys: dict[int | None, Tensor | PackedKeys | StaticKeys]
    if write_indices is not None:
        keys = {w: static_keys(attention_mask, write_indices, length, w) for w in windows}
    elif shape.has_variants:
        keys = {w: pack_keys(attention_mask, length, w) for w in windows}
    else:
        keys = {w: causal_mask(attention_mask, length, w) for w in windows}
    return {
        kind: LayerInputs(rotary[kind.rope] if kind.rope else None, keys[kind.window])
        for kind in shape.layer_kinds
    }


def group_query_inputs(
    shape: ModelShape, tables: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor
) -> dict[LayerKind, LayerInputs]:
    """The shared inputs of every kind of layer in the group-query form.

    Args:
        shape: the architecture.
        tables: cosine and sine by position of each of `shape.ropes`.
        attention_mask: `[B, S]`.
    """
    assert not shape.has_windows, "GroupQueryAttention is not used for sliding windows"
    rotary = dict(zip(shape.ropes, tables, strict=True))
    counts = count_keys(attention_mask)
    return {
        kind: LayerInputs(rotary[kind.rope] if kind.rope else None, counts)
        for kind in shape.layer_kinds
    }
