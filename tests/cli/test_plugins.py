"""`edgeattn plugins` and the libraries of an export, with the smallest subset of kernels."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import onnx
from click.testing import CliRunner
from op_cases import case_inputs, op_model
from plugin_commands import PLUGIN_OPS

from edgeattn.bundle.bundle import Bundle, hash_file
from edgeattn.cli import main
from edgeattn.cli.plugins import command
from edgeattn.devices.registry import parse_target
from edgeattn.engine import toolchain
from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.plugins import LIBRARY, PLUGIN_ABI, PluginLibrary, read_library
from edgeattn.errors import (
    BundleError,
    EdgeattnError,
    LoweringError,
    MissingDependencyError,
    UsageError,
)
from edgeattn.exporters.export import export_graph
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.ops.spec import DOMAIN, OP_VERSION, Case
from edgeattn.pipeline import BuildRequest, build_bundle, export, plugin_cache, plugins
from edgeattn.pipeline.plugin_cache import LibraryRequest, finished_library
from edgeattn.recipe import Recipe
from edgeattn.verify.operators import load_samples


def missing_tools() -> str:
    """What the machine lacks to build both libraries, empty where it lacks nothing."""
    if find_spec("triton") is None:
        return "Triton (extra kernels)"
    try:
        for arch in toolchain.ARCHITECTURES:
            toolchain.find_toolchain(arch)
    except EdgeattnError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"missing: {missing_tools()}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for this file, as one user has."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Zig's C++ runtime takes a minute to build and is the same whatever we compile.
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def build(output: Path, *arguments: str) -> dict:
    given = ["build", "--subset", "smoke", "-o", str(output), *arguments, "--json"]
    result = CliRunner().invoke(command, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def model(folder: Path, **changed: int) -> Path:
    dims = {"B": 1, "H": 2, "Hkv": 2, "T": 20, "Dk": 64, "Dv": 64, "Dg": 1, **changed}
    file = folder / "model.onnx"
    onnx.save(op_model(SPEC, Case("one", dims, "fp16"), 21), file)
    return file


def test_a_library_is_built_placed_and_read(tmp_path: Path) -> None:
    facts = build(tmp_path, "--arch", "aarch64", "--sm", "87,110")
    assert facts["path"] == str(tmp_path / "aarch64" / LIBRARY)
    assert (facts["arch"], facts["ops"]) == ("aarch64", sorted(s.name for s in PLUGIN_OPS))
    assert sorted({variant["sm"] for variant in facts["variants"]}) == [87, 110]
    assert [file.name for file in (tmp_path / "aarch64").iterdir()] == [LIBRARY]
    shown = CliRunner().invoke(command, ["info", facts["path"]]).output
    for words in ("aarch64, ABI 1", "SM 87, SM 110", "plugin RecurrentLinearAttention"):
        assert words in shown


def test_a_graph_gets_the_library_of_its_target_and_one_for_the_check_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = functools.partial(plugins.build_plugins, subset="smoke")
    monkeypatch.setattr(plugins, "build_plugins", smoke)
    found = plugins.plugins_for(model(tmp_path), parse_target("jetson-orin"))
    assert found is not None
    assert (found.target.arch, found.target.sms) == ("aarch64", (87,))
    if not TENSORRT_RTX.is_available():
        pytest.skip("TensorRT-RTX (extra rtx) is not installed")
    assert found.host is not None
    assert (found.host.arch, found.host.sms) == (platform.machine(), (86,))
    report = check_build(
        tmp_path / "model.onnx", sm=86, profiles={}, timeout_s=300, plugin_library=found.host.path
    )
    assert (report.status, report.plugin_layers) == ("built", 1), report.reason
    with pytest.raises(BundleError, match=r"for x86_64, but .* is for aarch64"):
        check_build(
            tmp_path / "model.onnx",
            sm=86,
            profiles={},
            timeout_s=300,
            plugin_library=found.target.path,
        )
    with pytest.raises(LoweringError, match=r"BLOCK=128 .*SM 87"):
        plugins.plugins_for(model(tmp_path, Dk=128), parse_target("jetson-orin"))


def node_of(op_type: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
    return onnx.helper.make_node(op_type, inputs, [output], **attributes)


def zero(name: str, kind: int) -> Iterator[onnx.NodeProto]:
    """A zero that no compiler knows to be one."""
    yield node_of("ReduceMax", [name], f"largest of {name}", keepdims=0)
    yield node_of("Sub", [f"largest of {name}"] * 2, f"nothing of {name}")
    yield node_of("Cast", [f"nothing of {name}"], f"zero of {name}", to=kind)


def with_recurrent_node(file: Path) -> None:
    """Adds a node with a plugin to a written graph, on which its logits depend and are the same."""
    proto = onnx.load(file, load_external_data=False)
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    dims = {"B": 1, "H": 2, "Hkv": 2, "T": 20, "Dk": 64, "Dv": 64, "Dg": 1}
    case = Case("one", dims, "fp16")
    added = op_model(SPEC, case, opset)
    for tensor, value in zip(SPEC.inputs, case_inputs(SPEC, case), strict=True):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), tensor.name))
    (call,) = added.graph.node
    states = ["past_state", "past_normaliser"]
    call.input[:] = [f"{name} here" if name in states else name for name in call.input]
    for node in proto.graph.node:
        node.output[:] = ["without" if name == "logits" else name for name in node.output]
    (logits,) = (value for value in proto.graph.output if value.name == "logits")
    kind = logits.type.tensor_type.elem_type
    nodes = [
        *zero("without", onnx.TensorProto.FLOAT),
        *(node_of("Add", [name, "zero of without"], f"{name} here") for name in states),
        call,
        *zero("y", kind),
        node_of("Add", ["without", "zero of y"], "logits"),
    ]
    proto.graph.node.extend(nodes)
    proto.functions.extend(added.functions)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OP_VERSION))
    onnx.save(proto, file)


@pytest.mark.usefixtures("shared_traces")
def test_an_export_whose_graph_has_such_a_node_carries_the_library(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exporting(model: Any, lowering: Any, file: Path, *rest: Any, **keywords: Any) -> Any:
        report = export_graph(model, lowering, file, *rest, **keywords)
        with_recurrent_node(file)
        return report

    stages = []
    smoke = functools.partial(plugins.build_plugins, subset="smoke")
    monkeypatch.setattr(plugins, "build_plugins", smoke)
    monkeypatch.setattr("edgeattn.exporters.export.export_graph", exporting)
    report = export(
        tiny_checkpoint,
        Recipe("jetson-orin"),
        tmp_path / "bundle",
        progress=lambda stage, *_: stages.append(stage),
    )
    assert {plugins.COMPILING, plugins.LINKING} <= set(stages)
    bundle = Bundle.open(tmp_path / "bundle")
    placed = bundle.path / "plugins" / "aarch64" / LIBRARY
    assert report.plugins == read_library(placed)
    assert bundle.manifest.plugin_abi == PLUGIN_ABI
    assert f"plugins/aarch64/{LIBRARY}" in bundle.manifest.files
    samples = load_samples(bundle.path / "golden" / "operators.npz")  # of prefill and decoding
    assert [sample.op for sample in samples] == ["RecurrentLinearAttention"] * 2
    assert bundle.manifest.verification.status == "passed"
    if TENSORRT_RTX.is_available():
        assert report.verification is not None
        assert report.verification.tensorrt is not None
        assert report.verification.tensorrt.plugin_layers == 1


@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="needs edgeattn[rtx]")
@pytest.mark.usefixtures("shared_traces")
def test_an_engine_has_the_plugins_of_the_bundle_s_own_library(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built with the library in the bundle, and refused for a GPU it has no kernels for."""

    def exporting(model: Any, lowering: Any, file: Path, *rest: Any, **keywords: Any) -> Any:
        report = export_graph(model, lowering, file, *rest, **keywords)
        with_recurrent_node(file)
        return report

    smoke = functools.partial(plugins.build_plugins, subset="smoke")
    monkeypatch.setattr(plugins, "build_plugins", smoke)
    monkeypatch.setattr("edgeattn.exporters.export.export_graph", exporting)
    export(tiny_checkpoint, Recipe("rtx-4090"), tmp_path / "bundle", verify=False)
    built = build_bundle(tmp_path / "bundle", BuildRequest())
    record = built.engine.record
    assert record.plugins is not None
    assert record.plugins.layers == 1
    assert record.plugins.file == f"plugins/{platform.machine()}/{LIBRARY}"
    placed = tmp_path / "bundle" / record.plugins.file
    assert record.plugins.sha256 == hash_file(placed)
    assert sum(layer.kind == "PLUGIN_V3" for layer in record.layer_list) == 1
    with pytest.raises(LoweringError, match="SM 120"):
        build_bundle(tmp_path / "bundle", BuildRequest(targets=("rtx-5090",)))


