"""A real TensorRT builder takes and refuses what the target files say, for every SM it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import GraphProto, TensorProto, helper, save_model

from edgeattn.devices.registry import parse_target
from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
    ),
]

ONNX_DTYPES = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
HEADS, KV_HEADS, WIDTH = 4, 2, 64
OPSET = [helper.make_opsetid("", 23)]
BY_SM = pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])


def attention(folder: Path, dtype: str) -> Path:
    """Grouped attention with a mask, as the exporter writes it."""
    kind = ONNX_DTYPES[dtype]
    tensor = helper.make_tensor_value_info
    inputs = [
        tensor("q", kind, [1, HEADS, "t", WIDTH]),
        tensor("k", kind, [1, KV_HEADS, "s", WIDTH]),
        tensor("v", kind, [1, KV_HEADS, "s", WIDTH]),
        tensor("mask", TensorProto.BOOL, [1, 1, "t", "s"]),
    ]
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
    graph = helper.make_graph([node], "attention", inputs, [tensor("y", kind, None)])
    return save(folder, graph)


def int4_linear(folder: Path, group: int) -> Path:
    """x @ dequantised(w), `w` `[256, 256]` in blocks along its rows."""
    size = 256
    kind = TensorProto.FLOAT16
    tensor = helper.make_tensor_value_info
    scales = [size // group, size]
    weights = [
        helper.make_tensor("w", TensorProto.INT4, [size, size], bytes(size * size // 2), raw=True),
        helper.make_tensor("s", kind, scales, bytes(2 * scales[0] * scales[1]), raw=True),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=group),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "int4", [tensor("x", kind, ["n", size])], [tensor("y", kind, None)], weights
    )
    return save(folder, graph)


def save(folder: Path, graph: GraphProto) -> Path:
    path = folder / "model.onnx"
    save_model(helper.make_model(graph, opset_imports=OPSET, ir_version=10), path)
    return path


@BY_SM
@pytest.mark.parametrize("dtype", list(ONNX_DTYPES))
def test_standard_attention_is_built_in_the_dtypes_of_the_target(
    tmp_path: Path, sm: int, dtype: str
) -> None:
    target = parse_target(f"sm{sm}")
    lengths = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    profiles = {
        name: ((1, heads, 1, WIDTH), (1, heads, 4, WIDTH), (1, heads, 16, WIDTH))
        for name, heads in lengths.items()
    }
    profiles["mask"] = ((1, 1, 1, 1), (1, 1, 4, 4), (1, 1, 16, 16))
    report = check_build(attention(tmp_path, dtype), sm=sm, profiles=profiles, timeout_s=120)
    assert (report.status == "built") == (dtype in target.dtypes), report.reason


@BY_SM
@pytest.mark.parametrize("group", [64, 128])
def test_int4_weights_are_built_where_the_target_has_them(
    tmp_path: Path, sm: int, group: int
) -> None:
    target = parse_target(f"sm{sm}")
    profiles = {"x": ((1, 256), (4, 256), (8, 256))}
    report = check_build(int4_linear(tmp_path, group), sm=sm, profiles=profiles, timeout_s=120)
    assert (report.status == "built") == (group in target.int4_group_sizes), report.reason
