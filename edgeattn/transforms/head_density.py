"""How many heads, or KV groups, of each layer are active while decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from edgeattn.attention import HeadSparseRequest
from edgeattn.calibration.windows import split_windows
from edgeattn.models.attention_variants import active_heads
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.model import Model, load_layer
from edgeattn.models.stream import batches, embed_windows, run_layer, window_inputs
from edgeattn.shape import ModelShape

# The first layers stay dense: sparse ones there cost most of all (Polar Sparsity's study).
DENSE_LAYERS = 1
# No layer has a lower density, where densities differ.
_FLOOR = 0.2


def layer_slots(
    model: Model,
    request: HeadSparseRequest,
    windows: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, int]:
    """Active heads or KV groups of each layer that gets a router; the others are dense.

    All layers but the first have floor(density x units), or by importance as many in all. Layers
    with a sliding window stay dense: the operator sees all keys.

    Args:
        model: dense.
        request: density and unit, and whether all layers have the same.
        windows: token ids `[N, L]`; a few show what matters.
        progress: called with (layers done, all layers) while importance is measured.

    Raises:
        UsageError: one window only, and slots are chosen by importance.
    """
    shape = model.shape
    units = num_units(shape, request)
    slots = math.floor(request.density * units)
    layers = range(DENSE_LAYERS, shape.num_layers)
    found = {n: slots for n in layers if shape.layer_kind(n).window is None}
    if request.layers == "importance" and found:
        learnt, judged = split_windows(windows)
        # A few, but none that recall is measured on.
        shown = learnt[:: max(1, len(learnt) // len(judged))][: len(judged)]
        costs = sparsity_costs(model, units, shown, progress=progress)
        found = cheapest_slots({layer: costs[layer] for layer in found}, slots * len(found))
    return {layer: count for layer, count in found.items() if count < units}


def num_units(shape: ModelShape, request: HeadSparseRequest) -> int:
    """What a density is a share of: query heads or KV groups of a layer."""
    return shape.num_kv_heads if request.unit == "groups" else shape.num_heads


@torch.inference_mode()
def sparsity_costs(
    model: Model,
    units: int,
    windows: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """What leaving out the shortest heads changes, by layer and by the number of those active.

    The cost is the square of |change of the stream| / |stream|, mean over the tokens. It tells
    importance better than how far a whole layer turns the stream: with the same routers for 7 of 9
    heads of SmolLM2-135M on the mean, perplexity is 25.43 where slots are chosen so, 26.64 by that,
    and 25.98 with 7 in each layer. The mean of squares, which a few tokens make, gives 25.53.

    Args:
        model: dense.
        units: H, or Hkv for KV groups.
        windows: token ids `[N, L]`.
        progress: called with (layers done, all layers).

    Returns:
        For each layer the costs of 0, 1, … `units` active ones.
    """
    shape, found = model.shape, []
    hidden, shared = embed_windows(model, windows), window_inputs(model.shape, windows.shape[1])
    for index in range(shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = shared[shape.layer_kind(index)]
        costs = [_costs(layer, rows, kind, units) for rows in batches(hidden)]
        found.append(torch.cat(costs).mean(0).square().tolist())
        run_layer(layer, hidden, kind)
        if progress:
            progress(index + 1, shape.num_layers)
    return found


def _costs(layer: DecoderLayer, rows: Tensor, shared: LayerInputs, units: int) -> Tensor:
    """The roots of the costs of 0, 1, … `units` active ones by window, `[n, units + 1]`."""
    attention = layer.self_attn
    past = attention.no_past(len(rows), rows.dtype)
    mixed, _ = attention.mix(layer.input_layernorm(rows), shared, past)
    heads = torch.unflatten(mixed, -1, attention.heads)
    norms, size = heads.norm(dim=-1), rows.norm(dim=-1)

    def attended(slots: int) -> Tensor:
        active = active_heads(norms, units, slots).unsqueeze(-1)
        written: Tensor = layer.attention_output_norm(
            attention.o_proj((heads * active).flatten(-2))
        )
        return written

    dense = attended(units)
    changes = [(attended(slots) - dense).norm(dim=-1) / size for slots in range(units + 1)]
    return torch.stack([change.mean(-1) for change in changes], dim=-1)


def cheapest_slots(costs: Mapping[int, Sequence[float]], total: int) -> dict[int, int]:
    """Slots of each layer, `total` in all, with the least sum of costs that greed finds.

    Args:
        costs: by layer, of 0, 1, … active units.
        total: slots of all these layers together; at least the floor of each.
    """
    units = min(len(of_layer) for of_layer in costs.values()) - 1
    floor = max(1, min(math.floor(_FLOOR * units), total // len(costs)))
    slots = dict.fromkeys(costs, units)
    for _ in range(units * len(costs) - total):
        above = [layer for layer in slots if slots[layer] > floor]
        rises = {n: costs[n][slots[n] - 1] - costs[n][slots[n]] for n in above}
        slots[min(above, key=rises.__getitem__)] -= 1
    return slots
