"""Rewrites of a stamped graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx import numpy_helper as numpy_tensor

from edgeattn.exporters.passes import fuse_residual_norms

WIDTH = 16


def _two_norms(gain: np.ndarray) -> ir.Model:
    """y, z = norm(a + b), norm(norm(a + b) + (a + b)), and the first sum itself."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["hidden.1"]),
        helper.make_node("RMSNormalization", ["hidden.1", "gain"], ["y"], epsilon=1e-3),
        helper.make_node("Add", ["hidden.1", "y"], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "gain"], ["z"], epsilon=1e-3),
        helper.make_node("RMSNormalization", ["a", "gain"], ["alone"], epsilon=1e-3),
    ]
    size = ["batch", "length", WIDTH]
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, size) for n in "abyz"}
    outputs = [values["y"], values["z"]]
    for name in ("hidden.1", "alone"):
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))
    graph = helper.make_graph(
        nodes,
        "norms",
        [values["a"], values["b"]],
        outputs,
        [numpy_tensor.from_array(gain, "gain")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return session.run(["y", "z", "hidden.1", "alone"], feeds)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).normal(size=(2, 2, 3, WIDTH)).astype(np.float32)
    return {"a": values[0], "b": values[1]}


def test_residual_norms_are_joined_and_numbers_stay(feeds: dict[str, np.ndarray]) -> None:
    gain = np.linspace(0.5, 2, WIDTH, dtype=np.float32)
    expected = _run(_two_norms(gain), feeds)
    model = _two_norms(gain)
    fuse_residual_norms(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2
    assert kinds.count("Add") == 0
    assert kinds.count("RMSNormalization") == 1  # of an input, which no addition makes
    for found, wanted in zip(_run(model, feeds), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_epsilon_is_carried_over(feeds: dict[str, np.ndarray]) -> None:
    model = _two_norms(np.ones(WIDTH, np.float32))
    fuse_residual_norms(model)
    small = {name: value * 1e-3 for name, value in feeds.items()}
    y = _run(model, small)[0]
    total = (small["a"] + small["b"]).astype(np.float64)
    expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-4)
