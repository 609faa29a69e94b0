"""Puts nodes with few constants into a stamped graph: Hadamard transforms, rounding to int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeattn.ops.function import node as op_node
from edgeattn.ops.hadamard_transform import SPEC as HADAMARD
from edgeattn.ops.spec import DOMAIN, OP_VERSION
from edgeattn.quant.hadamard import HadamardFactors


class Inserter:
    """Adds nodes right before the ones that read them; what was added for a value is used again.

    Args:
        model: changed in place.
        dtype: of activations.
    """

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self._model, self._graph, self._dtype = model, model.graph, dtype
        self._made: dict[tuple[str, str, object], ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._names: set[str] = set()

    def rotate(self, before: ir.Node, value: ir.Value, factors: HadamardFactors) -> ir.Value:
        """`value`, its last axis rotated by a node of edgeattn::HadamardTransform."""
        key = ("rotate", value.name or "", id(factors))
        if key not in self._made:
            operands = [
                self._constant(f"hadamard_{side}_{len(matrix)}", matrix.numpy())
                for side, matrix in (("left", factors.left), ("right", factors.right))
            ]
            rotate = op_node(HADAMARD, [value, *operands], name=f"{value.name}:HadamardTransform")
            self._made[key] = self._insert(before, rotate, f"{value.name}_rotated", value)
            function = HADAMARD.function_body(self._graph.opset_imports[""])
            self._model.functions.setdefault(function.identifier(), function)
            self._graph.opset_imports[DOMAIN] = OP_VERSION
        return self._made[key]

    def to_int8(self, before: ir.Node, value: ir.Value, scale: float) -> ir.Value:
        """`value` / scale, rounded."""
        key = ("to", value.name or "", scale)
        if key not in self._made:
            name = f"{value.name}_int8"
            operands = [value, *self._scale(name, scale)]
            quantize = ir.node("QuantizeLinear", operands, name=f"{name}:QuantizeLinear")
            self._made[key] = self._insert(before, quantize, name, value)
            self._made[key].type = ir.TensorType(ir.DataType.INT8)
        return self._made[key]

    def from_int8(self, before: ir.Node, value: ir.Value, scale: float) -> ir.Value:
        """`value` * scale in the dtype of activations."""
        key = ("from", value.name or "", scale)
        if key not in self._made:
            operands = [value, *self._scale(value.name or "", scale)]
            node = ir.node("DequantizeLinear", operands, name=f"{value.name}:DequantizeLinear")
            self._made[key] = self._insert(before, node, f"{value.name}_dequantized", value)
            self._made[key].type = ir.TensorType(self._dtype)
        return self._made[key]

    def _scale(self, name: str, scale: float) -> tuple[ir.Value, ir.Value]:
        # Without a zero point of its type QuantizeLinear would give uint8.
        zero = self._constant("int8_zero_point", np.array(0, np.int8))
        return self._constant(f"{name}_scale", np.array(scale)), zero

    def _insert(self, before: ir.Node, node: ir.Node, name: str, like: ir.Value) -> ir.Value:
        assert name not in self._names, f"{name} is made twice, in two ways"
        self._names.add(name)
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
