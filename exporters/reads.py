"""Nodes in front of linear layers that do not read their input as it is: R4, int8 rounding."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeattn.exporters.inserter import Inserter
from edgeattn.quant.activation import LinearInput


def insert_reads(model: ir.Model, reads: Mapping[str, LinearInput], inserter: Inserter) -> None:
    """Lets each linear layer of a stamped graph read its input as `reads` says.

    Layers that read one input alike share the nodes. Rounding is the pair of QuantizeLinear and
    DequantizeLinear that ONNX Runtime and TensorRT fuse into integer products.

    Args:
        model: changed in place.
        reads: by the name of the layer's weight.
        inserter: of this model.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.name is None:
            continue
        read = reads.get(weight.name.removesuffix("_dequantized"))
        if read is not None:
            node.replace_input_with(0, _read(node, read, inserter))


def _read(node: ir.Node, read: LinearInput, inserter: Inserter) -> ir.Value:
    """What the first input of `node` becomes."""
    value = node.inputs[0]
    assert value is not None
    if read.rotation is not None:
        value = inserter.rotate(node, value, read.rotation)
    if read.scale is None:
        return value
    return inserter.from_int8(node, inserter.to_int8(node, value, read.scale), read.scale)
