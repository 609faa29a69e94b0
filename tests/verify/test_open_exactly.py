"""A graph opened for a proof gives further values as it computes them, where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

from edgeattn.devices.registry import parse_target
from edgeattn.planner.lowering import plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.verify.ort_backend import open_exactly


def test_a_value_is_not_rounded_for_its_reader(tmp_path: Path) -> None:
    """Heads are merged and then rounded, as after attention in a calibrated scheme.

    ONNX Runtime 1.30 and later round h itself where `keep_rounding` does not reach it.
    """
    lowering = plan_lowering(Recipe("cpu"), parse_target("cpu"))
    file = write_merged_heads(tmp_path / "model.onnx")
    name, session = open_exactly(
        file, lowering, hidden=False, expose=["h"], keep_rounding=True, provider="cpu"
    )
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 2, 2)
    h, y = session.run(["h", "y"], {"x": x})
    assert name == "onnxruntime"
    np.testing.assert_allclose(h, np.tanh(x), atol=1e-6)
    merged = np.tanh(x).transpose(0, 2, 1, 3).reshape(1, 2, 8)
    np.testing.assert_allclose(y, np.round(merged * 2) / 2, atol=1e-6)


def write_merged_heads(file: Path) -> Path:
    """A graph whose value h [B, H, T, D] becomes [B, T, H D], rounded to multiples of 1/2."""
    constants = {
        "sizes": np.array([0, 0, -1]),
        "step": np.array(0.5, np.float32),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("Tanh", ["x"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "sizes"], ["merged"]),
        helper.make_node("QuantizeLinear", ["merged", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "merged",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 21)
    save_model(helper.make_model(graph, opset_imports=[opset], ir_version=10), file)
    return file
