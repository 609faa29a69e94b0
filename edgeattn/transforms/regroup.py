"""Another number of KV heads, or fewer query heads: grouped-query attention from a checkpoint.

KV heads that are alike are brought together by maps that change nothing (see
`edgeattn.transforms.head_alignment`) and by the order of the heads, which is free; only then are
their projections averaged, after Ainslie et al. (arXiv 2305.13245). That step is lossy and wants
training afterwards. More KV heads than there are come from copies, which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeattn.calibration.windows import split_windows
from edgeattn.errors import ProofError
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.model import Model, ModelWeights, load_layer
from edgeattn.models.stream import (
    batches,
    embed_windows,
    perplexity,
    run_layer,
    window_inputs,
)
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat
from edgeattn.shape import LayerKind, ModelShape
from edgeattn.transforms.head_alignment import (
    Nearest,
    align,
    balanced_groups,
    distances,
    lost_by_pooling,
    moments_of,
    nearest_orthogonal,
    nearest_rotary,
    no_map,
)

Progress = Callable[[int, int], None]

# Nats that an exact step may change the loss by; measured on SmolLM2-135M in fp32: 5e-7.
EXACT_BOUND = 1e-5
# Windows that heads are compared on: second moments of so few elements need no more.
_OBSERVED_WINDOWS = 16


@dataclass(frozen=True, eq=False)
class LayerGroups:
    """How the heads of one layer are regrouped.

    KV heads are numbered after each was copied until there are n of them, the least common multiple
    of the old and the new number; every copy has its share of the query heads.

    Attributes:
        members: `[new KV heads, n / new KV heads]`, which are averaged.
        queries: `[new KV heads, new query heads / new KV heads]`, which query heads stay.
        keys: orthogonal maps of keys and of their queries, `[n, D, D]` fp64.
        values: orthogonal maps of values, likewise.
        key_loss: share of the keys' energy that the averages do not have.
        value_loss: of the values'.
    """

    members: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    key_loss: float = 0.0
    value_loss: float = 0.0

    def apart(self) -> LayerGroups:
        """Aligned and ordered, nothing averaged: the same function as before."""
        per_head = self.queries.numel() // self.members.numel()
        return replace(
            self,
            members=self.members.reshape(-1, 1),
            queries=self.queries.reshape(-1, per_head),
            key_loss=0.0,
            value_loss=0.0,
        )

    def keeping(self, importance: Tensor, heads: int) -> LayerGroups:
        """With fewer query heads, the most important of every group.

        Args:
            importance: `[query heads of the checkpoint]`.
            heads: that stay in the layer.
        """
        kept = importance[self.queries].topk(heads // len(self.queries), dim=1).indices
        return replace(self, queries=self.queries.gather(1, kept.sort(dim=1).values))


@dataclass(frozen=True, eq=False)
class ObservedLayer:
    """What a text tells of the heads of a layer.

    Attributes:
        keys: moments of the keys before RoPE, `[Hkv, Hkv, D, D]`, see `moments_of`.
        values: of the values.
        importance: `[H]`, the mean square of what each query head adds to the residual stream.
    """

    keys: Tensor
    values: Tensor
    importance: Tensor


@torch.inference_mode()
def observe_layers(
    model: Model, windows: Tensor, *, progress: Progress | None = None
) -> list[ObservedLayer]:
    """Runs a model over a text.

    Args:
        model: in floating point.
        windows: token ids `[N, L]`.
        progress: called with (layers done, all layers).
    """
    shape, found = model.shape, []
    hidden, shared = embed_windows(model, windows), window_inputs(model.shape, windows.shape[1])
    for index in range(shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = shared[shape.layer_kind(index)]
        parts = [_observe(layer, rows, kind, shape) for rows in batches(hidden)]
        keys, values, importance = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        found.append(ObservedLayer(keys, values, importance / windows.numel()))
        run_layer(layer, hidden, kind)
        if progress:
            progress(index + 1, shape.num_layers)
    return found


def _observe(
    layer: DecoderLayer, rows: Tensor, shared: LayerInputs, shape: ModelShape
) -> tuple[Tensor, Tensor, Tensor]:
    attention, normed = layer.self_attn, layer.input_layernorm(rows)
    size = (shape.num_kv_heads, shape.head_dim)
    keys = torch.unflatten(attention.k_proj(normed).flatten(0, 1), 1, size)
    values = torch.unflatten(attention.v_proj(normed).flatten(0, 1), 1, size)
    mixed = attention.mix(normed, shared, attention.no_past(len(rows), rows.dtype))[0]
    importance = []
    outputs = torch.unflatten(attention.o_proj.weight, 1, (shape.num_heads, shape.head_dim))
    for head, y in enumerate(torch.unflatten(mixed, 2, outputs.shape[1:]).unbind(2)):
        importance.append((y @ outputs[:, head].T).square().sum(dtype=torch.float64))
    return moments_of(keys), moments_of(values), torch.stack(importance)


def choose_groups(
    observed: ObservedLayer, shape: ModelShape, kind: LayerKind, kv_heads: int
) -> LayerGroups:
    """The groups of one layer whose heads are most alike, and the maps that align them.

    Args:
        observed: of the layer.
        shape: of the model as it is.
        kind: of the layer, for its rotary positions.
        kv_heads: new number of KV heads; divides the query heads.
    """
    count = math.lcm(shape.num_kv_heads, kv_heads)
    source = torch.arange(count) // (count // shape.num_kv_heads)
    keys, values = (m[source][:, source] for m in (observed.keys, observed.values))
    nearest = _key_maps(shape, kind)
    cost = distances(keys, nearest) + distances(values, nearest_orthogonal)
    members = torch.tensor(balanced_groups(cost, kv_heads))
    per_head = shape.num_heads // count
    queries = members.unsqueeze(2) * per_head + torch.arange(per_head)
    key_maps, key_loss = _aligned(keys, members, nearest)
    value_maps, value_loss = _aligned(values, members, nearest_orthogonal)
    return LayerGroups(members, queries.flatten(1), key_maps, value_maps, key_loss, value_loss)


def _key_maps(shape: ModelShape, kind: LayerKind) -> Nearest:
    """The maps of keys that change nothing: none where a norm's gains come after the projection."""
    if shape.qk_norm:
        return no_map
    return nearest_rotary(0 if kind.rope is None else kind.rope.dim)


