"""Checks of a written graph that need no runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.errors import ProofError
from edgeattn.ops.spec import DOMAIN, PLUGIN_ATTRIBUTES

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

# What TensorRT's parser takes from a function body only in another spelling, or not at all.
_REFUSED_OPERATORS = {
    "Compress": "use Where with a mask",
    "NonZero": "use Where with a mask",
    "BitwiseAnd": "use And on truth values",
    "DFT": "multiply with a matrix",
}
_REDUCTIONS = ("ScatterElements", "ScatterND")
_EXTREMES = ("ReduceMax", "ReduceMin")
# Operators that give truth values whatever they take; Cast gives them where it is told to.
_TRUTHS = {
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("And", "Or", "Xor", "Not", "IsNaN", "IsInf"),
}


def check_graph(model_file: Path) -> None:
    """Runs onnx's checker with shape inference on a file and its external data, then `lint`.

    Raises:
        ProofError: the file is no valid ONNX, or TensorRT's parser would mistake it.
    """
    import onnx

    try:
        onnx.checker.check_model(str(model_file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ProofError(
            expected="the exported graph to be valid ONNX",
            came=f"the checker says: {first}",
            todo="report this graph with the checkpoint's name",
        ) from error
    for problem in lint(onnx.load(model_file, load_external_data=False)):
        raise ProofError(
            expected="functions that ONNX Runtime and TensorRT's parser read alike",
            came=problem,
            todo="report this graph with the checkpoint's name",
        )


def lint(model: ModelProto) -> Iterator[str]:
    """What is valid ONNX in functions of domain edgeattn, and a trap in TensorRT, as clauses.

    - Its parser corrupts initialisers of subgraphs of functions, silently (measured).
    - It fails on omitted inputs of function nodes, and knows operators by name alone.
    - onnx's checker refuses another opset than the model's for some operators.
    - Without its plugin attributes a node never finds its plugin, silently.
    """
    import onnx

    builtin = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain != DOMAIN}
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    functions = [function for function in model.functions if function.domain == DOMAIN]
    for function in functions:
        where = f"function {function.name}"
        if function.name in builtin:
            yield f"{where} has the name of a built-in operator"
        for entry in function.opset_import:
            if opsets.get(entry.domain) != entry.version:
                models = opsets.get(entry.domain)
                yield f"{where} is of opset {entry.version}, the model of {models}"
        yield from _lint_body(where, function)
    for node in _nodes(model.graph.node):
        if node.domain == DOMAIN:
            yield from _lint_node(node, {function.name: function for function in functions})


def _lint_body(where: str, function: FunctionProto) -> Iterator[str]:
    for node in _nodes(function.node):
        if not all(node.input):
            yield f"{where} omits an input of {node.op_type}"
        for graph in _subgraphs(node):
            if graph.initializer or graph.sparse_initializer:
                yield f"{where} has initialisers in a subgraph of {node.op_type}"
        if node.op_type in _REFUSED_OPERATORS:
            yield f"{where} uses {node.op_type}: {_REFUSED_OPERATORS[node.op_type]}"
        reduction = [a.s for a in node.attribute if a.name == "reduction"]
        if node.op_type in _REDUCTIONS and reduction not in ([], [b"none"]):
            yield f"{where} uses {node.op_type} with a reduction"
        if node.op_type in _EXTREMES and node.input[0] in _truths(function):
            yield f"{where} uses {node.op_type} on truth values: use Cast before it"
        axes = node.input[1:] if node.op_type.startswith("Reduce") else []
        if not set(axes) <= _constants(function):
            yield f"{where} computes the axes of {node.op_type}"


def _lint_node(node: NodeProto, functions: Mapping[str, FunctionProto]) -> Iterator[str]:
    where = f"node {node.name or node.op_type}"
    given = {a.name: a.s.decode() for a in node.attribute if a.name in PLUGIN_ATTRIBUTES}
    if given != dict(PLUGIN_ATTRIBUTES):
        yield f"{where} lacks the attributes by which TensorRT finds its plugin"
    if not all(node.input):
        yield f"{where} omits an input"
    function = functions.get(node.op_type)
    if function is None:
        yield f"{where} has no function body"
    elif len(function.input) != len(node.input):
        yield f"{where} has {len(node.input)} inputs, its function {len(function.input)}"


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _nodes(graph.node)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _constants(function: FunctionProto) -> set[str]:
    return {name for n in _nodes(function.node) if n.op_type == "Constant" for name in n.output}


def _truths(function: FunctionProto) -> set[str]:
    from onnx import TensorProto

    return {
        name
        for node in _nodes(function.node)
        if node.op_type in _TRUTHS
        or (node.op_type == "Cast" and any(a.i == TensorProto.BOOL for a in node.attribute))
        for name in node.output
    }
