"""A real TensorRT parser and builder takes, refuses, crashes and times out as the report says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model
from processes import is_alive, wait_for_pid, wait_until

from edgeattn.engine import build, child_process, flavours
from edgeattn.engine.build import BuildReport, check_build
from edgeattn.engine.flavours import TENSORRT_RTX, Flavour
from edgeattn.errors import BundleError, LoweringError

needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
PROFILES = {"x": ((1, 64), (4, 64), (8, 64))}
TIMEOUT_S = 120.0


def write_model(
    path: Path, nodes: list, initializers: list, *, opset: int = 21, external: bool = False
) -> Path:
    """Writes a graph with input x[n, 64] and output y, both fp16."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    save_model(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        path,
        save_as_external_data=external,
        location=f"{path.name}.data",
        size_threshold=0,
    )
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float16), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="/layers.0/linear")
    return write_model(tmp_path / "linear.onnx", [node], [weight], external=True)


@pytest.fixture
def int4_linear(tmp_path: Path) -> Path:
    packed = bytes(64 * 64 // 2)
    weight = helper.make_tensor("w", TensorProto.INT4, [64, 64], packed, raw=True)
    scale = numpy_helper.from_array(np.ones((1, 64), np.float16), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=64),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    return write_model(tmp_path / "int4.onnx", nodes, [weight, scale])


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Replaces the child process's module by the given code."""

    def replace(code: str) -> None:
        (tmp_path / "stand_in_child.py").write_text(textwrap.dedent(code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(child_process, "_CHILD_MODULE", "stand_in_child")
        monkeypatch.setattr(Flavour, "is_available", lambda self: True)

    return replace


def check(model: Path, sm: int = 86, timeout_s: float = TIMEOUT_S) -> BuildReport:
    return check_build(model, sm=sm, profiles=PROFILES, timeout_s=timeout_s)


@needs_rtx
@pytest.mark.parametrize("sm", [86, 89])
def test_builds_dynamic_shapes_with_external_data(linear: Path, sm: int) -> None:
    assert linear.with_name("linear.onnx.data").is_file()
    report = check(linear, sm)
    assert report.status == "built", report.reason
    assert (report.sms, report.reason, report.exit_detail) == ((sm,), "", "")
    assert report.parser_errors == report.log_errors == ()
    assert report.layers
    assert report.layers > 0
    assert report.plugin_layers == 0
    assert report.engine_bytes
    assert report.engine_bytes > 64 * 64
    assert report.seconds_parse is not None
    assert report.seconds_build is not None
    assert report.version
    assert report.version[0].isdigit()
    # the child's own peak: this process, with onnx and perhaps torch, must not count
    assert report.peak_rss_mb
    assert 50 < report.peak_rss_mb < 2000
    assert json.loads(json.dumps(report.to_dict()))["status"] == "built"


@needs_rtx
def test_an_engine_that_cannot_be_written(linear: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the system says: No such file or directory: free some"):
        build.build_engine(
            linear,
            tmp_path / "none" / "engine",
            flavour=TENSORRT_RTX,
            sms=(86,),
            profiles=[PROFILES],
            options=build.BuildOptions(),
            timeout_s=TIMEOUT_S,
        )


@needs_rtx
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_timing_cache_spoils_no_build(
    linear: Path, tmp_path: Path, content: bytes | None
) -> None:
    """TensorRT-RTX takes one and keeps nothing in it."""
    cache = tmp_path / "cache"
    if content is not None:
        cache.write_bytes(content)
    report = build.build_engine(
        linear,
        tmp_path / "engine",
        flavour=TENSORRT_RTX,
        sms=(86,),
        profiles=[PROFILES],
        options=build.BuildOptions(timing_cache=cache),
        timeout_s=TIMEOUT_S,
    )
    assert (report.status, report.exit_detail) == ("built", "")


@needs_rtx
def test_missing_external_data_is_refused(linear: Path) -> None:
    linear.with_name("linear.onnx.data").unlink()
    report = check(linear)
    assert report.status == "refused"
    assert "parser refuses" in report.reason
    assert report.engine_bytes is None


@needs_rtx
@pytest.mark.parametrize(("expected", "status"), [(0, "built"), (1, "refused")])
def test_a_network_must_have_the_plugin_layers_of_its_graph(
    linear: Path, expected: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "expected_layers", lambda library, nodes: expected)
    report = check(linear)
    assert report.status == status
    assert (f"0 plugin layers, where the graph has {expected}" in report.reason) == bool(expected)


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no onnx at all")
    report = check(tmp_path / "m.onnx")
    assert report.status == "refused"
    assert "parser refuses" in report.reason


@needs_rtx
def test_parser_error_names_the_node(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="/layers.1/attention/det")
    report = check(write_model(tmp_path / "m.onnx", [node], []))
    assert report.status == "refused"
    assert report.parser_errors[0].node == "/layers.1/attention/det"
    assert report.parser_errors[0].op == "Det"
    assert "/layers.1/attention/det" in report.reason
    assert report.engine_bytes is None
    assert report.seconds_build is None


@needs_rtx
def test_int4_is_refused_on_turing_and_built_on_ampere(int4_linear: Path) -> None:
    turing, ampere = check(int4_linear, 75), check(int4_linear, 86)
    assert ampere.status == "built", ampere.reason
    assert turing.status == "refused"
    assert turing.log_errors
    assert "builder refuses" in turing.reason


@needs_rtx
def test_unknown_sm_names_the_available_ones(linear: Path) -> None:
    with pytest.raises(LoweringError, match=r"75, 80, 86, 89.*SM 87"):
        check(linear, 87)


@needs_rtx
@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({}, "x has a dynamic shape"),
        ({**PROFILES, "z": ((1,), (1,), (1,))}, "names z, which is no input"),
        ({"x": ((1, 32), (4, 32), (8, 32))}, "does not fit"),
        ({"x": ((1,), (4,), (8,))}, "does not fit"),
        ({"x": ((8, 64), (4, 64), (1, 64))}, "does not fit"),
    ],
)
def test_profile_that_does_not_fit(linear: Path, profiles: dict, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        check_build(linear, sm=86, profiles=profiles, timeout_s=TIMEOUT_S)


def test_child_that_aborts_costs_only_itself(linear: Path, child) -> None:
    child("""
        import json, os, sys
        result = json.load(sys.stdin)["result"]
        with open(result, "w") as file:
            json.dump({"stage": "building", "layers": 7, "version": "9.9"}, file)
        print("terminate called", file=sys.stderr, flush=True)
        os.abort()
    """)
    report = check(linear)
    assert report.status == "refused"
    assert report.exit_detail == "died of SIGABRT: terminate called"
    assert "building" in report.reason
    # what it had found out before is kept
    assert (report.layers, report.version) == (7, "9.9")


def test_child_that_dies_before_its_first_word(linear: Path, child) -> None:
    child("raise SystemExit(3)")
    report = check(linear)
    assert report.status == "refused"
    assert report.exit_detail == "exit code 3"


def test_child_out_of_memory(linear: Path, child) -> None:
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert check(linear).exit_detail == "died of SIGKILL (out of memory?)"


def test_timeout_kills_the_child(linear: Path, child, tmp_path: Path) -> None:
    child(f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """)
    report = check(linear, timeout_s=3.0)
    assert report.status == "refused"
    assert report.exit_detail == "no result after 3 s, killed"
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_ctrl_c_kills_the_child(linear: Path, child, tmp_path: Path) -> None:
    child(f"""
        import os, time
        open("{tmp_path}/pid", "w").write(str(os.getpid()))
        time.sleep(60)
    """)
    code = f"""
        from pathlib import Path
        from edgeattn.engine import build, child_process
        from edgeattn.engine.flavours import Flavour
        child_process._CHILD_MODULE = "stand_in_child"
        Flavour.is_available = lambda self: True
        build.check_build(Path({str(linear)!r}), sm=86, profiles={{}}, timeout_s=60)
    """
    # a session of its own: the signal reaches the parent alone, as from a supervisor
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=tmp_path,
    ) as parent:
        pid = wait_for_pid(tmp_path / "pid")
        parent.send_signal(signal.SIGINT)
        _, stderr = parent.communicate(timeout=20)
    assert b"KeyboardInterrupt" in stderr
    assert not is_alive(pid)


@needs_rtx
def test_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
        import os, time
        from edgeattn.engine import child_report
        child_report.die_with_parent()
        open("{tmp_path}/pid", "w").write(str(os.getpid()))
        time.sleep(60)
    """
    (tmp_path / "child.py").write_text(textwrap.dedent(code))
    start = f"import subprocess, sys; subprocess.run([sys.executable, '{tmp_path}/child.py'])"
    with subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path) as parent:
        pid = wait_for_pid(tmp_path / "pid")
        parent.kill()
    wait_until(lambda: not is_alive(pid), 10)


def test_without_the_package_nothing_is_checked(
    linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flavours, "find_spec", lambda name: None)
    report = check(linear)
    assert (report.status, report.reason) == ("not checked", "install edgeattn[rtx]")


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.onnx does not exist"):
        check(tmp_path / "none.onnx")
