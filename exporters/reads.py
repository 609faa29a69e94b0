"""Nodes in front of linear layers that do not read their input as it is: R4, int8 rounding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgeattn.ops.function import node as op_node
from edgeattn.ops.hadamard_transform import SPEC as HADAMARD
from edgeattn.ops.spec import DOMAIN, OP_VERSION
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.hadamard import HadamardFactors


def insert_reads(model: ir.Model, reads: Mapping[str, LinearInput], dtype: ir.DataType) -> None:
    """Lets each linear layer of a stamped graph read its input as `reads` says.

    Layers that read one input alike share the nodes. A rotation is a node of
    edgeattn::HadamardTransform with its function body; rounding is the pair of QuantizeLinear and
    DequantizeLinear that ONNX Runtime and TensorRT fuse into integer products.

    Args:
        model: changed in place.
        reads: by the name of the layer's weight.
        dtype: of activations.
    """
    inserter = _Inserter(model, dtype)
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.name is None:
            continue
        read = reads.get(weight.name.removesuffix("_dequantized"))
        if read is not None:
            node.replace_input_with(0, inserter.read(node, read))


class _Inserter:
    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self._model, self._graph, self._dtype = model, model.graph, dtype
        self._made: dict[tuple[str, object], ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def read(self, node: ir.Node, read: LinearInput) -> ir.Value:
        """What the first input of `node` becomes."""
        value = node.inputs[0]
        assert value is not None
        if read.rotation is not None:
            value = self._rotate(node, value, read.rotation)
        return value if read.scale is None else self._round(node, value, read.scale)

    def _rotate(self, before: ir.Node, value: ir.Value, factors: HadamardFactors) -> ir.Value:
        key = (value.name or "", id(factors))
        if key not in self._made:
            operands = [
                self._constant(f"hadamard_{side}_{len(matrix)}", matrix.numpy())
                for side, matrix in (("left", factors.left), ("right", factors.right))
            ]
            rotate = op_node(HADAMARD, [value, *operands], name=f"{value.name}:HadamardTransform")
            self._made[key] = self._insert(before, rotate, f"{value.name}_rotated", value)
            opset = self._graph.opset_imports[""]
            function = HADAMARD.function_body(opset)
            self._model.functions.setdefault(function.identifier(), function)
            self._graph.opset_imports[DOMAIN] = OP_VERSION
        return self._made[key]

    def _round(self, before: ir.Node, value: ir.Value, scale: float) -> ir.Value:
        key = (value.name or "", scale)
        if key not in self._made:
            name = f"{value.name}_int8"
            # Without a zero point of its type QuantizeLinear would give uint8.
            operands = [
                self._constant(f"{name}_scale", np.array(scale)),
                self._constant("int8_zero_point", np.array(0, np.int8)),
            ]
            to_int8 = ir.node("QuantizeLinear", [value, *operands], name=f"{name}:QuantizeLinear")
            integers = self._insert(before, to_int8, name, value)
            integers.type = ir.TensorType(ir.DataType.INT8)
            back = ir.node("DequantizeLinear", [integers, *operands], name=f"{name}:Dequantize")
            self._made[key] = self._insert(before, back, f"{name}_dequantized", value)
        return self._made[key]

    def _insert(self, before: ir.Node, node: ir.Node, name: str, like: ir.Value) -> ir.Value:
        output = node.outputs[0]
        output.name, output.type, output.shape = name, like.type, like.shape
        self._graph.insert_before(before, node)
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser in the graph's own file; floating-point ones in the graph's dtype."""
        if name not in self._constants:
            if array.dtype != np.int8:
                array = array.astype(self._dtype.numpy())
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor)
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self._graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]
