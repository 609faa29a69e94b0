"""`edgeattn doctor`: what it says of models, bundles and machines, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import BARE_MACHINE
from model_configs import LLAMA3_8B, SMOLLM2_135M

from edgeattn.devices.libcuda import GpuFacts
from edgeattn.devices.probe import Probe
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.plugins import PLUGIN_ABI

GIB = 2**30
SERVER = replace(
    BARE_MACHINE,
    arch="x86_64",
    tensorrt_rtx="1.7.1.116",
    onnxruntime="1.31.1",
    free_memory_bytes=20 * GIB,
    total_memory_bytes=24 * GIB,
)
ORIN = replace(
    SERVER,
    arch="aarch64",
    gpu=GpuFacts("Orin", 87, 62841 * 2**20, 50 * GIB, integrated=True),
    gpu_problem="",
    driver="12.6",
    l4t="36.4.3",
    jetpack="jetpack6.2",
    board="NVIDIA Jetson AGX Orin Developer Kit",
    power_mode="MAXN",
    tensorrt="10.3.0",
    free_memory_bytes=50 * GIB,
    total_memory_bytes=62841 * 2**20,
)
RTX_4090 = replace(
    SERVER, gpu=GpuFacts("NVIDIA GeForce RTX 4090", 89, 24564 * 2**20, 20 * GIB), gpu_problem=""
)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """A function from a config to a folder that holds it and nothing else."""

    def write(values: dict[str, Any], **changed: Any) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**values, **changed}))
        return folder

    return write


@pytest.fixture
def doctor(edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function of arguments and a machine: exit code and the JSON object."""

    def run(*arguments: object, machine: Probe = SERVER) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("edgeattn.pipeline.doctor.probe", lambda: machine)
        done = edgeattn("doctor", *arguments, "--json")
        return done.exit_code, json.loads(done.stdout)

    return run


def about(values: dict[str, Any], what: str) -> dict[str, str]:
    """The one finding about something."""
    (found,) = [finding for finding in values["findings"] if finding["about"] == what]
    return found  # type: ignore[no-any-return]


def problems(values: dict[str, Any]) -> list[str]:
    return [f["about"] for f in values["findings"] if f["level"] == "problem"]


def test_no_to_llama3_in_fp16_on_an_orin_nano(doctor: Any, config: Any) -> None:
    code, said = doctor(config(LLAMA3_8B), "--target", "jetson-orin-nano-8gb")
    assert (code, said["works"], problems(said)) == (1, False, ["memory"])
    memory = about(said, "memory")
    assert memory["found"].startswith("20.4 GB of the 8.0 GB of jetson-orin-nano-8gb: ")
    assert "weights 16.1 GB, cache 2.1 GB at 8192 tokens in 1 row" in memory["found"]
    assert memory["fix"].startswith("--target jetson-orin-agx-32gb --quant w8-rtn --context 8192")
    assert said["memory"]["needed"] > said["memory"]["device"] == 8_000_000_000
    assert said["choices"][0]["needed"] < said["choices"][0]["device"]


def test_yes_to_smollm2_in_4_bits_on_an_orin_nano(doctor: Any, config: Any) -> None:
    arguments = (config(SMOLLM2_135M), "--target", "jetson-orin-nano-8gb", "--quant", "w4-rtn")
    code, said = doctor(*arguments)
    assert (code, said["works"], problems(said)) == (0, True, [])
    assert said["memory"]["building"] < said["memory"]["device"]
    assert said["choices"] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # What runs on a board may be too large to be built there.
        ("jetson-orin-nano-8gb --quant w4-rtn --context 2048", ["building"]),
        ("jetson-orin --quant w4-rtn", []),
        ("jetson-orin", []),
        ("l4", []),
        ("l4 --batch 8", ["memory"]),
        ("t4 --quant w4-rtn", ["support"]),
        ("t4 --quant w8-rtn", []),
        ("t4 --dtype bf16", ["support"]),
        ("jetson-orin --dtype fp32", ["support"]),
        ("jetson-orin@jetpack6.2 --dtype fp32 --context 2048", []),
        ("jetson-orin --quant w4-rtn:group=32", ["support"]),
        ("jetson-orin --context 9000", ["support"]),
        ("cpu", ["memory"]),  # 32 GB in fp32, on a machine of 24 GB
        ("cpu --quant w8-rtn", []),
    ],
)
def test_llama3(doctor: Any, config: Any, options: str, expected: list[str]) -> None:
    code, said = doctor(config(LLAMA3_8B), "--target", *options.split())
    assert (problems(said), code) == (expected, 1 if expected else 0)
    assert all(f["fix"] for f in said["findings"] if f["level"] != "ok")


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ("t4 --quant w4-rtn", "--quant w8-rtn --context 8192 takes 10.9 GB"),
        ("t4 --dtype bf16", "--dtype fp16"),
        ("jetson-orin --context 9000", "--quant none --context 4500"),
        ("l4 --batch 8", "--quant none --context 2048 --batch 8 takes"),
    ],
)
def test_the_fix_is_a_command_line(doctor: Any, config: Any, options: str, fix: str) -> None:
    _, said = doctor(config(LLAMA3_8B), "--target", *options.split())
    (found,) = [finding for finding in said["findings"] if finding["level"] == "problem"]
    assert found["fix"].startswith(fix)


