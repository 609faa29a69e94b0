"""`verify --backend tensorrt` end to end, on the fake TensorRT and libcuda of tests/support."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fake_engine import GPU, PROFILES, VERSION, edgeattn_there, write_engine

from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import Range

TITLE = f"TensorRT {VERSION} on {GPU}, engine tensorrt-{VERSION}-sm80.engine"


@pytest.fixture(scope="module")
def exported(export_tiny: Callable[..., Path], stories260k: Path) -> Path:
    return export_tiny("a100", batch=2, context=128, model=stories260k)


@pytest.fixture(scope="module")
def with_static_cache(export_tiny: Callable[..., Path], stories260k: Path) -> Path:
    return export_tiny("a100", batch=2, context=128, model=stories260k, kv_cache="static")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def verify(bundle: Path, fake_cuda: Path) -> Callable[..., Any]:
    """A function that verifies the bundle on a machine with the fake GPU."""

    def verify(*arguments: object, **settings: object) -> Any:
        backend = ("--backend", "tensorrt")
        return edgeattn_there(fake_cuda, "verify", bundle, *backend, *arguments, **settings)

    return verify


def test_an_engine_agrees_with_the_golden_vectors(bundle: Path, verify: Callable[..., Any]) -> None:
    engine = write_engine(bundle)
    done = verify("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (agreement,) = found["agreements"]
    assert agreement["backend"] == TITLE
    assert agreement["passed"]
    assert found["left_out"] == []
    tensors = {row["tensor"] for row in agreement["comparisons"]}
    assert {"sequence.0.logits", "sequence.16.logits", "ragged.2.logits"} <= tensors
    assert {"continued.1.logits", "ragged.present.4.value"} <= tensors
    # it is not fp32 that is compared with itself
    assert 0 < max(row["error"] for row in agreement["comparisons"]) < 0.05
    stored = json.loads(engine.selftest_file.read_text())
    assert (stored["passed"], stored["gpu"], stored["driver"]) == (True, GPU, "13.2")
    assert stored["engine_sha256"] == engine.record.sha256


def test_a_static_cache(with_static_cache: Path, fake_cuda: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(with_static_cache, tmp_path / "bundle")
    write_engine(bundle)
    words = ("verify", bundle, "--backend", "tensorrt")
    done = edgeattn_there(fake_cuda, *words)
    assert done.returncode == 0, done.stderr
    assert "ragged decode logits" in done.stdout
    write_engine(bundle, perturb={"present.3.value": 5.0})
    done = edgeattn_there(fake_cuda, *words)
    assert "present.3.value differs by" in done.stderr


@pytest.mark.parametrize("tensor", ["present.2.key", "present.4.value", "logits"])
def test_a_wrong_number_is_found_and_named(
    bundle: Path, verify: Callable[..., Any], tensor: str
) -> None:
    engine = write_engine(bundle, perturb={tensor: 5.0})
    done = verify()
    assert done.returncode == 1
    assert f"expected {TITLE} within" in done.stderr
    assert f"{tensor} differs by" in done.stderr
    assert "FAILED" in done.stdout
    stored = json.loads(engine.selftest_file.read_text())
    assert not stored["passed"]
    assert tensor in stored["came"]


def test_what_an_engine_was_not_built_for_is_left_out_and_said(
    bundle: Path, verify: Callable[..., Any]
) -> None:
    one_row = [replace(profile, batch=Range(1, 1, 1)) for profile in PROFILES]
    write_engine(bundle, one_row)
    done = verify()
    assert done.returncode == 0, done.stderr
    assert "not run: ragged: no optimisation profile holds its 2 x 11 tokens" in done.stdout
    assert "ragged decode" not in done.stdout
    assert "continued decode" in done.stdout


def test_an_engine_for_none_of_the_vectors_is_refused(
    bundle: Path, verify: Callable[..., Any]
) -> None:
    write_engine(bundle, PROFILES[1:])
    done = verify()
    assert done.returncode == 1
    assert "golden vectors of sizes that tensorrt-11.1.0-sm80.engine was built" in done.stderr


@pytest.mark.parametrize("crash", ["deserialize", "execute"])
def test_a_crash_of_tensorrt_is_a_sentence(
    bundle: Path, verify: Callable[..., Any], crash: str
) -> None:
    engine = write_engine(bundle, crash=crash)
    done = verify()
    assert done.returncode == 1
    stage = {"deserialize": "loading the engine", "execute": "running the engine"}[crash]
    assert f"its process stopped while {stage}: died of SIGSEGV" in done.stderr
    assert not engine.selftest_file.exists()


def test_a_refusal_in_the_child_is_the_parents(bundle: Path, verify: Callable[..., Any]) -> None:
    write_engine(bundle)
    done = verify(MOST=20_000)
    assert done.returncode == 1
    assert "free memory on the GPU, but cuMemAlloc_v2 says: out of memory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
def test_the_real_runtime_of_tensorrt_rtx_refuses_a_driver_that_is_none(
    export_tiny: Callable[..., Path], edgeattn: Callable[..., Any], fake_cuda: Path, tmp_path: Path
) -> None:
    """All of its bindings that do not compute are the real ones here."""
    exported = export_tiny("rtx-4090", batch=2, context=128)
    bundle = shutil.copytree(exported, tmp_path / "bundle")
    assert edgeattn("build", bundle).exit_code == 0
    words = ("verify", bundle, "--backend", "tensorrt")
    done = edgeattn_there(fake_cuda, *words, SM=89, NAME="NVIDIA GeForce RTX 4090")
    assert done.returncode == 1
    assert re.search(r"expected TensorRT-RTX [\d.]+ to load the engine \(tensorrt", done.stderr)
    assert "it says: " in done.stderr
    assert "CUDA driver" in done.stderr


def test_an_engine_is_named_by_its_file(bundle: Path, verify: Callable[..., Any]) -> None:
    engine = write_engine(bundle)
    assert verify("--engine", engine.path).returncode == 0
    missing = verify("--engine", bundle / "engines" / "other.engine")
    assert missing.returncode == 1
    assert "there is no such file" in missing.stderr
    elsewhere = verify("--engine", engine.path, SM=90)
    assert "expected an engine for SM 90" in elsewhere.stderr


def test_engine_needs_its_backend(bundle: Path, edgeattn: Callable[..., Any]) -> None:
    done = edgeattn("verify", bundle, "--engine", "x.engine")
    assert done.exit_code == 2
    assert "--engine together with --backend tensorrt" in done.output


def test_without_a_gpu(bundle: Path, edgeattn: Callable[..., Any]) -> None:
    write_engine(bundle)
    done = edgeattn("verify", bundle, "--backend", "tensorrt")
    assert done.exit_code == 1
    assert "expected a GPU with SM 80" in done.output
