"""Int8 caches: past and present become int8, what the attention reads is converted back."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeattn.exporters.inserter import Inserter
from edgeattn.quant.kv_cache import Int8Cache

_JOINS = ("Concat", "TensorScatter")
_REARRANGED = ("Unsqueeze", "Transpose")


def insert_int8_caches(
    model: ir.Model, caches: Mapping[int, Int8Cache], inserter: Inserter
) -> None:
    """Lets the layers of a stamped graph hold keys and values as `caches` says.

    New keys and values are rounded before they are joined with past ones, so that each is rounded
    once, and the graph's inputs and outputs are the integers.

    Args:
        model: changed in place; its caches are joined by Concat or written by TensorScatter.
        caches: by layer.
        inserter: of this model.
    """
    joins = {node.outputs[0].name: node for node in model.graph if node.op_type in _JOINS}
    for layer, cache in caches.items():
        key, value = (joins[f"present.{layer}.{part}"] for part in ("key", "value"))
        if cache.rotation is not None:
            # Queries are the first operand of the product with keys, and their last axes agree.
            scores, _ = _product(key)
            for node, place in ((key, 1), (scores, 0)):
                operand = node.inputs[place]
                assert operand is not None
                node.replace_input_with(place, inserter.rotate(node, operand, cache.rotation))
        _hold_as_int8(key, cache.key_scale, inserter)
        _hold_as_int8(value, cache.value_scale, inserter)


def _hold_as_int8(join: ir.Node, scale: float, inserter: Inserter) -> None:
    past, new = join.inputs[:2]
    assert past is not None
    assert new is not None
    join.replace_input_with(1, inserter.to_int8(join, new, scale))
    past.type = join.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    # Right before the product: ONNX Runtime 1.31 moves a DequantizeLinear down past an Unsqueeze
    # and then refuses what it wrote (its issue 25526).
    product, place = _product(join)
    integers = product.inputs[place]
    assert integers is not None
    product.replace_input_with(place, inserter.from_int8(product, integers, scale))


def _product(join: ir.Node) -> tuple[ir.Node, int]:
    """The attention, or the product of its spelling, that reads what `join` gives, and where."""
    ((node, place),) = join.outputs[0].uses()
    while node.op_type in _REARRANGED:
        ((node, place),) = node.outputs[0].uses()
    return node, place
