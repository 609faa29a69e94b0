"""One traced block stamped three times equals the trace of all three, for every family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import onnx
import torch
from encoders import inputs_of, save_encoder

from edgeattn.devices.registry import all_targets, parse_target
from edgeattn.exporters.export import export_graph
from edgeattn.exporters.stamp import stamp
from edgeattn.exporters.trace_encoder import trace_encoder
from edgeattn.exporters.weights import WeightBinder
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_model import EncoderModel, encoder_of, load_encoder
from edgeattn.planner.encoder_lowering import fit_encoder_lowering
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def model_and_lowering(
    path: Path, name: str, target: str, dtype: str | None = "fp32"
) -> tuple[EncoderModel, Lowering]:
    save_encoder(name, path)
    checkpoint, found = open_encoder(path), parse_target(target)
    lowering = plan_lowering(Recipe(target, dtype=dtype), found)
    lowering = fit_encoder_lowering(lowering, checkpoint.shape, found)
    return encoder_of(checkpoint.shape, checkpoint.weights), lowering


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert", "cpu"), ("dinov2", "jetson-orin@jetpack6.2"), ("eurobert", "cpu")],
)
def test_stamped_and_whole_are_one_graph(tmp_path: Path, name: str, target: str) -> None:
    model, lowering = model_and_lowering(tmp_path, name, target)
    graphs = []
    for whole in (False, True):
        binder = WeightBinder(model, lowering)
        graphs.append(stamp(trace_encoder(model.shape, lowering, whole=whole), binder).graph)
    stamped, whole_graph = (Counter(node.op_type for node in graph) for graph in graphs)
    assert stamped == whole_graph
    names = [{value.name for value in graph.initializers.values()} for graph in graphs]
    parameters = [{n for n in found if n and not n.startswith("val_")} for found in names]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["bert-classifier", "vit-wide", "eurobert"])
def test_the_graph_gives_what_torch_gives(tmp_path: Path, name: str) -> None:
    model, lowering = model_and_lowering(tmp_path, name, "cpu")
    graph = tmp_path / "model.onnx"
    export_graph(model, lowering, graph, tmp_path / "model.onnx.data")
    session = open_onnxruntime(graph)
    inputs = inputs_of(name)
    assert [value.name for value in session.get_inputs()] == list(inputs)
    (found,) = session.run([model.shape.output], {n: v.numpy() for n, v in inputs.items()})
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    with torch.no_grad():
        expected = load_encoder(model, **dtypes)(*inputs.values()).output
    valid = (
        inputs["attention_mask"].bool() if expected.dim() == 3 and "input_ids" in inputs else ...
    )
    torch.testing.assert_close(torch.from_numpy(found)[valid], expected[valid], rtol=0, atol=2e-5)


# One device of each software stack, whose graphs it fixes.
STACKS = {
    found.software.name: f"{found.device.name}@{found.software.name}" for found in all_targets()
}


@pytest.mark.parametrize("target", STACKS.values())
def test_an_encoder_of_images_is_the_same_function_everywhere(tmp_path: Path, target: str) -> None:
    """A target's opset and its spelling of attention change the graph and not what it gives."""
    model, lowering = model_and_lowering(tmp_path, "vit", target, dtype=None)
    graph = tmp_path / "model.onnx"
    export_graph(model, lowering, graph, tmp_path / "model.onnx.data")
    (pixels,) = inputs_of("vit").values()
    session = open_onnxruntime(graph)
    fed = pixels.numpy().astype(NUMPY[session.get_inputs()[0].type])
    (found,) = session.run([model.shape.output], {"pixel_values": fed})
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    with torch.no_grad():
        expected = load_encoder(model, **dtypes)(pixels).output
    error = 2e-5 if lowering.dtype == "fp32" else 1e-2
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=0, atol=error)


def test_dimensions_have_the_names_clients_know(tmp_path: Path) -> None:
    model, lowering = model_and_lowering(tmp_path, "bert", "cpu")
    export_graph(model, lowering, tmp_path / "model.onnx", tmp_path / "model.onnx.data")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    row = ["batch_size", "sequence_length"]
    assert shapes == {
        "input_ids": row,
        "attention_mask": row,
        "token_type_ids": row,
        "last_hidden_state": [*row, 64],
    }
