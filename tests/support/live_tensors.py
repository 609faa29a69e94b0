"""How much memory the tensors of a graph take, node by node, where nothing is fused."""

from __future__ import annotations

import math
from pathlib import Path

import onnx

_ITEM_BYTES = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.BOOL: 1,
}


def largest_live_bytes(model_file: Path, *, rows: int, tokens: int, past: int) -> int:
    """The most that intermediate tensors take together; outputs, inputs and constants left out."""
    model = onnx.load(model_file, load_external_data=False)
    _fix_dimensions(model.graph, rows, tokens, past)
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    sizes = {value.name: _size(value) for value in graph.value_info}
    given = {t.name for t in (*graph.initializer, *graph.input, *graph.output)}
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    constant = {t.name for t in graph.initializer} | {""}
    live: dict[str, int] = {}
    most = 0
    for i, node in enumerate(graph.node):
        if constant.issuperset(node.input):
            constant.update(node.output)
            continue
        live |= {name: sizes.get(name, 0) for name in node.output if name not in given}
        most = max(most, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, i) > i}
    return most


def _fix_dimensions(graph: onnx.GraphProto, rows: int, tokens: int, past: int) -> None:
    known = {
        "batch_size": rows,
        "sequence_length": tokens,
        "past_sequence_length": past,
        "total_sequence_length": past + tokens,
    }
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = known[dim.dim_param]


def _size(value: onnx.ValueInfoProto) -> int:
    """0 where the shape is not known: what the mask is made of, a small part."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims):
        return 0
    return math.prod(dim.dim_value for dim in dims) * _ITEM_BYTES.get(tensor.elem_type, 8)
