"""An engine runs step by step, on the fake TensorRT and libcuda of tests/support."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fake_engine import PROFILES, device_environment, write_engine

from edgeattn.engine.profiles import Range
from edgeattn.engine.record import Engine

# Runs `steps` of token counts on the golden vectors' first text; with the graph in ONNX Runtime
# beside it. Prints what went wrong, or the largest differences and what was in use.
PROGRAM = """
import ctypes, gc, json, sys
import numpy as np, onnxruntime
from pathlib import Path
from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.execution import EngineRunner
from edgeattn.engine.record import read_engine
from edgeattn.errors import EdgeattnError

path, engine, steps, twice = sys.argv[1:]
steps = json.loads(steps)
bundle = Bundle.open(path)
session = onnxruntime.InferenceSession(str(bundle.model_file))
outputs = [o.name for o in session.get_outputs()]
past = {i.name: i for i in session.get_inputs() if i.name.startswith("past")}
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
rng, report = np.random.default_rng(0), {"logits": 0.0, "cache": 0.0, "bytes": []}
try:
    runner = EngineRunner(read_engine(Path(engine)), bundle)
    cache, seen, plain = None, 0, None
    for length in steps:
        ids = rng.integers(0, 200, (2, length))
        mask = np.ones((2, seen + length), np.int64)
        places = np.broadcast_to(np.arange(seen, seen + length), ids.shape).copy()
        before = cache
        logits, cache = runner.run(ids, mask, places, cache)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        slots = past["past_key_values.0.key"].shape[2]
        if isinstance(slots, int):  # a static cache
            feeds["attention_mask"] = np.zeros((2, slots), np.int64)
            feeds["attention_mask"][:, : seen + length] = 1
            feeds["write_indices"] = np.full(2, seen)
        for name, declared in past.items():
            room = slots if isinstance(slots, int) else 0
            empty = np.zeros((2, declared.shape[1], room, declared.shape[3]), kinds[declared.type])
            present = name.replace("past_key_values", "present")
            feeds[name] = empty if plain is None else plain[present]
        plain = dict(zip(outputs, session.run(outputs, feeds)))
        if twice == "True" and before is not None:
            runner.run(ids, mask, places, before)
        report["logits"] = max(report["logits"], float(abs(logits - plain["logits"]).max()))
        report["bytes"].append(cache.nbytes)
        seen += length
    for name in runner.cache_names:
        found = runner.read(cache, name)
        assert found.shape[2] == seen
        expected = plain[name][:, :, :seen]
        report["cache"] = max(report["cache"], float(abs(found - expected).max()))
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.fakeCudaAllocated.restype = ctypes.c_size_t
    report["in use"] = cuda.fakeCudaAllocated()
    del runner, cache, before, name, found
    gc.collect()
    report["left"] = cuda.fakeCudaAllocated()
    report["contexts left"] = cuda.fakeCudaContextsLeft()
