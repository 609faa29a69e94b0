"""What a graph costs as its context grows: memory, and decoding by the roofline. All predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from edgeattn.attention import HeadSparse
from edgeattn.devices.registry import Target
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes, weight_bytes
from edgeattn.planner.roofline import predict, rates_of
from edgeattn.quant.scheme import parse_scheme
from edgeattn.shape import ModelShape

# Contexts of a curve: the longest, and each half of it down to this many tokens.
_SHORTEST, _MOST_POINTS = 64, 9
_Point = TypeVar("_Point")


@dataclass(frozen=True)
class CostPoint:
    """A decode step at the end of a context, all rows together.

    Attributes:
        context: tokens of each row.
        memory_bytes: weights and cache.
        moved_bytes: that a step reads: weights, and what it needs of the cache.
        tokens_per_s: at most, by the roofline; None for a target without figures.
    """

    context: int
    memory_bytes: int
    moved_bytes: int
    tokens_per_s: float | None


@dataclass(frozen=True)
class CostCurve(Generic[_Point]):
    """Points of one graph, a decoder's or an encoder's.

    Attributes:
        label: what it is.
        points: by context, from the shortest on.
    """

    label: str
    points: tuple[_Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def cost_curves(
    shape: ModelShape, lowering: Lowering, target: Target
) -> list[CostCurve[CostPoint]]:
    """The graph's curve and, where it differs, that of the same model before anything was changed.

    Args:
        shape: the architecture, its attention variants among it; routers are left out.
        lowering: how weights and cache are stored.
        target: whose rates count.
    """
    density = _active_share(shape)
    contexts = curve_contexts(lowering.context or shape.max_context)
    curves = [CostCurve("this bundle", _points(shape, lowering, target, contexts, density))]
    if lowering.scheme.weight_bits or lowering.scheme.rounds_at_run_time or density < 1:
        plain = replace(lowering, scheme=parse_scheme("none"), variant=None)
        points = _points(shape, plain, target, contexts, 1.0)
        curves.append(CostCurve(f"the model in {lowering.dtype}", points))
    return curves


def curve_contexts(longest: int) -> list[int]:
    """Where a curve has its points, the longest last."""
    contexts = [longest]
    while contexts[0] // 2 >= _SHORTEST and len(contexts) < _MOST_POINTS:
        contexts.insert(0, contexts[0] // 2)
    return contexts


def _active_share(shape: ModelShape) -> float:
    """Share of the heads that a step of one token uses, on the mean over the layers."""
    shares = []
    for layer in range(shape.num_layers):
        attention = shape.layer_kind(layer).attention
        if isinstance(attention, HeadSparse):
            units = shape.num_kv_heads if attention.groups else shape.num_heads
            shares.append(attention.slots / units)
        else:
            shares.append(1.0)
    return sum(shares) / len(shares)


def _points(
    shape: ModelShape, lowering: Lowering, target: Target, contexts: list[int], density: float
) -> tuple[CostPoint, ...]:
    rates, batch = rates_of(target, lowering), lowering.batch
    weights, read = weight_bytes(shape, lowering), read_bytes(shape, lowering)
    per_token = batch * cache_bytes_per_token(shape, lowering)
    found = []
    for context in contexts:
        speed = None
        if rates is not None:
            # Keys that no active head reads are as good as not there.
            needed = max(1, round(density * context))
            speed = predict(shape, lowering, needed, batch, rates).tokens_per_s
        moved = read + round(density * per_token * context)
        found.append(CostPoint(context, weights + per_token * context, moved, speed))
    return tuple(found)
