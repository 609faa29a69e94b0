"""What all function bodies and nodes of domain `edgeattn` have in common, in onnx-ir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from edgeattn.ops.spec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES, OpSpec


class Body:
    """Builds the ONNX function of an operator.

    Constants are nodes: a function has no initialisers, and TensorRT's parser corrupts those of
    subgraphs.

    Attributes:
        inputs: values named as in the dossier.
    """

    def __init__(self, spec: OpSpec, opset: int) -> None:
        self._spec, self._opset, self._tape = spec, opset, Tape()
        self.inputs = tuple(ir.Value(name=tensor.name) for tensor in spec.inputs)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The one output of a new node of a standard operator."""
        return self._tape.op(op_type, inputs, attributes)

    def ints(self, *values: int) -> ir.Value:
        """A constant of rank 1, int64."""
        return self.op("Constant", value_ints=values)

    def function(self, *outputs: ir.Value) -> ir.Function:
        """The function that gives `outputs`.

        It declares every attribute its nodes carry, as the ONNX standard demands, although onnx's
        checker and ONNX Runtime let undeclared ones pass. Defaults are given by `node`, so that
        the function needs none (they would ask for IR version 9).
        """
        for value, tensor in zip(outputs, self._spec.outputs, strict=True):
            value.name = tensor.name
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self._tape.nodes,
            opset_imports={"": self._opset},
            name=self._spec.name,
        )
        types = {a.name: ir.AttributeType[a.type.upper()] for a in self._spec.attributes}
        types |= dict.fromkeys(PLUGIN_ATTRIBUTES, ir.AttributeType.STRING)
        attributes = [ir.Attr(name, type, None) for name, type in types.items()]
        return ir.Function(DOMAIN, self._spec.name, graph=graph, attributes=attributes)


def node(
    spec: OpSpec,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> ir.Node:
    """A node of an operator, all its attributes written out; outputs get shapes where known.

    The model must import `DOMAIN` in version `OP_VERSION` and, to run without the plugin, hold
    `spec.function_body(opset)`.

    Args:
        spec: the operator.
        inputs: one value per input; their shapes are checked as far as they are known.
        attributes: those that differ from the defaults.
        name: of the node.

    Raises:
        RuntimeInputError: attributes or shapes do not fit the operator.
    """
    complete = spec.complete_attributes(attributes or {})
    result = ir.node(
        spec.name,
        inputs,
        {**complete, **PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        num_outputs=len(spec.outputs),
        version=OP_VERSION,
        name=name,
    )
    shapes = [value.shape for value in inputs]
    if all(shape is not None for shape in shapes):
        dims = [tuple(shape or ()) for shape in shapes]
        for value, shape in zip(result.outputs, spec.infer_shapes(dims, complete), strict=True):
            value.shape = ir.Shape(shape)
    return result
