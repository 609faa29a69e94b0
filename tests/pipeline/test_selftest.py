"""An engine is run once on its device, and what came out is remembered for that device alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fake_engine import GPU, PROFILES, device_environment, edgeattn_there, write_engine

# Prints the outcome and how often an engine was run for it.
PROGRAM = """
import json, sys
from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.probe import probe
from edgeattn.engine.record import read_engines
from edgeattn.errors import EdgeattnError
from edgeattn.pipeline import selftest

runs, check = [], selftest.check_engine
selftest.check_engine = lambda *a, **k: runs.append(1) or check(*a, **k)
bundle = Bundle.open(sys.argv[1])
try:
    outcome = selftest.self_test(read_engines(bundle)[0], bundle, probe())
    found = {"outcome": outcome and outcome.model_dump(mode="json")}
except EdgeattnError as error:
    found = {"error": str(error)}
print(json.dumps({**found, "runs": len(runs)}))
"""


@pytest.fixture
def bundle(export_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    exported = export_tiny("a100", batch=2, context=128)
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def self_test(bundle: Path, fake_cuda: Path) -> Callable[..., Any]:
    """A function that self-tests the bundle's engine in a process with the fake GPU."""

    def run(**settings: object) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, bundle],
            env=device_environment(fake_cuda, **settings),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_pass_is_not_repeated_on_the_same_gpu_and_driver(
    bundle: Path, self_test: Callable[..., Any]
) -> None:
    write_engine(bundle)
    first, second = self_test(), self_test()
    assert (first["runs"], second["runs"]) == (1, 0)
    assert first["outcome"] == second["outcome"]
    assert first["outcome"]["passed"]
    assert first["outcome"]["errors"]["ragged decode logits"]["error"] > 0
    assert self_test(NAME="NVIDIA A100-PCIE-40GB")["runs"] == 1
    assert self_test(DRIVER=13030, NAME="NVIDIA A100-PCIE-40GB")["runs"] == 1
    write_engine(bundle, perturb={"unknown": 0})  # other bytes
    assert self_test(DRIVER=13030, NAME="NVIDIA A100-PCIE-40GB")["runs"] == 1


def test_a_failure_refuses_the_engine_ever_after(
    bundle: Path, self_test: Callable[..., Any]
) -> None:
    write_engine(bundle, perturb={"present.1.key": 9.0})
    first, second = self_test(), self_test()
    assert (first["runs"], second["runs"]) == (1, 0)
    assert first["error"] == second["error"]
    assert "to pass its self-test on NVIDIA A100" in first["error"]
    assert "present.1.key differs by" in first["error"]


def test_what_does_not_run_is_no_verdict(bundle: Path, self_test: Callable[..., Any]) -> None:
    engine = write_engine(bundle)
    assert "out of memory" in self_test(MOST=1000)["error"]
    assert not engine.selftest_file.exists()
    engine.selftest_file.write_text("{")  # nor is what does not read
    assert self_test()["runs"] == 1


def test_without_vectors_of_its_sizes_nothing_is_said(
    bundle: Path, self_test: Callable[..., Any]
) -> None:
    engine = write_engine(bundle, PROFILES[1:])
    assert self_test() == {"outcome": None, "runs": 0}
    assert not engine.selftest_file.exists()


def test_build_on_the_device_runs_what_it_built(
    bundle: Path, fake_cuda: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    built = edgeattn_there(fake_cuda, "build", bundle, "--timing-cache", cache)
    assert built.returncode == 0, built.stderr
    assert f"built on {GPU}" in built.stdout
    assert "self-test passed: 12 kinds of tensors within their bounds" in built.stdout
    assert cache.read_bytes() == b"measured"
    (engine,) = (bundle / "engines").glob("*.engine")
    record = json.loads(engine.with_name(f"{engine.name}.json").read_text())
    assert (record["layer_source"], list(record["profiles"])) == (
        "engine inspector",
        ["prefill", "decode"],
    )
    again = edgeattn_there(fake_cuda, "build", bundle)
    assert "was there already" in again.stdout
    assert "self-test passed" in again.stdout
    verified = edgeattn_there(fake_cuda, "verify", bundle, "--backend", "tensorrt")
    assert verified.returncode == 0, verified.stderr


def test_build_of_an_engine_that_is_wrong(
    bundle: Path, fake_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_ENGINE", json.dumps({"perturb": {"present.0.value": 9.0}}))
    for words in (("build", bundle), ("build", bundle), ("build", bundle, "--strip-weights")):
        built = edgeattn_there(fake_cuda, *words)
        assert built.returncode == 1
        assert "to pass its self-test" in built.stderr
        assert "present.0.value differs" in built.stderr
    monkeypatch.delenv("FAKE_TENSORRT_ENGINE")
    for words in (("build", bundle, "--force"), ("build", bundle, "--strip-weights", "--force")):
        assert edgeattn_there(fake_cuda, *words).returncode == 0
