"""The runtime half in an environment without torch: what an application installs on a device.

The environment holds the wheel with extra `ort` and nothing else. Once with the Python of this test
run, once (slow) with the oldest pair we promise: Python 3.10 and ONNX Runtime 1.23.2, JetPack 6.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TEXT = (
    "It is a truth universally acknowledged, that a single man must be in want of a wife.\n" * 200
)


@dataclass(frozen=True)
class LightInstall:
    """A virtual environment that holds the wheel."""

    root: Path

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [self.root / "bin" / command[0], *command[1:]],
            env={**environment, "COLUMNS": "100"},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            check=False,
        )

    def json(self, *command: str | Path) -> dict:
        done = self.run("edgeattn", *command, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def _python310() -> str:
    """A Python 3.10 that starts (a pyenv shim may exist and be dead), or a skip by name."""
    candidates = [found] if (found := shutil.which("python3.10")) else []
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout
        candidates += sorted(map(str, Path(root.strip()).glob("versions/3.10*/bin/python3.10")))
    for candidate in candidates:
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    pytest.skip("no python3.10 here")


@pytest.fixture(
    scope="session",
    params=["this-python", pytest.param("python3.10-ort1.23.2", marks=pytest.mark.slow)],
)
def light(request, distributions, tmp_path_factory) -> LightInstall:
    python, ort = sys.executable, []
    if request.param == "python3.10-ort1.23.2":
        python, ort = _python310(), ["onnxruntime==1.23.2"]
    root = tmp_path_factory.mktemp("light")
    subprocess.run([python, "-m", "venv", root], check=True)
    install = [root / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*install, f"{distributions.wheel}[ort]", *ort], check=True)
    return LightInstall(root)


def test_environment_has_no_torch(light):
    found = light.run(
        "python",
        "-c",
        "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('triton'))",
    )
    assert found.stdout.strip() == "None None"


def test_every_light_module_imports(light):
    """Only the export half and the torch side of the proof may need more than is installed."""
    program = """
import importlib, pkgutil, edgeattn
for name in "bundle", "cli", "devices", "engine", "planner", "runtime", "verify":
    package = importlib.import_module(f"edgeattn.{name}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.rpartition(".")[2] not in ("reference", "layers", "amplified"):
            importlib.import_module(module.name)
for name in "errors", "recipe", "shape", "quant.scheme":
    importlib.import_module(f"edgeattn.{name}")
"""
    done = light.run("python", "-W", "error", "-c", program)
    assert done.returncode == 0, done.stderr


def test_help(light):
    done = light.run("edgeattn", "--help")
    assert done.returncode == 0, done.stderr
    for verb in "export", "verify", "eval", "run", "plan", "targets":
        assert verb in done.stdout
        assert light.run("edgeattn", verb, "--help").returncode == 0


def test_targets(light):
    done = light.run("edgeattn", "targets")
    assert done.returncode == 0, done.stderr
    for target in "cpu", "jetson-orin", "l4", "t4":
        assert target in done.stdout
    assert light.json("targets")


def test_doctor(light, tiny_bundle):
    """It misses what only export needs, and finds no fault in that."""
    said = light.json("doctor")
    levels = {finding["about"]: finding["level"] for finding in said["findings"]}
    assert (levels["export"], levels["ONNX Runtime"]) == ("warning", "ok")
    assert light.json("doctor", tiny_bundle, "--target", "cpu")["works"]


def test_plan(light, tiny_checkpoint, tmp_path):
    asked = ("plan", tiny_checkpoint, "--target", "jetson-orin", "--context", "8192")
    done = light.run("edgeattn", *asked)
    assert done.returncode == 0, done.stderr
    assert "this model" in done.stdout
    assert light.json(*asked)["own"]["prediction"]["tokens_per_s"] > 0
    plot = light.run("edgeattn", *asked, "--plot", tmp_path / "cost.png")
    assert plot.returncode == 1
    assert "edgeattn[report]" in plot.stderr


def test_run(light, tiny_bundle):
    done = light.run("edgeattn", "run", tiny_bundle, "-p", "Once upon a time", "-n", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert light.json("run", tiny_bundle, "-p", "Once upon a time", "-n", "4")


def test_eval(light, tiny_bundle, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    report = light.json("eval", tiny_bundle, "--text", text, "--windows", "2", "--length", "64")
    assert math.isfinite(report["perplexity"])
    assert report["perplexity"] > 1


def test_verify_against_the_golden_vectors(light, tiny_bundle):
    done = light.run("edgeattn", "verify", tiny_bundle)
    assert done.returncode == 0, done.stdout + done.stderr


def test_verify_refuses_a_changed_bundle(light, tiny_bundle, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(tiny_bundle, changed)
    graph = changed / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    done = light.run("edgeattn", "verify", changed)
    assert done.returncode == 1
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_says_which_extra_it_needs(light, tmp_path):
    """Before it looks at the model, and with the brackets that markup would swallow."""
    done = light.run("edgeattn", "export", tmp_path, "--target", "cpu", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "edgeattn[export,ort]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
