"""What all function bodies and nodes of domain `edgeattn` have in common, in onnx-ir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    FLOAT, BOOL = int(ir.DataType.FLOAT), int(ir.DataType.BOOL)  # for Cast
    INT32, INT64 = int(ir.DataType.INT32), int(ir.DataType.INT64)

    def __init__(self, spec: OpSpec, opset: int, *, prefix: str = "") -> None:
        self._spec, self._opset, self._prefix, self._tape = spec, opset, prefix, Tape()
        self.inputs = tuple(ir.Value(name=tensor.name) for tensor in spec.inputs)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The one output of a new node of a standard operator."""
        return self._tape.op(op_type, inputs, attributes, output=self._new_value())

    def _new_value(self) -> ir.Value:
        # A subgraph must not use a name of the graph around it.
        return ir.Value(name=f"{self._prefix}{len(self._tape.nodes)}")

    def ints(self, *values: int) -> ir.Value:
        """A constant of rank 1, int64."""
        return self.op("Constant", value_ints=values)

    def scalar(self, value: int) -> ir.Value:
        """A constant of rank 0, int64."""
        return self.op("Constant", value_int=value)

    def floats(self, *values: float) -> ir.Value:
        """A constant of rank 1, fp32."""
        return self.op("Constant", value_floats=values)

    def attribute(self, name: str) -> ir.Value:
        """What the node has as its attribute `name`: a number of rank 0."""
        kind = {a.name: a.type for a in self._spec.attributes}[name]
        reference = ir.RefAttr(f"value_{kind}", name, ir.AttributeType[kind.upper()])
        return self.op("Constant", **{reference.name: reference})

    def fp32(self, value: ir.Value) -> ir.Value:
        """`value` in fp32."""
        return self.op("Cast", value, to=self.FLOAT)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension, `[1]`."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def dims(self, sizes: Mapping[str, ir.Value], *symbols: str | int) -> ir.Value:
        """A shape out of sizes `[1]` and numbers."""
        parts = [sizes[s] if isinstance(s, str) else self.ints(s) for s in symbols]
        return self.op("Concat", *parts, axis=0)

    def reshape(
        self, value: ir.Value, sizes: Mapping[str, ir.Value], *symbols: str | int
    ) -> ir.Value:
        """`value` in a shape as `dims` takes it."""
        return self.op("Reshape", value, self.dims(sizes, *symbols))

    def last(self, value: ir.Value, axis: int) -> ir.Value:
        """The last slice along an axis, which stays."""
        end = self.ints(2**63 - 1)
        return self.op("Slice", value, self.ints(-1), end, self.ints(axis))

    def reversed(self, value: ir.Value) -> ir.Value:
        """`value` from its end to its start along axis 0."""
        steps = self.ints(-1)
        return self.op("Slice", value, steps, self.ints(-(2**63) + 1), self.ints(0), steps)

    def scale(self, width: ir.Value) -> ir.Value:
        """The attribute `scale`, or 1 / sqrt(width) where that is 0."""
        given = self.attribute("scale")
        usual = self.op("Reciprocal", self.op("Sqrt", self.fp32(width)))
        return self.op("Where", self.op("Equal", given, self.floats(0.0)), usual, given)

    def chunk_sizes(self, length: ir.Value, chunk: int) -> dict[str, ir.Value]:
        """How `length` rows are cut: N chunks of C rows, NC, and how many rows are added, `pad`.

        C is `chunk`, or the length where that is less; there is a chunk even without rows.
        """
        some = self.op("Max", length, self.ints(1))
        rows = self.op("Min", some, self.ints(chunk))
        above = self.op("Sub", self.op("Add", some, rows), self.ints(1))
        sizes = {"C": rows, "N": self.op("Div", above, rows)}
        sizes["NC"] = self.op("Mul", sizes["N"], rows)
        return {**sizes, "pad": self.op("Sub", sizes["NC"], length)}

    def chunked(
        self, rows: ir.Value, sizes: Mapping[str, ir.Value], heads: str, width: str | int
    ) -> ir.Value:
        """`[B, heads, T, width]` as `[N, B, heads, C, width]`, filled up with zeros."""
        zeros = self.op("ConstantOfShape", self.dims(sizes, "B", heads, "pad", width))
        whole = self.op("Concat", rows, zeros, axis=2)
        whole = self.reshape(whole, sizes, "B", heads, "N", "C", width)
        return self.op("Transpose", whole, perm=(2, 0, 1, 3, 4))

    def scan(
        self,
        states: Mapping[str, ir.Value],
        rows: Mapping[str, ir.Value],
        step: Callable[[Body, dict[str, ir.Value]], tuple[list[ir.Value], list[ir.Value]]],
    ) -> tuple[list[ir.Value], list[ir.Value]]:
        """A Scan along axis 0, the only one that onnx's own evaluator knows; all in fp32.

        Args:
            states: first values of what is carried on.
            rows: what is walked along.
            step: (the body of the Scan, its values by name) -> next states and rows of the outputs;
                it may read values of this body.

        Returns:
            The last states, and the outputs.
        """
        inner = Body(self._spec, self._opset, prefix="step_")
        given = {name: _fp32_value(f"{inner._prefix}{name}") for name in (*states, *rows)}
        next_states, outputs = step(inner, given)
        results = [*next_states, *outputs]
        for value in results:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph(
            list(given.values()), results, nodes=inner._tape.nodes, name=f"{self._spec.name}_step"
        )
        found = self._tape.op_multi_out(
            "Scan",
            [*states.values(), *rows.values()],
            {"body": body, "num_scan_inputs": len(rows)},
            outputs=[ir.Value(name=f"scanned_{i}") for i in range(len(results))],
        )
        return list(found[: len(states)]), list(found[len(states) :])

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


def _fp32_value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
