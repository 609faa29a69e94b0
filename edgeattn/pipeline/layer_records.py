"""What a report says of each layer of a model, and of its heads: records that JSON can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgeattn.quant.scheme import WeightFormat

if TYPE_CHECKING:
    from edgeattn.attention import LayerAttention
    from edgeattn.models.encoder_model import EncoderModel
    from edgeattn.models.model import Model
    from edgeattn.planner.polynomial_heads import Layer, PolynomialHeads
    from edgeattn.transforms.sparsify import Routers

# The weight of a linear layer, among the parameters of a model.
_LINEAR = re.compile(r"layers\.(\d+)\.(.*proj\w*)\.weight")
# Of an error or a bound: more would be noise, and make the report long.
_DIGITS = 4


def layer_records(
    model: Model | EncoderModel, names: Iterable[str], dtype: str
) -> list[dict[str, Any]]:
    """Attention, weights, inputs and cache of each layer, as the graph holds them.

    Args:
        model: transformed and quantised.
        names: of its parameters.
        dtype: of what is not quantised.
    """
    shape, found = model.shape, list[dict[str, Any]]()
    for index in range(shape.num_layers):
        kind = shape.layer_kind(index)
        found.append(
            {
                "layer": index,
                "attention": _attention_record(kind.attention),
                "window": kind.window,
                "weights": {},
                "int8_inputs": [],
                "cache": _cache_label(model, index, dtype),
            }
        )
    for name in names:
        if match := _LINEAR.fullmatch(name):
            record, linear = found[int(match[1])], match[2]
            record["weights"][linear] = _format_label(model.weights.format(name), dtype)
            if name in model.reads and model.reads[name].scale is not None:
                record["int8_inputs"].append(linear)
    return found


def _attention_record(attention: LayerAttention | None) -> dict[str, Any]:
    if attention is None:
        return {"kind": "softmax"}
    kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(attention).__name__).lower()
    return {"kind": kind, **asdict(attention)}


def _cache_label(model: Model | EncoderModel, layer: int, dtype: str) -> str:
    from edgeattn.models.encoder_model import EncoderModel

    if isinstance(model, EncoderModel):
        return "none"
    if "key" not in model.shape.layer_kind(layer).states:
        return "a state"
    return "int8" if layer in model.caches else dtype


def _format_label(weights: WeightFormat | None, dtype: str) -> str:
    if weights is None:
        return dtype
    scales = f"groups of {weights.group_size}" if weights.group_size else "per channel"
    return f"int{weights.bits}, {scales}"


def polynomial_records(heads: PolynomialHeads) -> list[dict[str, Any]]:
    """What each query head has: a polynomial, its error and bound, or why it stays exact.

    Args:
        heads: that were calibrated. A head without a polynomial has the error and the bound of the
            candidate of least error among those it might have taken.
    """
    return [_polynomial_record(index, layer, heads) for index, layer in enumerate(heads.layers)]


def _polynomial_record(index: int, layer: Layer, heads: PolynomialHeads) -> dict[str, Any]:
    shown = []
    for head in layer.heads:
        usable = [c for c in head.candidates if c.fitted == (c.degree % 2 == 0)]
        allowed = [c for c in usable if c.degree <= heads.degree]
        shown.append(head.polynomial or min(allowed, key=lambda c: c.error))
    return {
        "layer": index,
        "skipped": layer.skipped,
        "degree": [None if h.polynomial is None else h.polynomial.degree for h in layer.heads],
        "error": [_rounded(candidate.error) for candidate in shown],
        "score_bound": [_rounded(candidate.score_bound) for candidate in shown],
        "near_mass": [_rounded(head.sink_mass + head.near_mass) for head in layer.heads],
    }


def router_records(routers: Routers, num_layers: int) -> list[dict[str, Any]]:
    """Of each layer: heads or groups that are active for a token, and how often each head is.

    Args:
        routers: of a model.
        num_layers: of it; layers without a router are dense.
    """
    found = []
    for index in range(num_layers):
        routed = routers.layers.get(index)
        found.append(
            {
                "layer": index,
                "slots": routers.units if routed is None else routed.slots,
                "units": routers.units,
                "recall": None if routed is None else _rounded(routed.recall),
                "active": [] if routed is None else [_rounded(share) for share in routed.active],
            }
        )
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