except EdgeattnError as error:
    report["error"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def exported(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("jetson-orin@jetpack6.2", batch=2, context=128, dtype="fp32", verify=False)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def static_bundle(export_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    exported = export_tiny("cpu", batch=2, context=128, kv_cache="static", verify=False)
    return shutil.copytree(exported, tmp_path / "static")


@pytest.fixture
def run(fake_cuda: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs an engine for some steps in a process with the fake GPU."""

    def run(engine: Engine, *steps: int, twice: bool = False, **settings: object) -> dict[str, Any]:
        bundle = engine.path.parent.parent
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, bundle, engine.path, json.dumps(steps), str(twice)],
            env={
                **device_environment(fake_cuda, **settings),
                "FAKE_TENSORRT_PROFILES": str(tmp_path / "profiles"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def test_steps_give_what_the_graph_gives_and_free_what_they_took(
    bundle: Path, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = run(write_engine(bundle), 7, 1, 1, 5, 1)
    assert found["logits"] == found["cache"] == 0
    assert found["in use"] > 0
    assert found["left"] == found["contexts left"] == 0
    # the narrowest profile that holds a step, switched where it changes
    assert (tmp_path / "profiles").read_text().split() == ["0", "1", "0", "1"]


def test_a_growing_cache_swaps_two_buffers(
    bundle: Path, run: Callable[..., dict[str, Any]]
) -> None:
    found = run(write_engine(bundle), 30, *[1] * 12)
    # with room to grow by half, a dozen steps after 30 tokens need no memory more
    assert len(set(found["bytes"][2:])) == 1
    assert found["logits"] == found["cache"] == 0


def test_a_static_cache_is_one_buffer_written_in_place(
    static_bundle: Path, run: Callable[..., dict[str, Any]]
) -> None:
    found = run(write_engine(static_bundle), 7, 1, 5, *[1] * 5)
    assert found["logits"] == found["cache"] == 0
    assert len(set(found["bytes"])) == 1
    # keys and values of 3 layers: 2 rows, 2 heads, 128 slots of 16 numbers of 4 bytes
    assert found["bytes"][0] == 2 * 3 * (2 * 2 * 128 * 16 * 4)
    assert found["left"] == 0


def test_a_static_cache_has_an_end(static_bundle: Path, run: Callable[..., dict[str, Any]]) -> None:
    error = run(write_engine(static_bundle), 64, 64, 1)["error"]
    assert "at most 128 tokens in the static cache" in error


def test_bf16_is_read_and_written_as_its_bits(
    bundle: Path, run: Callable[..., dict[str, Any]]
) -> None:
    found = run(write_engine(bundle, bf16=True), 7, 1, 1)
    assert 0 < found["logits"] < 0.1
    assert 0 < found["cache"] < 0.1


def test_weights_are_put_into_a_stripped_engine(
    bundle: Path, run: Callable[..., dict[str, Any]]
) -> None:
    found = run(write_engine(bundle, stripped=True), 7, 1)
    assert found["logits"] == found["cache"] == 0
    forgotten = write_engine(bundle, stripped=True, record={"stripped": False})
    assert "run the engine" in run(forgotten, 7)["error"]


def test_a_cache_is_good_for_one_step(bundle: Path, run: Callable[..., dict[str, Any]]) -> None:
    assert "the newest cache of an engine" in run(write_engine(bundle), 7, 1, twice=True)["error"]


def test_sizes_outside_every_profile(bundle: Path, run: Callable[..., dict[str, Any]]) -> None:
    error = run(write_engine(bundle), 65)["error"]
    assert "an optimisation profile of tensorrt-11.1.0-sm80.engine" in error
    assert "input_ids [2, 65]" in error
    one_row = [replace(profile, batch=Range(1, 1, 1)) for profile in PROFILES]
    assert "input_ids [2, 3]" in run(write_engine(bundle, one_row), 3)["error"]


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ("deserialize", "to load the engine .*it says: IRuntime::deserializeCudaEngine"),
        ("create_context", "to prepare the engine .*it gives no reason: free memory"),
        ("set_profile", "to switch to another optimisation profile"),
        ("execute", "to run the engine .*it says: IExecutionContext::enqueueV3"),
    ],
)
def test_what_tensorrt_refuses(
    bundle: Path, run: Callable[..., dict[str, Any]], fail: str, words: str
) -> None:
    error = run(write_engine(bundle, fail=fail), 7)["error"]
    assert error.startswith("expected TensorRT 11.1.0 to ")
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"MOST": 1000}, "bytes of free memory on the GPU, but cuMemAlloc_v2 says: out of memory"),
        ({"FAIL": "cuStreamSynchronize:999"}, "cuStreamSynchronize says: unknown error"),
        ({"FAIL": "cuMemcpyHtoDAsync_v2:700"}, "cuMemcpyHtoDAsync_v2 says: error 700"),
        ({"FAIL": "cuInit:100"}, "no CUDA-capable device is detected"),
    ],
)
def test_what_the_driver_refuses(
    bundle: Path, run: Callable[..., dict[str, Any]], settings: dict[str, object], words: str
) -> None:
    assert words in run(write_engine(bundle), 7, **settings)["error"]
