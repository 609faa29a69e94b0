"""`edgeattn build`: engines by a real builder, and what it refuses before and while it builds."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgeattn.devices import probe as probing
from edgeattn.devices.libcuda import GpuFacts
from edgeattn.engine import child_process, folder
from edgeattn.engine.flavours import TENSORRT_RTX, Flavour
from edgeattn.engine.record import EngineRecord
from edgeattn.errors import BundleError
from edgeattn.pipeline import build as module
from edgeattn.pipeline import build_plan

needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="needs edgeattn[rtx]")
NO_GPU = replace(probing.probe(), gpu=None, gpu_problem="there is no libcuda.so.1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine wherever the tests run."""
    monkeypatch.setattr(build_plan, "probe", lambda: NO_GPU)


@pytest.fixture
def bundle(export_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function to a copy of a proven bundle, as `export_tiny` makes it."""

    def copy(target: str, quant: str = "none", **fields: Any) -> Path:
        path = tmp_path / f"bundle-{target}-{quant}"
        shutil.copytree(export_tiny(target, quant, context=128, **fields), path)
        return path

    return copy


def engines(bundle: Path) -> list[str]:
    folder = bundle / "engines"
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


@needs_rtx
@pytest.mark.parametrize("quant", ["none", "w4-rtn"])
def test_an_engine_and_its_record(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], quant: str
) -> None:
    path = bundle("rtx-4090", quant)
    result = edgeattn("build", path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert not facts["was_there"]
    assert facts["where"] == "not run on this device"
    engine = Path(facts["path"])
    assert engines(path) == [engine.name, f"{engine.name}.json"]
    record = EngineRecord.model_validate_json(engine.with_name(f"{engine.name}.json").read_bytes())
    assert record.sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert record.bytes == engine.stat().st_size > 10_000
    model = (path / "model.onnx").read_bytes()
    assert record.model_sha256 == hashlib.sha256(model).hexdigest()
    assert (record.flavour, record.sms, record.gpu) == ("tensorrt-rtx", (89,), None)
    assert record.targets == ("rtx-4090@rtx1.7",)
    assert record.layers == len(record.layer_list) > 50
    assert {"HALF", "INT64"} <= {layer.precision for layer in record.layer_list}
    assert ("INT4" in {layer.precision for layer in record.layer_list}) == (quant == "w4-rtn")
    assert record.profiles["any"]["past_sequence_length"] == "0:63:127"
    assert record.seconds["build"] > 0

    before = engine.stat().st_mtime_ns
    again = edgeattn("build", path)
    assert "was there already" in again.output
    assert engine.stat().st_mtime_ns == before
    assert json.loads(edgeattn("build", path, "--force", "--json").stdout)["was_there"] is False
    assert engine.stat().st_mtime_ns > before
    assert edgeattn("verify", path, "--no-tensorrt").exit_code == 0  # an engine damages no bundle


@needs_rtx
@pytest.mark.parametrize(
    ("own", "target", "sm"),
    [
        ("rtx-5090", None, 120),
        ("rtx-pro-6000", None, 120),
        ("a100", None, 80),
        ("a100", "a10", 86),
        ("a100", "l4", 89),
        ("a100", "t4", 75),
        ("a100", "dgx-spark", 121),
    ],
)
def test_engines_for_gpus_that_are_not_here(
    bundle: Callable[..., Path],
    edgeattn: Callable[..., Any],
    own: str,
    target: str | None,
    sm: int,
) -> None:
    path = bundle(own)
    chosen = ["--target", target] if target else []
    chosen += ["--flavour", "tensorrt-rtx"] if own == "a100" else []
    facts = json.loads(edgeattn("build", path, *chosen, "--json").stdout)
    assert facts["sms"] == [sm]
    assert facts["where"] == "not run on this device"


@needs_rtx
def test_one_engine_for_several_gpus(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    path = bundle("rtx-4090")
    both = ["--target", "rtx-4090", "--target", "rtx-5090"]
    facts = json.loads(edgeattn("build", path, *both, "--json").stdout)
    assert facts["sms"] == [89, 120]
    assert facts["targets"] == ["rtx-4090@rtx1.7", "rtx-5090@rtx1.7"]
    assert facts["path"].endswith("-sm89-sm120.engine")
    edgeattn("build", path)
    assert len(engines(path)) == 4  # each beside the other


@needs_rtx
@pytest.mark.parametrize("quant", ["none", "w4-rtn"])
@pytest.mark.parametrize("software", ["jetpack6.2", "jetpack7.2"])
def test_what_is_built_on_the_device_is_checked_here(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], software: str, quant: str
) -> None:
    """JetPack 6.2 reads opset 20, and 21 with int4, and primitive operators."""
    path = bundle(f"jetson-orin@{software}", quant)
    result = edgeattn("build", path, "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert "parsed and built the graph for SM 86 here: copy" in facts["error"]
    assert "--on user@host" in facts["error"]
    assert facts["check"]["status"] == "built"
    assert engines(path) == []


@needs_rtx
def test_the_check_is_for_the_target_that_was_named(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    result = edgeattn("build", bundle("a100"), "--target", "h100", "--json")
    assert json.loads(result.stdout)["check"]["sms"] == [120]


REFUSALS = [
    ("cpu", [], 1, "a target with TensorRT.* cpu@onnxruntime runs the graph itself"),
    ("rtx-4090", ["--target", "rtx-4091"], 2, "rtx-4090"),
    ("rtx-4090", ["--target", "cpu"], 1, "cpu@onnxruntime runs the graph itself"),
    ("rtx-4090", ["--flavour", "trt"], 2, "flavour"),
    ("rtx-4090", ["--target", "rtx-4090@trt10.13"], 1, "with standard: export it"),
    ("jetson-orin", ["--flavour", "tensorrt-rtx"], 1, "SM 87, which it does not"),
    ("rtx-4090", ["--target", "rtx-4090", "--target", "a100"], 2, "of one flavour"),
    ("a100", ["--target", "a100", "--target", "h100"], 2, "one target for TensorRT"),
    ("rtx-4090", ["--profile", "sequence_length=1:1:129"], 1, "1 to 128 new tokens"),
    ("rtx-4090", ["--profile", "batch_size=1:1:2"], 1, "1 to 1 rows .* larger --batch"),
    ("rtx-4090", ["--profile", "length=1"], 2, "PROFILE"),
    ("rtx-4090", ["--timing-cache", "cache"], 2, "leave --timing-cache out"),
    ("rtx-4090", ["--strip-weights"], 1, "a GPU in this machine.*no libcuda.so.1"),
]


@pytest.mark.parametrize(("target", "options", "code", "words"), REFUSALS)
def test_refused_before_anything_is_built(
    bundle: Callable[..., Path],
    edgeattn: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    options: list[str],
    code: int,
    words: str,
) -> None:
    def building(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(module, "build_engine", building)
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)
    path = bundle(target)
    result = edgeattn("build", path, *options)
    assert result.exit_code == code
    assert re.search(words, result.output.replace("\n", " ")), result.output
    assert result.output.count("edgeattn: ") == 1
    assert engines(path) == []


def test_without_tensorrt_the_extra_is_named(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "is_available", lambda self: False)
    result = edgeattn("build", bundle("rtx-4090"))
    assert result.exit_code == 1
    assert "install edgeattn[rtx]" in result.output


def test_int4_does_not_go_to_a_gpu_without_kernels_for_it(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    options = ["--target", "t4", "--flavour", "tensorrt-rtx"]
    result = edgeattn("build", bundle("a100", "w4-rtn"), *options)
    assert result.exit_code == 1
    assert "stores int4 weights, which t4 (SM75) has no kernels for" in result.output


def test_short_memory_is_said_before(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)
    monkeypatch.setattr(build_plan, "probe", lambda: replace(NO_GPU, free_memory_bytes=10_000_000))
    result = edgeattn("build", bundle("rtx-4090"))
    assert result.exit_code == 1
    assert "0.3 GB of free memory" in result.output
    assert "0.0 GB are free" in result.output


def test_another_gpu_in_the_machine_is_not_the_device(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuFacts("NVIDIA H100", 90, 80 << 30, 80 << 30)
    monkeypatch.setattr(build_plan, "probe", lambda: replace(NO_GPU, gpu=gpu, gpu_problem=""))
    monkeypatch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
    result = edgeattn("build", bundle("a100"))
    assert result.exit_code == 1
    assert "NVIDIA A100" in result.output
    assert "its GPU is SM 90; it was not checked" in result.output


def test_an_older_tensorrt_on_the_device_is_refused(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuFacts("NVIDIA A100", 80, 40 << 30, 40 << 30)
    here = replace(NO_GPU, gpu=gpu, gpu_problem="", arch="x86_64", tensorrt="10.3.0.30")
    monkeypatch.setattr(build_plan, "probe", lambda: here)
    result = edgeattn("build", bundle("a100"))
    assert result.exit_code == 1
    assert "10.3.0.30 is installed here" in result.output


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Replaces the child process's module by the given code; the environment that finds it."""

    def replace_child(code: str) -> dict[str, str]:
        (tmp_path / "stand_in_child.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(child_process, "_CHILD_MODULE", "stand_in_child")
        monkeypatch.setattr(Flavour, "is_available", lambda self: True)
        return dict(os.environ)

    return replace_child


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.abort()", "died of SIGABRT: something TensorRT said"),
        ("os.kill(os.getpid(), 9)", "died of SIGKILL (out of memory?)"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
    ],
)
def test_a_builder_that_dies_leaves_nothing(
    bundle: Callable[..., Path],
    edgeattn: Callable[..., Any],
    stand_in: Callable[[str], object],
    end: str,
    words: str,
) -> None:
    stand_in(f"""
        import json, os, sys
        request = json.load(sys.stdin)
        open(request["engine"], "wb").write(b"half an engine")
        with open(request["result"], "w") as file:
            json.dump({{"stage": "building", "version": "1.7.1", "parsed": True}}, file)
        print("something TensorRT said", file=sys.stderr, flush=True)
        {end}
    """)
    path = bundle("rtx-4090")
    result = edgeattn("build", path)
    assert result.exit_code == 1
    assert "TensorRT-RTX stopped while building" in result.output
    assert words in result.output
    assert engines(path) == []


def test_ctrl_c_stops_the_builder_and_leaves_nothing(
    bundle: Callable[..., Path], stand_in: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    environment = stand_in(f"""
        import json, os, sys, time
        open(json.load(sys.stdin)["engine"], "wb").write(b"half an engine")
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """)
    path = bundle("rtx-4090")
    code = """
        import sys
        from edgeattn.cli import main
        from edgeattn.engine import child_process
        from edgeattn.engine.flavours import Flavour
        child_process._CHILD_MODULE = "stand_in_child"
        Flavour.is_available = lambda self: True
        main(["build", sys.argv[1]])
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    ) as parent:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.send_signal(signal.SIGINT)
        _, stderr = parent.communicate(timeout=20)
    assert parent.returncode == 130
    assert b"nothing half-written was left behind" in stderr
    assert engines(path) == []
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_what_a_killed_build_left_is_taken_away(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], stand_in: Callable[[str], object]
) -> None:
    stand_in("raise SystemExit(3)")
    path = bundle("rtx-4090")
    (path / "engines" / ".building-killed").mkdir(parents=True)
    (path / "engines" / ".building-killed" / "engine").write_bytes(b"half")
    assert edgeattn("build", path).exit_code == 1
    assert engines(path) == []


def test_two_builds_do_not_meet(bundle: Callable[..., Path], edgeattn: Callable[..., Any]) -> None:
    path = bundle("rtx-4090")
    with folder.alone(path / "engines"):
        result = edgeattn("build", path)
    assert result.exit_code == 1
    assert "another one is at work there" in result.output


def test_the_lock_of_a_build_that_just_ended_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes its file away; who had opened that before may not go on beside who comes after."""
    engines, take = tmp_path / "engines", fcntl.flock

    def ended_before(lock: Any, how: int) -> None:
        (engines / ".lock").unlink()
        take(lock, how)

    monkeypatch.setattr(folder.fcntl, "flock", ended_before)
    with pytest.raises(BundleError, match="another one is at work"), folder.alone(engines):
        pass


@needs_rtx
def test_a_full_disk_leaves_the_engine_that_was_there(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle("rtx-4090")
    assert edgeattn("build", path).exit_code == 0
    before = {name: (path / "engines" / name).read_bytes() for name in engines(path)}

    def full_disk(record: EngineRecord) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EngineRecord, "to_json", full_disk)
    result = edgeattn("build", path, "--force")
    assert result.exit_code == 1
    assert "the system says: No space left on device: free some space" in result.output
    assert {name: (path / "engines" / name).read_bytes() for name in engines(path)} == before


@needs_rtx
def test_a_target_named_twice_is_one(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    twice = ("--target", "rtx-4090", "--target", "rtx4090")
    result = edgeattn("build", bundle("rtx-4090"), *twice, "--json")
    assert json.loads(result.stdout)["targets"] == ["rtx-4090@rtx1.7"]


def test_a_timing_cache_has_a_folder(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    result = edgeattn("build", bundle("a100"), "--timing-cache", tmp_path / "none" / "cache")
    assert result.exit_code == 1
    assert "expected a folder for" in result.output


def test_a_record_that_does_not_read_is_named(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)
    path = bundle("rtx-4090")
    (path / "engines").mkdir()
    record = path / "engines" / "other.engine.json"
    record.write_text("{")
    result = edgeattn("build", path)
    assert result.exit_code == 1
    assert f"{record}, but it does not read: delete it, and build" in result.output


@pytest.mark.parametrize(("name", "words"), [("model.onnx", "sha256"), ("model.onnx.data", "")])
def test_a_changed_bundle_is_not_built(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], name: str, words: str
) -> None:
    path = bundle("rtx-4090")
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    result = edgeattn("build", path)
    assert result.exit_code == 1
    assert "its content was changed" in result.output
    assert words in result.output
