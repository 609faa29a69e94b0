"""ONNX Runtime's GPU providers, under whose names a provider of the CPU runs here."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnxruntime as ort
from attention_models import with_head_sparse

from edgeattn.devices.registry import parse_target
from edgeattn.errors import LoweringError, MissingDependencyError, UsageError
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import model_of
from edgeattn.planner.lowering import fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session, onnxruntime_backend, providers
from edgeattn.runtime.providers import (
    provider_chain,
    provider_options,
    require_started,
    widen_boundary,
)


@pytest.fixture
def gpu_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for CUDA gets the CPU; all that goes with it stays."""
    monkeypatch.setitem(providers.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setitem(providers.DEVICES, "cuda", "cpu")


@pytest.fixture(scope="module")
def concat_bundle(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("jetson-orin@jetpack6.2", batch=2, context=128)


@pytest.mark.parametrize("verb", ["run", "eval", "verify"])
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_an_onnxruntime_without_it(
    tiny_bundle: Path, edgeattn: Callable[..., Any], verb: str, provider: str, tmp_path: Path
) -> None:
    if providers.PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    (tmp_path / "text").write_text("some words " * 400)
    words = {"run": ("-p", "a"), "eval": ("--text", tmp_path / "text"), "verify": ()}[verb]
    done = edgeattn(verb, tiny_bundle, *words, "--provider", provider)
    assert done.exit_code == 1
    assert f"an ONNX Runtime with the provider {provider}, but onnxruntime" in done.output
    assert "install edgeattn[gpu] in place of edgeattn[ort]" in done.output


def test_an_unknown_provider(tiny_bundle: Path, edgeattn: Callable[..., Any]) -> None:
    for verb in (("run", tiny_bundle, "-p", "a"), ("verify", tiny_bundle)):
        done = edgeattn(*verb, "--provider", "cudda")
        assert done.exit_code == 2
        assert "a known provider, but 'cudda' is none: did you mean cuda" in done.output


def test_a_provider_is_onnxruntimes(tiny_bundle: Path, edgeattn: Callable[..., Any]) -> None:
    done = edgeattn("verify", tiny_bundle, "--backend", "triton", "--provider", "cuda")
    assert done.exit_code == 2
    assert "--provider together with --backend onnxruntime" in done.output


@pytest.mark.parametrize(
    ("provider", "chain"),
    [
        ("cpu", ["CPUExecutionProvider"]),
        ("cuda", ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        (
            "tensorrt",
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        ),
    ],
)
def test_what_one_provider_does_not_take_goes_to_the_next(
    provider: str, chain: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: list(providers.PROVIDERS.values()),
        preload_dlls=lambda: print("preloading"),
    )
    first, *others = provider_chain(module, provider, {"a": "b"})
    assert [first, *others] == [(chain[0], {"a": "b"}), *chain[1:]]
    # standard output is the command's
    assert capsys.readouterr() == ("", "preloading\n" if provider != "cpu" else "")


def test_a_session_that_quietly_went_on_without_it() -> None:
    session: Any = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    require_started(session, "cpu")
    with pytest.raises(MissingDependencyError, match="provider cuda to start, but it did not"):
        require_started(session, "cuda")


@pytest.mark.usefixtures("gpu_is_cpu")
def test_a_bound_cache_gives_what_the_plain_path_gives(
    concat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    run_bound = onnxruntime_backend.run_bound
    monkeypatch.setattr(
        onnxruntime_backend,
        "run_bound",
        lambda session, outputs, values, device: (
            bound.append(device) or run_bound(session, outputs, values, device)
        ),
    )
    plain, there = Session.open(concat_bundle), Session.open(concat_bundle, provider="cuda")
    ids = np.random.default_rng(0).integers(0, 272, (2, 12))
    states = [session.run(ids[:, :7]).state for session in (plain, there)]
    for piece in (ids[:, 7:8], ids[:, 8:12], ids[:, 7:9]):  # the last two branch off
        steps = [s.run(piece, state) for s, state in zip((plain, there), states, strict=True)]
        np.testing.assert_array_equal(steps[0].logits, steps[1].logits)
        assert plain.cache_bytes(steps[0].state) == there.cache_bytes(steps[1].state)
        if piece.shape[1] == 1:
            states = [step.state for step in steps]
    assert bound == ["cpu"] * 4


@pytest.mark.usefixtures("gpu_is_cpu")
@pytest.mark.parametrize("target", ["jetson-orin@jetpack6.2", "cpu"])
def test_verify_says_which_provider_it_proved(
    target: str, export_tiny: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    path = export_tiny(target, batch=2, context=128)
    done = edgeattn("verify", path, "--provider", "cuda", "--no-tensorrt", "--json")
    assert done.exit_code == 0, done.output
    (agreement,) = json.loads(done.stdout)["agreements"]
    assert agreement["backend"] == "onnxruntime (provider cuda)"


@pytest.mark.usefixtures("gpu_is_cpu")
def test_bf16_is_for_gpus(export_tiny: Callable[..., Path], edgeattn: Callable[..., Any]) -> None:
    path = export_tiny("a100", dtype="bf16", batch=2, context=128)
    on_cpu = edgeattn("run", path, "-p", "a")
    assert "a bundle in fp32 or fp16 to run on a CPU" in on_cpu.output
    # where it is no GPU after all, it is ONNX Runtime that has no kernels
    there = edgeattn("run", path, "-p", "a", "--provider", "cuda")
    assert there.exit_code == 1
    assert "to run on a CPU" not in there.output


def test_bf16_at_the_boundary_becomes_fp32() -> None:
    narrow = TensorProto.BFLOAT16
    names = ("x", "p", "y", "q")
    x, p, y, q = (helper.make_tensor_value_info(name, narrow, ["n"]) for name in names)
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Concat", ["p", "y"], ["q"], axis=0),  # reads an output, too
    ]
    graph = helper.make_graph(nodes, "g", [x, p], [y, q])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    widen_boundary(proto, ["x", "p", "y"])
    onnx.checker.check_model(proto, full_check=True)
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)
    }
    assert kinds == {name: TensorProto.FLOAT if name != "q" else narrow for name in names}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    value = np.array([1.0, 1 + 2**-7, 1 + 2**-12], np.float32)
    (found,) = session.run(["y"], {"x": value, "p": value})
    assert found.tolist() == [1.0, 1 + 2**-7, 1.0]  # rounded as bf16 is, and no further


@pytest.fixture
def variant(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The graph of a decoder with operators of edgeattn."""
    target = parse_target("a100")
    model = model_of(open_checkpoint(tiny_checkpoint))
    recipe = Recipe("a100", attention=("head-sparse:density=0.5",), context=128, batch=2)
    lowering = fit_lowering(plan_lowering(recipe, target), model.shape, target)
    file = tmp_path / "model.onnx"
    export_graph(with_head_sparse(model, 2), lowering, file, tmp_path / "model.onnx.data")
    return file


def test_tensorrt_gets_sizes_cache_and_plugins(
    variant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    library = variant.parent / "plugins" / platform.machine() / "libedgeattn_plugins.so"
    library.parent.mkdir(parents=True)
    library.touch()
    proto = onnx.load(variant, load_external_data=False)
    own = [node for node in proto.graph.node if node.domain == "edgeattn"]
    assert own
    options = provider_options(proto, variant, "tensorrt", context=128, batch=2)
    assert options["trt_extra_plugin_lib_paths"] == str(library.resolve())
    assert options["trt_engine_cache_path"] == "/cache/edgeattn/onnxruntime-tensorrt"
    least, most = (options[f"trt_profile_{n}_shapes"].split(",") for n in ("min", "max"))
    assert {"input_ids:1x1", "past_key_values.0.key:1x2x0x16"} <= set(least)
    assert {"input_ids:2x128", "past_key_values.0.key:2x2x127x16"} <= set(most)
    assert {node.domain for node in proto.graph.node} == {"", "trt.plugins"}
    assert not [function for function in proto.functions if function.domain == "edgeattn"]
    assert "trt.plugins" in {opset.domain for opset in proto.opset_import}
    # nothing infers their types any more
    typed = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    for node in own:
        assert {name for name in node.output if name} <= typed
    # the weights are where they were
    assert any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer)


def test_without_a_library_the_function_bodies_stay(variant: Path) -> None:
    proto = onnx.load(variant, load_external_data=False)
    before = proto.SerializeToString()
    options = provider_options(proto, variant, "tensorrt", context=128, batch=1)
    assert "trt_extra_plugin_lib_paths" not in options
    assert provider_options(proto, variant, "cuda", context=128, batch=1) == {}
    assert proto.SerializeToString() == before


def test_tensorrt_has_engines_for_a_static_cache(
    export_tiny: Callable[..., Path],
) -> None:
    path = export_tiny("cpu", batch=2, context=128, kv_cache="static", verify=False)
    with pytest.raises(LoweringError, match="a growing cache for --provider tensorrt, but its"):
        Session.open(path, provider="tensorrt")


def test_a_provider_is_checked_before_the_graph(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known provider"):
        onnxruntime_backend.open_onnxruntime(tmp_path / "none.onnx", provider="gpu")
