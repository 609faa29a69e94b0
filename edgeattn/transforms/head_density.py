"""How many heads, or KV groups, of each layer are active while decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgeattn.attention import HeadSparseRequest
from edgeattn.errors import UsageError
from edgeattn.models.model import Model, load_layer
from edgeattn.models.stream import embed_windows, run_layer, window_inputs
from edgeattn.shape import ModelShape

# The first layers that stay dense: the first of all does most of the mixing (Polar Sparsity).
DENSE_LAYERS = 1
# Windows that show how much a layer matters.
_WINDOWS = 8
# A layer of at least this importance is dense; none has a lower density than the floor.
_DENSE_FROM, _FLOOR = 0.3, 0.2


def layer_slots(
    model: Model,
    request: HeadSparseRequest,
    windows: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, int]:
    """Active heads or KV groups of each layer that gets a router; the others are dense.

    Args:
        model: dense.
        request: density and unit, and whether all layers have the same.
        windows: token ids `[N, L]` on which importance is measured.
        progress: called with (layers done, all layers), where it is.

    Raises:
        UsageError: no head would be active, or not even the dense layers fit the density.
    """
    shape = model.shape
    units, slots = num_units(shape, request), uniform_slots(shape, request)
    if request.layers == "uniform":
        found = dict.fromkeys(range(DENSE_LAYERS, shape.num_layers), slots)
    else:
        importance = measure_importance(model, windows[:_WINDOWS], progress=progress)
        routed = dict(enumerate(importance[DENSE_LAYERS:], start=DENSE_LAYERS))
        found = slots_by_importance(routed, units=units, total=slots * len(routed))
    return {layer: count for layer, count in found.items() if count < units}


def num_units(shape: ModelShape, request: HeadSparseRequest) -> int:
    """What a density is a share of: query heads or KV groups of a layer."""
    return shape.num_kv_heads if request.unit == "groups" else shape.num_heads


def uniform_slots(shape: ModelShape, request: HeadSparseRequest) -> int:
    """floor(density x units).

    Raises:
        UsageError: it is 0.
    """
    units = num_units(shape, request)
    slots = math.floor(request.density * units)
    if slots < 1:
        raise UsageError(
            expected=f"a density of at least 1/{units} for a model with {units} {request.unit}",
            came=f"it is {request.density}, which leaves none of them",
            todo="give a higher density",
        )
    return slots


@torch.inference_mode()
def measure_importance(
    model: Model, windows: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """How far each layer turns the residual stream: 1 - cosine, mean over the tokens.

    Attention and MLP together, as in Polar Sparsity's study; it takes one pass for all layers,
    where the rise of the loss takes one for each.

    Args:
        model: dense.
        windows: token ids `[N, L]`.
        progress: called with (layers done, all layers).
    """
    shape, found = model.shape, []
    hidden, shared = embed_windows(model, windows), window_inputs(model.shape, windows.shape[1])
    for index in range(shape.num_layers):
        before = hidden.clone()
        layer = load_layer(model, index, weight_dtype=torch.float32)
        run_layer(layer, hidden, shared[shape.layer_kind(index)])
        found.append(1 - float(torch.cosine_similarity(before, hidden, dim=-1).mean()))
        if progress:
            progress(index + 1, shape.num_layers)
    return found


def slots_by_importance(importance: Mapping[int, float], *, units: int, total: int) -> dict[int, int]:
    """Slots in proportion to importance, `total` in all; important layers are dense.

    Args:
        importance: by layer.
        units: of a layer, the most slots it can have.
        total: slots of all these layers together.

    Raises:
        UsageError: the dense layers and the least of the others are more than the total.
    """
    least = max(1, math.floor(_FLOOR * units))
    floors = {n: units if value >= _DENSE_FROM else least for n, value in importance.items()}
    if sum(floors.values()) > total:
        dense = sum(count == units for count in floors.values())
        raise UsageError(
            expected=f"a density with which {dense} important layers can stay dense",
            came=f"{total} slots are too few for {len(floors)} layers of {units}",
            todo="give a higher density, or layers=uniform",
        )
    # One slot after the other to the layer that has the fewest for its importance.
    slots = dict(floors)
    while sum(slots.values()) < total:
        open_layers = [n for n in slots if slots[n] < units]
        slots[max(open_layers, key=lambda n: importance[n] / (slots[n] + 1))] += 1
    return slots
