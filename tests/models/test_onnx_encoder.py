"""A DINOv2 backbone within an ONNX file: what we read of it computes what the file does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeattn.errors import CheckpointError
from edgeattn.models.encoder_checkpoint import is_encoder, open_encoder
from edgeattn.models.encoder_model import encoder_of, load_encoder
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.verify.tolerance import relative_error

_STATES = "/backbone/layernorm/Add_1_output_0"


def test_it_gives_the_states_that_the_file_gives(vit_small: Path) -> None:
    assert is_encoder(vit_small)
    checkpoint = open_encoder(vit_small)
    shape = checkpoint.shape
    assert (shape.family, shape.num_layers, shape.num_heads) == ("dinov2", 12, 6)
    assert shape.norm_eps == pytest.approx(1e-6)
    proto = onnx.load(vit_small)
    proto.graph.output.append(onnx.ValueInfoProto(name=_STATES))
    session = open_onnxruntime(proto.SerializeToString())
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    (expected,) = session.run([_STATES], {"input_image": pixels})
    model = encoder_of(shape, checkpoint.weights)
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    with torch.inference_mode():
        found = load_encoder(model, **dtypes)(torch.from_numpy(pixels)).output.numpy()
    assert relative_error(found.reshape(-1, 384), expected.reshape(-1, 384)) < 1e-5


_UP = "backbone.encoder.layer.0.mlp.fc1.bias"
_PATCHES = "backbone.embeddings.patch_embeddings.projection.weight"


def _changed(vit_small: Path, path: Path, name: str, value: np.ndarray | None) -> Path:
    """The file with another initialiser, or one whose data lies in a file that is not there."""
    proto = onnx.load(vit_small)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    if value is not None:
        tensor.CopyFrom(numpy_helper.from_array(value, name))
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="nowhere.bin")
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (_UP, np.float32(1), "of another shape"),
        (_PATCHES, np.zeros(384, np.float32), "of another shape"),
        (_UP, None, "external data is missing"),
    ],
)
def test_a_damaged_backbone_is_refused(
    name: str, value: np.ndarray | None, said: str, vit_small: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_encoder(_changed(vit_small, tmp_path / "model.onnx", name, value))


def test_a_backbone_without_an_input_is_refused(vit_small: Path, tmp_path: Path) -> None:
    proto = onnx.load(vit_small)
    del proto.graph.input[:]
    proto.graph.node.append(helper.make_node("Constant", [], ["empty"]))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match="one input, images of a fixed size"):
        open_encoder(tmp_path / "model.onnx")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="it does not parse"):
        open_encoder(path)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
    onnx.save(helper.make_model(graph), path)
    with pytest.raises(CheckpointError, match="class token"):
        open_encoder(path)
