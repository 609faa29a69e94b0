"""Stamps a traced block once per layer between the traced embedding and head.

The trace says where a block begins and ends (`Trace.hidden`); everything between depends on the
layer's own parameters, cache and residual stream and is copied per layer. All else (mask, rotary
caches, shape arithmetic, constants) is shared.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from edgeattn.encoder_shape import EncoderShape
from edgeattn.exporters.trace import Trace
from edgeattn.exporters.weights import WeightBinder
from edgeattn.models.families import EMBEDDING, LM_HEAD


def stamp(trace: Trace, binder: WeightBinder) -> ir.Model:
    """The graph of the whole model, its parameters bound but not yet written.

    Args:
        trace: one layer per kind, or all of them (then nothing is repeated; tests compare the
            two).
        binder: creates the initialisers; its model says how many layers there are.
    """
    return _Stamper(trace, binder).build()


class _Stamper:
    def __init__(self, trace: Trace, binder: WeightBinder) -> None:
        self.trace = trace
        self.binder = binder
        self.source = trace.model.graph
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        # Values of the trace -> values of the new graph, for what all layers share.
        self.shared: dict[ir.Value, ir.Value] = {}

    def build(self) -> ir.Model:
        shape = self.binder.model.shape
        blocks = [self._block_nodes(i) for i in range(len(self.trace.kinds))]
        in_block = set().union(*blocks)
        tail = _descendants(self.source, [self._value(self.trace.hidden[-1])])
        for value in self.source.inputs:
            if not (value.name or "").startswith("past_key_values."):
                self._copy_input(value, value.name or "", self.shared)
        self._copy_nodes((n for n in self.source if n not in in_block | tail), self.shared, "")
        presents: list[ir.Value] = []
        hidden = self.shared[self._value(self.trace.hidden[0])]
        for layer in range(shape.num_layers):
            block = self.trace.block_of(layer, shape)
            hidden, present = self._copy_block(layer, block, blocks[block], hidden)
            presents += present
        self.shared[self._value(self.trace.hidden[-1])] = hidden
        self._copy_nodes((n for n in self.source if n in tail), self.shared, "")
        outputs = [self.shared[self._value(name)] for name in self.trace.outputs]
        return self._model([*outputs, *presents])

    def _block_nodes(self, block: int) -> set[ir.Node]:
        prefix, start = f"layers.{block}.", self._value(self.trace.hidden[block])
        begin = [start, *self._past(block)]
        begin += [v for n, v in self.source.initializers.items() if n.startswith(prefix)]
        end = [self._value(self.trace.hidden[block + 1]), *self._present(block)]
        return _descendants(self.source, begin) & _ancestors(end)

    def _copy_block(
        self, layer: int, block: int, nodes: set[ir.Node], hidden: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Copies the block traced as layer `block` as layer `layer`."""
        values = dict(self.shared)
        values[self._value(self.trace.hidden[block])] = hidden
        for past in self._past(block):
            name = (past.name or "").replace(f".{block}.", f".{layer}.")
            self._copy_input(past, name, values)
        self._copy_nodes((n for n in self.source if n in nodes), values, f"layers.{layer}.", block)
        presents = [values[v] for v in self._present(block)]
        for value, traced in zip(presents, self._present(block), strict=True):
            value.name = (traced.name or "").replace(f".{block}.", f".{layer}.")
            value.shape, value.type = traced.shape, traced.type
        output = values[self._value(self.trace.hidden[block + 1])]
        output.name = f"hidden.{layer + 1}"
        return output, presents

    def _copy_nodes(
        self,
        nodes: Iterable[ir.Node],
        values: dict[ir.Value, ir.Value],
        prefix: str,
        block: int | None = None,
    ) -> None:
        for node in nodes:
            first = node.inputs[0] if node.inputs else None
            name = self._parameter_name(first, prefix, block)
            if first is None or name is None:
                self._copy_node(node, values, prefix, block)
            elif node.op_type == "Transpose" and name != EMBEDDING:
                # A linear layer: MatMul takes its weight as [inputs, outputs], stored that way.
                values[node.outputs[0]] = self._matrix(name, transposed=True)
            elif node.op_type == "Transpose":
                # The tied head shares the embedding's bytes, so it is transposed in the graph.
                values[first] = self._matrix(name, transposed=False, use=LM_HEAD)
                self._copy_node(node, values, prefix, block)
                del values[first]
            elif name == EMBEDDING and node.op_type == "Gather":
                indices = node.inputs[1]
                assert indices is not None
                new = self.binder.rows(name, values[indices], node.outputs[0].name or "")
                self.nodes += new
                values[node.outputs[0]] = new[-1].outputs[0]
            else:
                self._copy_node(node, values, prefix, block)

    def _copy_node(
        self, node: ir.Node, values: dict[ir.Value, ir.Value], prefix: str, block: int | None
    ) -> None:
        inputs = [None if v is None else self._input(v, values, prefix, block) for v in node.inputs]
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=prefix + (node.name or ""),
        )
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.name = prefix + (old.name or "")
            value.shape, value.type = old.shape, old.type
            values[old] = value
        self.nodes.append(new)

    def _input(
        self, value: ir.Value, values: dict[ir.Value, ir.Value], prefix: str, block: int | None
    ) -> ir.Value:
        if value in values:
            return values[value]
        assert value.is_initializer(), f"{value.name} is used before it is computed"
        name = self._parameter_name(value, prefix, block)
        if name:
            return self.binder.parameter(name)
        constant = ir.Value(name=value.name, const_value=value.const_value)
        constant.type, constant.shape = value.type, value.shape
        self.constants.append(constant)
        self.shared[value] = values[value] = constant
        return constant

    def _parameter_name(self, value: ir.Value | None, prefix: str, block: int | None) -> str | None:
        """The decoder parameter an initialiser of the trace stands for in this layer, if any."""
        if value is None or not value.is_initializer() or value.const_value is not None:
            return None
        name = value.name or ""
        if block is None or name in self.binder.rotary:
            return name
        return name.replace(f"layers.{block}.", prefix)

    def _matrix(self, name: str, *, transposed: bool, use: str = "") -> ir.Value:
        value, nodes = self.binder.matrix(name, transposed=transposed, use=use)
        self.nodes += nodes
        return value

    def _copy_input(self, value: ir.Value, name: str, values: dict[ir.Value, ir.Value]) -> None:
        values[value] = ir.Value(name=name, type=value.type, shape=value.shape)
        self.inputs.append(values[value])

    def _value(self, name: str) -> ir.Value:
        for value in self.source.outputs:
            if value.name == name:
                return value
        raise KeyError(name)

    def _past(self, block: int) -> list[ir.Value]:
        prefix = f"past_key_values.{block}."
        return [v for v in self.source.inputs if (v.name or "").startswith(prefix)]

    def _present(self, block: int) -> list[ir.Value]:
        prefix = f"present.{block}."
        return [v for v in self.source.outputs if (v.name or "").startswith(prefix)]

    def _model(self, outputs: list[ir.Value]) -> ir.Model:
        stored = [s.value for s in self.binder.stored.values()]
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=[*stored, *self.constants],
            opset_imports=dict(self.source.opset_imports),
            name="encoder" if isinstance(self.binder.model.shape, EncoderShape) else "decoder",
        )
        return ir.Model(graph, ir_version=self.trace.model.ir_version, producer_name="edgeattn")


def _descendants(graph: ir.Graph, values: Iterable[ir.Value]) -> set[ir.Node]:
    """Nodes that depend on any of `values` (the graph is in topological order)."""
    reached, found = set(values), set()
    for node in graph:
        if any(v in reached for v in node.inputs):
            found.add(node)
            reached.update(node.outputs)
    return found


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    """Nodes that any of `values` depends on."""
    found: set[ir.Node] = set()
    waiting = [v.producer() for v in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [v.producer() for v in node.inputs if v is not None]
    return found