def _aligned(moments: Tensor, members: Tensor, nearest: Nearest) -> tuple[Tensor, float]:
    """Maps of all heads `[n, D, D]`, and the share of energy that averages lose."""
    maps = torch.empty(moments.shape[1:], dtype=moments.dtype)
    lost, energy = 0.0, 0.0
    for group in members:
        own = moments[group][:, group]
        maps[group] = align(own, nearest)
        total = sum(float(own[i, i].trace()) for i in range(len(own)))
        lost, energy = lost + lost_by_pooling(own, maps[group]) * total, energy + total
    return maps, lost / energy if energy else 0.0


_TENSORS = ("members", "queries", "keys", "values")
_LOSSES = ("key_loss", "value_loss")


def stack_groups(layers: Sequence[LayerGroups]) -> dict[str, Tensor]:
    """All layers as tensors by name, for a file."""
    found = {name: torch.stack([getattr(layer, name) for layer in layers]) for name in _TENSORS}
    for name in _LOSSES:
        found[name] = torch.tensor([getattr(layer, name) for layer in layers], dtype=torch.float64)
    return found


def unstack_groups(tensors: Mapping[str, Tensor]) -> tuple[LayerGroups, ...]:
    """The inverse of `stack_groups`."""
    rows = zip(*(tensors[name] for name in _TENSORS), strict=True)
    losses = zip(*(tensors[name].tolist() for name in _LOSSES), strict=True)
    return tuple(LayerGroups(*row, *lost) for row, lost in zip(rows, losses, strict=True))


def regroup(model: Model, layers: Sequence[LayerGroups]) -> Model:
    """The model with regrouped heads; every weight is computed in fp64 when it is read.

    Args:
        model: in floating point and not fused.
        layers: of all layers, alike in their numbers of heads.
    """
    first = layers[0]
    shape = replace(model.shape, num_heads=first.queries.numel(), num_kv_heads=len(first.members))
    return replace(
        model, shape=shape, weights=_RegroupedWeights(model.weights, model.shape, tuple(layers))
    )


@dataclass(frozen=True)
class RegroupReport:
    """What regrouping did, and what it cost on windows that no choice was made on.

    Attributes:
        before: perplexity of the model as it was.
        aligned: with its heads aligned and in their new order, which must be the same.
        averaged: with KV heads averaged, and all query heads.
        fewer_heads: with the query heads that stay; None where all do.
    """

    before: float
    aligned: float
    averaged: float
    fewer_heads: float | None

    @property
    def after(self) -> float:
        """Of the model that was returned."""
        return self.averaged if self.fewer_heads is None else self.fewer_heads


