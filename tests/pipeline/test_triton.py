"""Models for Triton: config.pbtxt read with Triton's own proto says what ONNX Runtime says."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

pytest.importorskip("torch")

from click.testing import CliRunner
from encoders import save_encoder
from fake_engine import write_engine

from edgeattn.bundle.bundle import Bundle, hash_file
from edgeattn.cli import main
from edgeattn.engine.profiles import EncoderProfile, Range
from edgeattn.errors import BundleError, LoweringError, UsageError
from edgeattn.pipeline import export
from edgeattn.pipeline.triton import write_triton_model
from edgeattn.recipe import Recipe

TYPES = {
    "tensor(int64)": "TYPE_INT64",
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
}


@pytest.fixture(scope="session")
def read_config() -> Callable[[str], Any]:
    """Reads config.pbtxt as tritonserver does."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs Triton's proto: pip install --no-deps tritonclient==2.73.0")
    from google.protobuf import text_format

    # By its file: the package around it needs grpc.
    file = Path(spec.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    found = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return lambda text: text_format.Parse(text, module.ModelConfig())


def told(config: Any, tensor: Any) -> tuple[str, list[int]]:
    """Type and shape of a tensor as Triton gives it to the model, without the batch."""
    shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
    return type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[
        tensor.data_type
    ].name, list(shape)


def expected(values: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        v.name: (TYPES[v.type], [s if isinstance(s, int) else -1 for s in v.shape[1:]])
        for v in values
    }


def tensors(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is given and what it gives, cache included."""
    given = {one.name: told(config, one) for one in config.input}
    back = {one.name: told(config, one) for one in config.output}
    for state in config.sequence_batching.state:
        kind = type(config.input.add()).DESCRIPTOR.fields_by_name["data_type"].enum_type
        shaped = kind.values_by_number[state.data_type].name, list(state.dims)
        given[state.input_name] = back[state.output_name] = shaped
    return given, back


@pytest.mark.parametrize("kv_cache", ["growing", "static"])
def test_a_decoder_for_onnxruntime(
    kv_cache: str,
    export_tiny: Callable[..., Path],
    read_config: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    asked = {} if kv_cache == "growing" else {"kv_cache": "static", "context": 64}
    path = export_tiny("cpu", verify=False, **asked)
    made = write_triton_model(Bundle.open(path), tmp_path / "models", name="tiny")
    assert (made.backend, made.plugins, made.keeps_cache) == (
        "onnxruntime",
        None,
        kv_cache == "static",
    )
    config = read_config((made.path / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 1)
    session = onnxruntime.InferenceSession(made.path / "1" / "model.onnx")  # with its weights
    assert tensors(config) == (expected(session.get_inputs()), expected(session.get_outputs()))
    for state in config.sequence_batching.state:
        assert state.use_same_buffer_for_input_output
        (initial,) = state.initial_state
        assert initial.zero_data
        assert list(initial.dims) == list(state.dims)
    for name in ("model.onnx", "model.onnx.data"):
        assert hash_file(made.path / "1" / name) == hash_file(path / name)


def test_a_wrong_size_does_not_pass(
    export_tiny: Callable[..., Path], read_config: Callable[[str], Any], tmp_path: Path
) -> None:
    """What the test above compares can differ."""
    path = export_tiny("cpu", verify=False)
    made = write_triton_model(Bundle.open(path), tmp_path / "models", name="tiny")
    text = (made.path / "config.pbtxt").read_text()
    session = onnxruntime.InferenceSession(path / "model.onnx")
    wrong = read_config(text.replace("dims: [ -1, 272 ]", "dims: [ -1, 273 ]"))
    assert tensors(wrong)[1] != expected(session.get_outputs())


@pytest.fixture(scope="module")
def engine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder for TensorRT without an engine."""
    folder = tmp_path_factory.mktemp("bert")
    save_encoder("bert", folder / "model")
    export(folder / "model", Recipe("a100", batch=3), folder / "bundle", verify=False)
    return folder / "bundle"


def test_an_encoders_engine(
    engine_bundle: Path, read_config: Callable[[str], Any], tmp_path: Path
) -> None:
    path = shutil.copytree(engine_bundle, tmp_path / "bundle")
    profile = EncoderProfile("any", Range(1, 3, 3), Range(1, 10, 40))
    engine = write_engine(path, [profile])
    made = write_triton_model(Bundle.open(path), tmp_path / "models")
    assert made.path == tmp_path / "models" / "bundle"
    assert hash_file(made.path / "1" / "model.plan") == engine.record.sha256
    config = read_config((made.path / "config.pbtxt").read_text())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 3)
    assert config.default_model_filename == "model.plan"
    assert config.HasField("dynamic_batching")
    session = onnxruntime.InferenceSession(path / "model.onnx")
    assert tensors(config) == (expected(session.get_inputs()), expected(session.get_outputs()))


def test_what_cannot_be_a_model(
    engine_bundle: Path, export_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, models = Bundle.open(engine_bundle), tmp_path / "models"
    with pytest.raises(BundleError, match="Triton's TensorRT, but there is none"):
        write_triton_model(bundle, models)
    path = shutil.copytree(engine_bundle, tmp_path / "bundle")
    profile = EncoderProfile("any", Range(1, 3, 3), Range(1, 10, 40))
    for record, told_so in (
        ({"flavour": "tensorrt-rtx"}, "is of TensorRT-RTX"),
        ({"stripped": True}, "has no weights"),
    ):
        write_engine(path, [profile], record=record)
        with pytest.raises(LoweringError, match=told_so):
            write_triton_model(Bundle.open(path), models)
    for name in ("a/b", "..", ""):
        with pytest.raises(UsageError, match="a model's name"):
            write_triton_model(bundle, models, name=name or "/")
    assert not models.exists() or not any(models.iterdir())
    tiny = Bundle.open(export_tiny("cpu", verify=False))
    write_triton_model(tiny, models, name="x")
    with pytest.raises(BundleError, match="already there"):
        write_triton_model(tiny, models, name="x")
    write_triton_model(tiny, models, name="x", force=True)


def test_the_command(export_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = export_tiny("cpu", verify=False)
    arguments = ["package", str(path), "--triton", "-o", str(tmp_path), "--name", "x", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["path"] == str(tmp_path / "x")
    for wrong in (["package", str(path), "-o", "x"], ["package", "--triton", "-o", "x"]):
        assert CliRunner().invoke(main, wrong).exit_code == 2