def test_what_is_no_model_is_a_finding(doctor: Any, tmp_path: Path, config: Any) -> None:
    names = (tmp_path, tmp_path / "none", "a" * 300, config({"model_type": "mamba"}))
    for model in names:
        code, said = doctor(model, "--target", "l4")
        assert (code, problems(said), said["memory"]) == (1, ["model"], None)


def test_the_machine_is_the_target_where_none_is_named(doctor: Any, config: Any) -> None:
    model = config(SMOLLM2_135M)
    assert doctor(model)[1]["target"] == "cpu@onnxruntime"
    assert doctor(model, machine=ORIN)[1]["target"] == "jetson-orin-agx-64gb@jetpack6.2"
    other = replace(RTX_4090, gpu=GpuFacts("NVIDIA GeForce RTX 3090", 86, 24 * GIB, GIB))
    code, said = doctor(model, machine=other)
    assert code == 2
    assert "--target" in said["error"]


def test_memory_that_others_have_taken_is_a_warning(doctor: Any, config: Any) -> None:
    model = config(LLAMA3_8B)
    gpu = replace(RTX_4090.gpu, free_bytes=5 * GIB)  # type: ignore[type-var]
    _, said = doctor(model, "--target", "rtx-4090", machine=replace(RTX_4090, gpu=gpu))
    found = [f["found"] for f in said["findings"] if f["about"] == "free memory"]
    assert [text.partition(",")[0] for text in found] == [
        "18.9 GB to run it", "35.9 GB to build its engine"
    ]  # fmt: skip
    _, said = doctor(model, "--target", "rtx-4090", "--quant", "w4-rtn", machine=RTX_4090)
    assert [f for f in said["findings"] if f["about"] == "free memory"] == []


@pytest.mark.parametrize(
    ("machine", "expected", "words"),
    [
        (SERVER, [], ""),
        (ORIN, [], ""),
        (
            replace(SERVER, onnxruntime_gpu="1.30.0"),
            ["ONNX Runtime"],
            "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are installed, and overwrite each",
        ),
        (replace(SERVER, onnxruntime="1.9.0"), ["ONNX Runtime"], "older than 1.23.2"),
        (
            replace(ORIN, l4t="35.4.1", jetpack=None),
            ["JetPack"],
            "L4T 35.4.1 is of none that edgeattn knows",
        ),
        (
            replace(ORIN, gpu=None, gpu_problem="there is no libcuda.so.1"),
            ["GPU"],
            "this is a Jetson, but there is no libcuda.so.1",
        ),
        (
            replace(SERVER, gpu=GpuFacts("Tesla T4", 75, 15 * GIB, 14 * GIB), tensorrt="10.1.0"),
            ["target"],
            "t4 with TensorRT 10.1.0 is none of ours",
        ),
    ],
)
def test_the_machine_alone(doctor: Any, machine: Probe, expected: list[str], words: str) -> None:
    code, said = doctor(machine=machine)
    # What only the device itself can have is not installed where the tests run.
    found = [name for name in problems(said) if name != "TensorRT"]
    assert found == expected
    assert words in " ".join(f["found"] for f in said["findings"] if f["about"] in expected)
    assert (code == 0) is said["works"]
    assert said["machine"]["arch"] == machine.arch