def regroup_on_text(
    model: Model, windows: Tensor, shape: ModelShape, *, progress: Progress | None = None
) -> tuple[tuple[LayerGroups, ...], RegroupReport]:
    """Chooses groups and heads on a text, and measures each step on another part of it.

    Args:
        model: in floating point and not fused.
        windows: token ids `[N, L]`; some are held out to judge by.
        shape: with the new numbers of heads.
        progress: called with (layers done, all layers).

    Raises:
        UsageError: one window only.
        ProofError: alignment changed what the model computes.
    """
    seen, held = split_windows(windows)
    seen = seen[:: -(-len(seen) // _OBSERVED_WINDOWS)]
    observed = observe_layers(model, seen, progress=progress)
    whole = [
        choose_groups(layer, model.shape, model.shape.layer_kind(index), shape.num_kv_heads)
        for index, layer in enumerate(observed)
    ]
    before = perplexity(model, held)
    aligned = perplexity(regroup(model, [layer.apart() for layer in whole]), held)
    check_exact(before, aligned)
    averaged = perplexity(regroup(model, whole), held)
    if shape.num_heads == model.shape.num_heads:
        return tuple(whole), RegroupReport(before, aligned, averaged, None)
    kept = [
        groups.keeping(layer.importance, shape.num_heads)
        for groups, layer in zip(whole, observed, strict=True)
    ]
    fewer = perplexity(regroup(model, kept), held)
    return tuple(kept), RegroupReport(before, aligned, averaged, fewer)


def check_exact(before: float, after: float) -> None:
    """Refuses a step that should have changed nothing.

    Args:
        before: perplexity.
        after: the same with aligned and ordered heads.

    Raises:
        ProofError: they differ by more than fp32 explains.
    """
    if not abs(math.log(after / before)) <= EXACT_BOUND:
        raise ProofError(
            expected=f"aligned heads to leave the perplexity of {before:.5f} as it is",
            came=f"it became {after:.5f}",
            todo="report this with the checkpoint's name; export without --attention gqa works",
        )


@dataclass(frozen=True)
class _RegroupedWeights:
    source: ModelWeights
    shape: ModelShape  # of the source
    layers: tuple[LayerGroups, ...]

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = self.source.read(name)
        if ".self_attn." not in name or not name.rpartition(".")[0].endswith("_proj"):
            return value
        assert isinstance(value, Tensor), f"{name} is quantised before its heads are regrouped"
        _, layer, _, projection, kind = name.split(".")
        groups, rows = self.layers[int(layer)], value.double()
        if projection == "o_proj":
            return self._outputs(rows, groups).float()
        rows = rows.unsqueeze(1) if kind == "bias" else rows
        rows = (
            self._queries(rows, groups)
            if projection == "q_proj"
            else self._pooled(
                rows, groups.members, groups.keys if projection == "k_proj" else groups.values
            )
        )
        return (rows.squeeze(1) if kind == "bias" else rows).float()

    def _queries(self, rows: Tensor, groups: LayerGroups) -> Tensor:
        heads = torch.unflatten(rows, 0, (self.shape.num_heads, self.shape.head_dim))
        kept = groups.queries.flatten()
        found: Tensor = groups.keys[self._copy_of(kept, groups)] @ heads[kept]
        return found.flatten(0, 1)

    def _pooled(self, rows: Tensor, members: Tensor, maps: Tensor) -> Tensor:
        heads = torch.unflatten(rows, 0, (self.shape.num_kv_heads, self.shape.head_dim))
        source = members // (members.numel() // self.shape.num_kv_heads)
        return (maps[members] @ heads[source]).mean(1).flatten(0, 1)

    def _outputs(self, weight: Tensor, groups: LayerGroups) -> Tensor:
        """`y Wᵀ` of values `B y`: the columns of a head are multiplied with `Bᵀ`."""
        size = (self.shape.num_heads, self.shape.head_dim)
        kept = groups.queries.flatten()
        heads = torch.unflatten(weight, 1, size).transpose(0, 1)[kept]
        back = groups.values[self._copy_of(kept, groups)].transpose(1, 2)
        return (heads @ back).transpose(0, 1).flatten(1)

    def _copy_of(self, queries: Tensor, groups: LayerGroups) -> Tensor:
        """The KV head, among the n copies, that query heads of the source read."""
        return queries // (self.shape.num_heads // groups.members.numel())
