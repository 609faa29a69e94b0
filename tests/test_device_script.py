"""build_on_device.sh: what it asks of trtexec, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from processes import wait_until

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.writer import BundleWriter
from edgeattn.devices.registry import parse_target
from edgeattn.engine.profiles import decoder_profiles, input_shapes
from edgeattn.engine.record import read_engines
from edgeattn.pipeline.device_script import write_device_script
from edgeattn.planner.lowering import Lowering

SCRIPT = "build_on_device.sh"
# Writes its arguments down, one a line, and an engine.
TRTEXEC = """#!/bin/sh
for word; do
    echo "$word"
    case $word in --saveEngine=*) engine=${word#*=} ;; esac
done >"$TRTEXEC_LOG"
echo engine >"$engine"
"""


@pytest.fixture(scope="module")
def exported(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("a100", verify=False)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / "a bundle's copy"
    shutil.copytree(exported, path)
    return path


@pytest.fixture
def tool(tmp_path: Path) -> Callable[[str, str], Path]:
    """A function that puts a program on the PATH of the script."""

    def make(name: str, text: str) -> Path:
        file = tmp_path / "my tools" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    make("uname", "#!/bin/sh\necho x86_64\n")
    make("nvidia-smi", "#!/bin/sh\nexit 9\n")
    make("trtexec", TRTEXEC)
    return make


def environment(tmp_path: Path) -> dict[str, str]:
    path = f"{tmp_path / 'my tools'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TRTEXEC_LOG": str(tmp_path / "arguments")}


def run(bundle: Path, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(bundle / SCRIPT), *options],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def arguments(tmp_path: Path) -> list[str]:
    return (tmp_path / "arguments").read_text().splitlines()


def refusal(bundle: Path, tmp_path: Path) -> str:
    done = run(bundle, tmp_path)
    assert done.returncode == 1
    assert not list(bundle.glob("engines/*"))
    return done.stderr.splitlines()[-1]


def test_the_engine_appears_whole(bundle: Path, tmp_path: Path, tool: object) -> None:
    done = run(bundle, tmp_path, "--verbose", "--timingCacheFile=my cache")
    assert done.returncode == 0, done.stderr
    engine = bundle / "engines" / "trtexec.engine"
    assert done.stdout.splitlines() == [str(engine)]
    assert list((bundle / "engines").iterdir()) == [engine]
    asked = arguments(tmp_path)
    assert f"--onnx={bundle}/model.onnx" in asked
    assert {"--stronglyTyped", "--skipInference"} < set(asked)
    assert asked[-2:] == ["--verbose", "--timingCacheFile=my cache"]
    assert not [word for word in asked if "lugin" in word]
    # without a record edgeattn does not take it for one of its own
    assert read_engines(Bundle.open(bundle)) == ()


@pytest.mark.parametrize("recipe", [{}, {"kv_cache": "static", "context": 64, "batch": 2}], ids=str)
def test_shapes_are_those_edgeattn_builds_for(
    export_tiny: Callable[..., Path], tmp_path: Path, tool: object, recipe: dict[str, Any]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(export_tiny("a100", verify=False, **recipe), bundle)
    assert run(bundle, tmp_path).returncode == 0
    asked, opened = arguments(tmp_path), Bundle.open(bundle)
    lowering = Lowering.from_dict(opened.manifest.lowering)
    context = lowering.context or opened.shape.max_context
    profiles = decoder_profiles(context, lowering.batch, separate=True)
    assert len(profiles) == 2
    for index, profile in enumerate(profiles):
        place = asked.index(f"--profile={index}")
        wanted = input_shapes(opened.model_file, profile)
        # trtexec takes the three words behind a profile's number for its shapes
        for bound, word in enumerate(asked[place + 1 : place + 4]):
            flag, _, text = word.partition("=")
            assert flag == ("--minShapes", "--optShapes", "--maxShapes")[bound]
            pairs = [pair.rpartition(":") for pair in text.split(",")]
            found = {name: tuple(map(int, sizes.split("x"))) for name, _, sizes in pairs}
            assert found == {name: shapes[bound] for name, shapes in wanted.items()}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_damaged_file_is_refused(bundle: Path, tmp_path: Path, tool: object, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert "but one is missing or was changed: copy the bundle again" in refusal(bundle, tmp_path)
    (bundle / name).unlink()
    assert "but one is missing or was changed: copy the bundle again" in refusal(bundle, tmp_path)


def test_the_wrong_place_is_refused(
    bundle: Path, tmp_path: Path, tool: Callable[[str, str], Path]
) -> None:
    tool("nvidia-smi", "#!/bin/sh\necho 9.0\n")
    assert "expected a GPU with SM 80, but this machine has SM 90" in refusal(bundle, tmp_path)
    tool("uname", "#!/bin/sh\necho aarch64\n")
    assert "expected a machine with x86_64" in refusal(bundle, tmp_path)


@pytest.mark.parametrize("answer", ["8.0", "[N/A]", ""])
def test_the_right_place_is_taken(
    bundle: Path, tmp_path: Path, tool: Callable[[str, str], Path], answer: str
) -> None:
    tool("nvidia-smi", f"#!/bin/sh\necho '{answer}'\n")
    assert run(bundle, tmp_path).returncode == 0


def test_trtexec_is_looked_for(
    bundle: Path, tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    tool("trtexec", TRTEXEC).rename(tmp_path / "elsewhere" / "it")
    if not Path("/usr/src/tensorrt/bin/trtexec").exists() and not shutil.which("trtexec"):
        assert "there is none at /usr/src/tensorrt/bin/trtexec" in refusal(bundle, tmp_path)
    monkeypatch.setenv("TRTEXEC", "elsewhere/it")
    assert run(bundle, tmp_path).returncode == 0
    monkeypatch.setenv("TRTEXEC", "elsewhere/nothing")
    assert "there is none at elsewhere/nothing: install it" in run(bundle, tmp_path).stderr


@pytest.mark.parametrize(
    ("ending", "message"), [("exit 3", "ended with exit code 3"), ('rm "$engine"', "wrote none")]
)
def test_a_failing_trtexec_leaves_nothing(
    bundle: Path, tmp_path: Path, tool: Callable[[str, str], Path], ending: str, message: str
) -> None:
    tool("trtexec", f"{TRTEXEC}\n{ending}\n")
    assert message in refusal(bundle, tmp_path)


def test_an_interrupted_one_neither(
    bundle: Path, tmp_path: Path, tool: Callable[[str, str], Path]
) -> None:
    tool("trtexec", f"{TRTEXEC}\nsleep 300\n")
    with subprocess.Popen(
        ["sh", bundle / SCRIPT], env=environment(tmp_path), start_new_session=True
    ) as script:
        wait_until(lambda: list(bundle.glob("engines/.trtexec-*")), 120)
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does
        assert script.wait(120) == 130
    assert not list(bundle.glob("engines/*")) + list(bundle.glob("engines/.*"))


def graph_with_function(folder: Path) -> None:
    """A graph with a function body and weights beside it."""
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), np.float16), "w")
    nodes = [
        helper.make_node("MatMul", ["input_ids", "w"], ["h"]),
        helper.make_node("Twice", ["h"], ["y"], domain="edgeattn"),
    ]
    body = helper.make_function(
        "edgeattn",
        "Twice",
        ["x"],
        ["z"],
        [helper.make_node("Add", ["x", "x"], ["z"])],
        [helper.make_opsetid("", 20)],
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.FLOAT16, ["batch_size", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch_size", 4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgeattn", 1)]
    model = helper.make_model(graph, functions=[body], opset_imports=opsets)
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )


@pytest.mark.parametrize(
    ("target", "model"),
    [("jetson-orin@jetpack6.2", "model.stripped.onnx"), ("jetson-orin", "model.onnx")],
)
def test_plugins_win_over_function_bodies(
    exported: Path, tmp_path: Path, tool: Callable[[str, str], Path], target: str, model: str
) -> None:
    """An old parser takes a body where it finds one, so that it gets a graph without."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    graph_with_function(folder)
    library = folder / "plugins" / "aarch64" / "libedgeattn_plugins.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"library")
    opened = Bundle.open(exported)
    lowering = replace(Lowering.from_dict(opened.manifest.lowering), batch=2)
    writer = BundleWriter(folder, tmp_path / "final", force=False)
    write_device_script(writer, parse_target(target), lowering, opened.shape, library=library)

    tool("uname", "#!/bin/sh\necho aarch64\n")
    done = run(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    asked = arguments(tmp_path)
    assert f"--onnx={folder}/{model}" in asked
    assert f"--dynamicPlugins={library}" in asked
    assert "--preview=+aliasedPluginIO1003" in asked
    assert "--maxShapes=input_ids:2x4" in asked
    read = onnx.load(folder / model)  # finds the weights, too
    assert len(read.functions) == (0 if "stripped" in model else 1)
    assert [node.op_type for node in read.graph.node] == ["MatMul", "Twice"]
    assert (folder / "model.stripped.onnx").exists() == ("stripped" in model)
    library.write_bytes(b"changed")
    shutil.rmtree(folder / "engines")
    assert "one is missing or was changed" in refusal(folder, tmp_path)


def test_no_script_for_other_targets(export_tiny: Callable[..., Path]) -> None:
    assert not (export_tiny("cpu") / SCRIPT).exists()


def test_the_manifest_lists_the_script(exported: Path) -> None:
    assert SCRIPT in Bundle.open(exported).manifest.files
    assert os.access(exported / SCRIPT, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(exported: Path) -> None:
    done = subprocess.run(
        ["shellcheck", exported / SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
