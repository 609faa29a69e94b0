"""Head sparsity in decoding: a router in front of the attention of every layer but the first.

Source: Polar Sparsity (arXiv 2505.14884). Queries, keys and values of all heads are computed, so
that the cache stays whole; only the attention of heads that are not active is left out, and only
where one token is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeattn.attention import HeadSparse, HeadSparseRequest
from edgeattn.calibration.heads import HeadActivity, observe_heads
from edgeattn.calibration.windows import split_windows
from edgeattn.models.attention_variants import active_heads
from edgeattn.models.model import Model, load_layer
from edgeattn.models.stream import embed_windows, run_layer, window_inputs
from edgeattn.transforms.head_density import num_units
from edgeattn.transforms.head_router import (
    HeadRouter,
    Method,
    recall,
    train_router,
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """What is known of one layer's router.

    Attributes:
        router: trained.
        slots: heads, or KV groups, that are active for a token.
        recall: share of those with the longest outputs that it finds, on windows held out.
        active: share of those windows' tokens for which each query head is active; empty where it
            is not known.
    """

    router: HeadRouter
    slots: int
    recall: float
    active: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Routers:
    """The routers of a model.

    Attributes:
        layers: by number; the other layers are dense.
        units: what slots are taken from: H query heads of a layer, or Hkv KV groups.
        groups: whether units are KV groups.
    """

    layers: Mapping[int, RoutedLayer]
    units: int
    groups: bool

    def active(self, layer: int, normed: Tensor) -> Tensor | None:
        """Which query heads a layer uses, `[..., H]` bool; None for all.

        Args:
            layer: its number.
            normed: what its q_proj reads, `[..., hidden]`.
        """
        if layer not in self.layers:
            return None
        routed = self.layers[layer]
        return active_heads(routed.router.scores(normed), self.units, routed.slots)


def in_basis_of(routers: Routers, model: Model, original: Model) -> Routers:
    """Routers of a checkpoint for its model in another basis: the same heads for the same token.

    A router reads what q_proj reads, so that the same is done to it (`transforms.rotate`): W
    becomes R1ᵀ diag(gain / gain left in the norm) W.

    Args:
        routers: trained on `original`.
        model: rotated, its norms perhaps folded.
        original: as the checkpoint has it.
    """
    layers = {}
    for layer, routed in routers.layers.items():
        name = f"layers.{layer}.input_layernorm.weight"
        before, left = _plain(original, name), _plain(model, name)
        gain = torch.where(before == left, 1.0, before / left)  # a gain of 0 stays one
        weight = gain.unsqueeze(1) * routed.router.weight.double()
        if model.basis is not None:
            weight = model.basis.double().T @ weight
        router = replace(routed.router, weight=weight.float())
        layers[layer] = replace(routed, router=router)
    return replace(routers, layers=layers)


def _plain(model: Model, name: str) -> Tensor:
    value = model.weights.read(name)
    assert isinstance(value, Tensor), f"{name} is quantised"
    return value.double()


@torch.inference_mode()
def train_routers(
    model: Model,
    windows: Tensor,
    request: HeadSparseRequest,
    slots: Mapping[int, int],
    *,
    method: Method = "regression",
    finished: Mapping[int, RoutedLayer] | None = None,
    on_layer: Callable[[int, RoutedLayer], None] | None = None,
    progress: Progress | None = None,
) -> Routers:
    """Trains one router after the other as the dense model passes over a text.

    The stream stays dense: behind layers that are sparse already, as they will be, routers for 7 of
    9 heads of SmolLM2-135M did no better.

    Args:
        model: dense.
        windows: token ids `[N, L]`; some are held out to judge the routers.
        request: what is active or not.
        slots: from `layer_slots`; layers that are not there are dense.
        method: of training, see `edgeattn.transforms.head_router`.
        finished: layers of a run that was stopped.
        on_layer: called with a layer and its router as soon as it is trained.
        progress: called with (layers done, all layers).

    Raises:
        UsageError: one window only.
    """
    shape, layers = model.shape, dict(finished or {})
    units = num_units(shape, request)
    _, held = split_windows(torch.arange(len(windows)))
    hidden, shared = embed_windows(model, windows), window_inputs(shape, windows.shape[1])
    for index in range(1 + max((n for n in slots if n not in layers), default=-1)):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = shared[shape.layer_kind(index)]
        if index in slots and index not in layers:
            activity = observe_heads(layer, hidden, kind)
            layers[index] = _train(activity, held, windows.shape, units, slots[index], method)
            if on_layer:
                on_layer(index, layers[index])
        else:
            run_layer(layer, hidden, kind)
        if progress:
            progress(index + 1, shape.num_layers)
    return Routers(dict(sorted(layers.items())), units, request.unit == "groups")


def _train(
    activity: HeadActivity,
    held: Tensor,
    size: tuple[int, ...],
    units: int,
    slots: int,
    method: Method,
) -> RoutedLayer:
    """A router trained on some windows and judged on the `held` ones of `size` [N, L]."""
    learns = torch.ones(size, dtype=torch.bool)
    learns[held] = False
    learns = learns.flatten()
    normed, norms = activity.normed, activity.norms
    with torch.inference_mode(False), torch.enable_grad():
        router = train_router(
            normed[learns], norms[learns], units=units, slots=slots, method=method
        )
    scores = router.scores(normed[~learns])
    active = active_heads(scores, units, slots).double().mean(dim=0).tolist()
    return RoutedLayer(router, slots, recall(scores, norms[~learns], units, slots), tuple(active))


def sparsify(model: Model, routers: Routers) -> Model:
    """The same weights; layers with a router decode with the heads it chooses.

    Args:
        model: dense.
        routers: of this model.
    """
    shape, tables = model.shape, dict(model.tables)
    cycle = [shape.layer_kind(index) for index in range(shape.num_layers)]
    for index, routed in routers.layers.items():
        cycle[index] = replace(
            cycle[index], attention=HeadSparse(slots=routed.slots, groups=routers.groups)
        )
        tables[index] = {
            "router_weight": routed.router.weight,
            "router_bias": routed.router.bias,
        }
    return replace(model, shape=replace(shape, layer_cycle=tuple(cycle)), tables=tables)
