"""What an encoder costs as its texts grow: operations, and time by the roofline. All predicted.

Softmax attention grows with the square of the length; attention that keeps a state from either side
grows as the length does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import EncoderShape, TokenInput
from edgeattn.planner.cost_curve import CostCurve, curve_contexts
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import DTYPE_BYTES, matrix_bytes
from edgeattn.planner.roofline import rates_of
from edgeattn.quant.scheme import parse_scheme


@dataclass(frozen=True)
class EncoderCostPoint:
    """One pass over texts of a length, all rows together.

    Attributes:
        context: tokens of each row.
        operations: of linear layers and attention; a multiplication and its addition are two.
        seconds: at least, by the roofline; None for a target without figures.
    """

    context: int
    operations: int
    seconds: float | None


def encoder_cost_curves(
    shape: EncoderShape, lowering: Lowering, target: Target
) -> list[CostCurve[EncoderCostPoint]]:
    """The graph's curve and, where it differs, that of the same model before anything was changed.

    Args:
        shape: the architecture; images have one size and so no curve.
        lowering: how weights are stored and what is computed in.
        target: whose rates count.
    """
    if not isinstance(shape.input, TokenInput):
        return []
    contexts = curve_contexts(lowering.context or shape.max_context)
    curves = [CostCurve("this bundle", _points(shape, lowering, target, contexts))]
    scheme = lowering.scheme
    if scheme.weight_bits or scheme.rounds_at_run_time or shape.has_variants:
        plain = replace(lowering, scheme=parse_scheme("none"))
        cycle = tuple(replace(kind, attention=None) for kind in shape.layer_cycle)
        points = _points(replace(shape, layer_cycle=cycle), plain, target, contexts)
        curves.append(CostCurve(f"the model in {lowering.dtype}", points))
    return curves


def _points(
    shape: EncoderShape, lowering: Lowering, target: Target, contexts: list[int]
) -> tuple[EncoderCostPoint, ...]:
    rates, batch = rates_of(target, lowering), lowering.batch
    weights = shape.num_layers * sum(n * k for n, k in shape.linears().values())
    found = []
    for context in contexts:
        linear = 2 * batch * context * weights
        attention = batch * attention_operations(shape, context)
        seconds = None
        if rates is not None and rates.flops_per_s and rates.linear_flops_per_s:
            computing = linear / rates.linear_flops_per_s + attention / rates.flops_per_s
            seconds = max(computing, read_bytes_of_encoder(shape, lowering) / rates.bytes_per_s)
        found.append(EncoderCostPoint(context, linear + attention, seconds))
    return tuple(found)


def read_bytes_of_encoder(shape: EncoderShape, lowering: Lowering) -> int:
    """Of the blocks' matrices, which a pass reads whole; of the embedding it reads some rows."""
    wide, scheme = DTYPE_BYTES[lowering.dtype], lowering.scheme
    matrices = shape.linears().items()
    block = sum(matrix_bytes(n, k, scheme.format_of(name), wide) for name, (n, k) in matrices)
    return shape.num_layers * block


def attention_operations(shape: EncoderShape, tokens: int) -> int:
    """Operations of all layers' attention over one text, linear layers left out.

    Softmax: a score of every pair of tokens, and the values it weighs. A state `[D, D]` of a head,
    updated and read by each token, once from either side.

    Args:
        shape: the architecture.
        tokens: of the text.
    """
    width, found = shape.num_heads * shape.head_dim, 0
    for layer in range(shape.num_layers):
        is_softmax = shape.layer_kind(layer).attention is None
        found += 4 * tokens * width * (tokens if is_softmax else 2 * shape.head_dim)
    return found