def test_a_machine_says_what_it_is(doctor: Any) -> None:
    _, said = doctor(machine=ORIN)
    assert said["target"] == "jetson-orin-agx-64gb@jetpack6.2"
    assert about(said, "GPU")["found"] == "Orin, SM 87, 65.9 GB, 53.7 GB free; CUDA 12.6"
    assert about(said, "power mode")["level"] == "ok"
    _, said = doctor(machine=replace(ORIN, power_mode="15W"))
    assert about(said, "power mode")["fix"] == "choose MAXN with nvpmodel for them"


def test_a_container_on_a_jetson_may_hide_its_jetpack(doctor: Any) -> None:
    code, said = doctor(machine=replace(ORIN, l4t=None, jetpack=None, board=None))
    assert (code, said["target"]) == (0, None)
    assert "jetson-orin-agx-64gb" in about(said, "JetPack")["found"]


def test_a_cpu_without_onnxruntime_runs_nothing(doctor: Any, config: Any) -> None:
    bare = replace(SERVER, onnxruntime=None)
    assert about(doctor(machine=bare)[1], "ONNX Runtime")["level"] == "warning"
    code, said = doctor(config(SMOLLM2_135M), "--target", "cpu", machine=bare)
    assert (code, problems(said)) == (1, ["ONNX Runtime"])