@pytest.fixture
def jetson(tmp_path: Path) -> PluginLibrary:
    """A library that a user made before."""
    build(tmp_path / "mine", "--arch", "aarch64", "--sm", "87,110")
    return read_library(tmp_path / "mine" / "aarch64" / LIBRARY)


def without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **keywords: object) -> None:
        raise MissingDependencyError(expected="CMake", came="it is not installed", todo="install")

    monkeypatch.setattr(plugins, "find_toolchain", missing)


def test_a_given_library_is_taken_where_it_fits(
    tmp_path: Path, jetson: PluginLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model(tmp_path)
    given = plugins.given_library(jetson.path, parse_target("jetson-orin"))
    without_tools(monkeypatch)
    shutil.rmtree(cache / "edgeattn" / "libraries")
    found = plugins.plugins_for(file, parse_target("jetson-orin"), library=given)
    assert found is not None
    assert (found.target, found.host) == (given, None)
    assert "function bodies were built" in found.checked or not TENSORRT_RTX.is_available()
    with pytest.raises(MissingDependencyError, match="CMake"):
        plugins.plugins_for(file, parse_target("jetson-orin"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("l4", "for x86_64"),
        ("cpu", "--plugin-lib for a target with TensorRT, but .* runs ONNX Runtime"),
        ("dgx-spark", "with kernels for SM 121, but .* SM 87, SM 110: .*--sm 121"),
    ],
)
def test_a_given_library_is_refused_before_the_model_is_read(
    tmp_path: Path, jetson: PluginLibrary, target: str, words: str
) -> None:
    with pytest.raises(EdgeattnError, match=words):
        export(tmp_path / "no model", Recipe(target), tmp_path / "out", plugin_library=jetson.path)
    with pytest.raises(EdgeattnError, match=r"there is none|--plugin-lib for"):
        export(
            tmp_path / "no model", Recipe(target), tmp_path / "out", plugin_library=Path("none.so")
        )
    assert not (tmp_path / "out").exists()


def test_a_library_that_was_built_is_found_without_tools(
    jetson: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tools(monkeypatch)
    request = LibraryRequest("aarch64", (110, 87), subset="smoke")
    found = finished_library(request)
    assert found is not None
    assert found.variants == jetson.variants
    for other in (
        replace(request, sms=(87,)),
        replace(request, arch="x86_64"),
        replace(request, subset=None),
        replace(request, ops=("HadamardTransform",)),
    ):
        assert finished_library(other) is None
    with monkeypatch.context() as patch:
        patch.setattr(plugin_cache, "version", lambda name: "3.6.0")
        assert finished_library(request) is None  # of another Triton
    found.path.write_bytes(found.path.read_bytes()[:1000])
    assert finished_library(request) is None


@pytest.mark.parametrize("package", ["kernels", "ops", "plugins", "engine"])
def test_a_library_is_of_the_sources_as_they_are(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("kernels", "ops", "plugins", "engine")}
    for folder in folders.values():
        (folder / "build").mkdir(parents=True)
        (folder / "source").write_text("first")
    monkeypatch.setattr(plugin_cache, "files", lambda name: folders[name.rpartition(".")[2]])
    request = LibraryRequest("aarch64", (87,))
    before = request.folder()
    (folders[package] / "build" / "object.o").write_text("no source")
    (folders[package] / ".hidden").write_text("no source")
    assert request.folder() == before
    (folders[package] / "source").write_text("second")
    assert request.folder() != before


def test_a_library_for_some_operators_has_no_others() -> None:
    request = LibraryRequest("aarch64", (87,), ("HadamardTransform",), "smoke")
    names = {variant.kernel.name for variant in plugins._variants(request)}
    assert names == {"hadamard_transform.transform"}


def test_a_build_waits_for_the_other(tmp_path: Path) -> None:
    order: list[str] = []
    starting = threading.Event()

    def second() -> None:
        starting.set()
        with plugin_cache.alone_in(tmp_path / "build"):
            order.append("second")

    with plugin_cache.alone_in(tmp_path / "build"):
        other = threading.Thread(target=second)
        other.start()
        starting.wait()
        other.join(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_no_plugins_means_none(
    tiny_checkpoint: Path, tmp_path: Path, jetson: PluginLibrary
) -> None:
    with pytest.raises(UsageError, match="--plugin-lib or --no-plugins"):
        export(
            tiny_checkpoint,
            Recipe("jetson-orin"),
            tmp_path / "out",
            plugins=False,
            plugin_library=jetson.path,
        )


def test_graphs_that_need_no_library_get_none(tmp_path: Path) -> None:
    file = model(tmp_path)
    assert plugins.plugins_for(file, parse_target("cpu")) is None
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node_of("Identity", ["x"], "y")], "plain", [x], [y])
    onnx.save(onnx.helper.make_model(graph), file)
    assert plugins.plugins_for(file, parse_target("jetson-orin")) is None


def test_without_library_or_body_the_missing_plugin_is_named(tmp_path: Path) -> None:
    file = model(tmp_path)
    proto = onnx.load(file)
    del proto.functions[:]
    onnx.save(proto, file)
    with pytest.raises(LoweringError, match=r"the plugin RecurrentLinearAttention.*plugins build"):
        check_build(file, sm=86, profiles={}, timeout_s=60)


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--arch", "riscv"], "known architecture", 2),
        (["--sm", "88"], "an SM among", 2),
        (["--sm", "87;110"], "--sm with numbers", 2),
        (["--subset", "smoek"], "smoke", 2),
        (["--tensorrt", "."], "NvInferRuntime.h in .", 1),
    ],
    ids=str,
)
def test_refusals(
    arguments: list[str], words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plugins", "build", "-o", str(tmp_path / "out"), *arguments])
    assert exit.value.code == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_headers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(toolchain.TENSORRT_VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit):
        main(["plugins", "build", "-o", str(tmp_path / "out")])
    assert f"NvInferRuntime.h in {tmp_path}" in capsys.readouterr().err


def test_missing_cuda_headers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(toolchain.CUDA_VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit):
        main(["plugins", "build", "-o", str(tmp_path / "out")])
    assert f"cuda_runtime_api.h in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(EdgeattnError, match=r"g\+\+-aarch64-linux-gnu and no ziglang.*ziglang"):
        toolchain.find_compiler("aarch64")
    with pytest.raises(EdgeattnError, match=r"CMake.*edgeattn\[plugins\]"):
        toolchain.find_cmake()


def test_an_interrupted_copy_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    build(tmp_path / "first", "--arch", "aarch64", "--sm", "87,110")
    library = read_library(tmp_path / "first" / "aarch64" / LIBRARY)

    def interrupted(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plugins.place_library(library, tmp_path / "second")
    assert os.listdir(tmp_path / "second" / "aarch64") == []