def test_an_older_tensorrt_than_the_targets(
    doctor: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeattn.engine.flavours.Flavour.is_available", lambda self: True)
    model = config(SMOLLM2_135M)
    arguments = (model, "--target", "jetson-orin@jetpack7.2", "--quant", "w4-rtn")
    code, said = doctor(*arguments, machine=ORIN)
    assert (code, problems(said)) == (1, ["TensorRT"])
    assert "TensorRT 10.16.2 or newer" in about(said, "TensorRT")["found"]
    code, said = doctor(model, "--target", "jetson-orin@jetpack6.2", machine=ORIN)
    assert (code, problems(said)) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quant", "w4-rtn"], "no --quant without MODEL or BUNDLE"),
        (["--context", "9"], "no --context without MODEL"),
        (["x", "--target", "jetson-orni"], "jetson-orin"),
        (["x", "--target", "l4", "--quant", "w5"], "quantisation scheme"),
        (["x", "--context", "0"], "--context"),
        (["x", "--frobnicate"], "--frobnicate"),
    ],
)
def test_usage(edgeattn: Any, arguments: list[str], words: str) -> None:
    done = edgeattn("doctor", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_marks_are_read_without_colour(edgeattn: Any, config: Any) -> None:
    done = edgeattn("doctor", config(LLAMA3_8B), "--target", "jetson-orin-nano")
    assert done.exit_code == 1
    lines = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {("ok", "model"), ("ok", "support"), ("x", "memory")} <= lines
    assert done.stdout.rstrip().endswith("jetson-orin-nano-8gb@jetpack7.2: one problem found")


def test_a_model_needs_no_torch(config: Any) -> None:
    program = """
import sys
from edgeattn.pipeline.doctor import diagnose
print(diagnose(sys.argv[1], target="jetson-orin").works, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, config(SMOLLM2_135M)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]


# Bundles


@pytest.fixture(scope="session")
def orin_bundle(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("jetson-orin", "w4-rtn", model=None, verify=False)


def test_a_bundle_on_its_own_target(doctor: Any, orin_bundle: Path) -> None:
    code, said = doctor(orin_bundle)
    assert (code, said["target"]) == (0, "jetson-orin-agx-64gb@jetpack7.2")
    assert about(said, "proof")["fix"]
    assert about(said, "engines")["found"] == "none is built yet"
    assert said["memory"]["context"] == 256


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("jetson-orin-nano-8gb", []),
        ("rtx-5090", []),
        ("t4", ["support"]),  # no int4 there
        ("jetson-orin@jetpack6.2", ["support"]),  # opset 23, standard attention
        ("jetson-orin --context 300", ["context"]),
        ("jetson-orin --batch 2", ["batch"]),
        ("cpu", []),
    ],
)
def test_a_bundle_elsewhere(
    doctor: Any, orin_bundle: Path, options: str, expected: list[str]
) -> None:
    code, said = doctor(orin_bundle, "--target", *options.split())
    assert (problems(said), code) == (expected, 1 if expected else 0)
    assert all(f["fix"] for f in said["findings"] if f["level"] != "ok")


def test_a_bundle_for_a_cpu_is_none_for_a_gpu(doctor: Any, export_tiny: Any) -> None:
    bundle = export_tiny("cpu")
    assert doctor(bundle)[0] == 0
    code, said = doctor(bundle, "--target", "l4")
    assert (code, problems(said)) == (1, ["support"])


def test_a_bundle_on_another_machine(doctor: Any, orin_bundle: Path) -> None:
    """Without --target it is judged for the machine, where that is a target."""
    code, said = doctor(orin_bundle, machine=ORIN)
    assert (code, said["target"]) == (1, "jetson-orin-agx-64gb@jetpack6.2")
    assert "support" in problems(said)


def test_a_damaged_bundle(doctor: Any, orin_bundle: Path, changed: Any) -> None:
    bundle = changed(orin_bundle)
    (bundle / "config.json").write_text((bundle / "config.json").read_text() + " ")
    assert problems(doctor(bundle)[1]) == ["bundle"]
    (bundle / "manifest.json").unlink()
    code, said = doctor(bundle)
    assert (code, problems(said)) == (1, ["bundle"])  # not a model that happens to have a config
    broken = changed(orin_bundle, {"model.onnx": b"no graph"})
    assert problems(doctor(broken)[1]) == ["graph"]
    assert problems(doctor(changed(orin_bundle, lowering={}))[1]) == ["bundle"]


def test_quant_of_a_bundle_is_settled(doctor: Any, orin_bundle: Path) -> None:
    code, said = doctor(orin_bundle, "--quant", "w4-rtn")
    assert code == 2
    assert "of a bundle" in said["error"]


def libraries(folder: Path, **tables: dict[str, Any]) -> dict[str, bytes]:
    from library_files import library_file, table

    return {
        f"plugins/{arch}/libedgeattn_plugins.so": library_file(
            folder, table(arch=arch, **changed), machine=arch
        ).read_bytes()
        for arch, changed in tables.items()
    }


@pytest.mark.parametrize(
    ("target", "tables", "words"),
    [
        ("jetson-orin", {"aarch64": {}}, None),
        ("l4", {"aarch64": {}}, "a plugin library for x86_64"),
        ("l4", {"aarch64": {}, "x86_64": {}}, None),
        ("jetson-orin", {"x86_64": {}}, "there is plugins/x86_64"),
        ("jetson-thor", {"aarch64": {}}, "on SM 110"),
        ("jetson-orin", {"aarch64": {"ops": []}}, "the plugin RecurrentLinearAttention"),
        ("jetson-orin", {"aarch64": {"abi": PLUGIN_ABI + 1}}, f"of ABI {PLUGIN_ABI + 1}"),
        ("jetson-orin", {}, "there is none"),
    ],
)
def test_plugins_of_a_bundle(
    doctor: Any,
    orin_bundle: Path,
    changed: Any,
    tmp_path_factory: pytest.TempPathFactory,
    target: str,
    tables: dict[str, Any],
    words: str | None,
) -> None:
    from op_cases import op_model

    from edgeattn.ops.recurrent_linear_attention import SPEC
    from edgeattn.ops.spec import Case

    dims = {"B": 1, "H": 2, "Hkv": 2, "T": 20, "Dk": 64, "Dv": 64, "Dg": 1}
    graph = op_model(SPEC, Case("one", dims, "fp16", {}), 21).SerializeToString()
    files = libraries(tmp_path_factory.mktemp("libraries"), **tables)
    bundle = changed(orin_bundle, {"model.onnx": graph, **files}, plugin_abi=PLUGIN_ABI)
    found = about(doctor(bundle, "--target", target)[1], "plugins")
    assert found["level"] == ("ok" if words is None else "problem")
    assert words is None or words in found["found"]


def test_a_bundle_without_plugins_has_function_bodies(
    doctor: Any, orin_bundle: Path, changed: Any
) -> None:
    from op_cases import op_model

    from edgeattn.ops.recurrent_linear_attention import SPEC

    graph = op_model(SPEC, SPEC.cases[0], 21)
    bundle = changed(orin_bundle, {"model.onnx": graph.SerializeToString()})
    assert about(doctor(bundle)[1], "plugins")["level"] == "warning"
    assert [f for f in doctor(bundle, "--target", "cpu")[1]["findings"] if f["about"] == "plugins"
            ] == []  # fmt: skip


def with_engine(bundle: Path, **changed: Any) -> Path:
    from edgeattn.bundle.bundle import hash_file
    from edgeattn.engine.record import SCHEMA_VERSION, EngineRecord

    folder = bundle / "engines"
    folder.mkdir(exist_ok=True)
    file = folder / f"one-{len(list(folder.iterdir()))}.engine"
    file.write_bytes(b"engine")
    record = {
        "schema_version": SCHEMA_VERSION,
        "edgeattn": "0",
        "engine": file.name,
        "bytes": 6,
        "sha256": hash_file(file),
        "model_sha256": hash_file(bundle / "model.onnx"),
        "targets": ("jetson-orin-agx-64gb@jetpack7.2",),
        "flavour": "tensorrt-rtx",
        "tensorrt": "1.7.1.116",
        "sms": (87,),
        "arch": "x86_64",
        "gpu": None,
        "driver": None,
        "plugins": None,
        "profiles": {},
        "stripped": False,
        "layers": 1,
        "layer_source": "network",
        "layer_list": (),
        "seconds": {},
        "peak_rss_mb": None,
    }
    text = EngineRecord(**{**record, **changed}).to_json()
    file.with_name(f"{file.name}.json").write_text(text)
    return bundle


def test_engines_elsewhere_are_judged_by_their_record(
    doctor: Any, orin_bundle: Path, changed: Any
) -> None:
    bundle = with_engine(changed(orin_bundle))
    assert about(doctor(bundle)[1], "engines")["level"] == "ok"
    code, said = doctor(bundle, "--target", "rtx-5090")
    assert (code, problems(said)) == (1, ["engines"])
    assert "is for SM 87, rtx-5090 has SM 120" in about(said, "engines")["found"]
    with_engine(bundle, sms=(89, 120))  # one that fits is enough
    assert doctor(bundle, "--target", "rtx-5090")[0] == 0


@pytest.mark.parametrize(
    ("record", "words"), [({"model_sha256": "0" * 64}, "exported again"), ({"bytes": 7}, "has 6")]
)
def test_engines_elsewhere_are_whole_and_of_this_graph(
    doctor: Any, orin_bundle: Path, changed: Any, record: dict[str, Any], words: str
) -> None:
    code, said = doctor(with_engine(changed(orin_bundle), **record))
    assert (code, problems(said)) == (1, ["engines"])
    assert words in about(said, "engines")["found"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"sms": (89,)}, None),
        ({"sms": (120,)}, "built for SM 120"),
        ({"sms": (89,), "tensorrt": "1.6.0"}, "built by TensorRT-RTX 1.6.0"),
        ({"sms": (89,), "arch": "aarch64"}, "built on aarch64"),
        ({"sms": (89,), "bytes": 7}, "it has 6"),
        ({"sms": (89,), "model_sha256": "0" * 64}, "exported again"),
    ],
)
def test_engines_here_are_those_that_would_run(
    doctor: Any, orin_bundle: Path, changed: Any, record: dict[str, Any], words: str | None
) -> None:
    if not TENSORRT_RTX.is_available():
        pytest.skip("TensorRT-RTX is not installed (edgeattn[rtx])")
    bundle = with_engine(changed(orin_bundle), **record)
    code, said = doctor(bundle, machine=RTX_4090)
    assert said["target"] == "rtx-4090@rtx1.7"
    assert (problems(said), code) == (([], 0) if words is None else (["engines"], 1))
    assert words is None or words in about(said, "engines")["found"]


def test_a_built_engine_needs_no_memory_to_build(
    doctor: Any, orin_bundle: Path, changed: Any
) -> None:
    """A board too small to build what it runs, once with an engine from a larger one."""
    manifest = json.loads((orin_bundle / "manifest.json").read_text())
    shape = {**manifest["shape"], "vocab_size": 1_000_000, "hidden_size": 1024}
    bundle = changed(orin_bundle, shape=shape)
    assert problems(doctor(bundle, "--target", "jetson-orin-nano-8gb")[1]) == ["building"]
    said = doctor(with_engine(bundle), "--target", "jetson-orin-nano-8gb")[1]
    assert (problems(said), said["memory"]["build"]) == ([], 0)
