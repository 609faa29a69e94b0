"""Sessions on an engine, on the fake TensorRT and libcuda of tests/support."""

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

from encoders import save_encoder
from fake_engine import GPU, device_environment, edgeattn_there, write_engine

from edgeattn.engine.profiles import EncoderProfile, Range
from edgeattn.errors import UsageError
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession, Session

# What both backends give, from the same threads' turns; and what is left when they are gone.
DECODER = """
import ctypes, gc, json, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from edgeattn.runtime import Session, generate
from edgeattn.errors import EdgeattnError

session, plain = Session.open(sys.argv[1], backend="tensorrt"), Session.open(sys.argv[1])
ids = np.arange(14).reshape(2, 7) + 40
mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
report = {"step": 0.0}
step = other = None
for new, valid in ((ids, mask), (ids[:, :1], None), (ids[:, :1] + 1, None)):
    step = session.run(new, step and step.state, attention_mask=valid)
    other = plain.run(new, other and other.state, attention_mask=valid)
    real = np.ones_like(new, bool) if valid is None else valid.astype(bool)
    report["step"] = max(report["step"], float(abs(step.logits - other.logits)[real].max()))
report["same bytes"] = session.cache_bytes(step.state) > 0
def texts(backend):
    with ThreadPoolExecutor(4) as pool:
        ask = lambda seed: generate(backend, "It is", max_new_tokens=9, temperature=1.0, seed=seed)
        return [found.token_ids for found in pool.map(ask, range(8))]
report["threads"] = texts(session) == texts(plain)
try:
    used = session.run(ids[:, :1]).state
    session.run(ids[:, :1], used)
    session.run(ids[:, :1], used)
except EdgeattnError as error:
    report["error"] = str(error)
cuda = ctypes.CDLL("libcuda.so.1")
cuda.fakeCudaAllocated.restype = ctypes.c_size_t
del session, step, used
gc.collect()
report["left"] = cuda.fakeCudaAllocated()
print(json.dumps(report))
"""
ENCODER = """
import json, sys
import numpy as np
from edgeattn.runtime import EncoderSession

rng = np.random.default_rng(0)
found = []
for options in ({"backend": "tensorrt", "engine": sys.argv[2]}, {}):
    session = EncoderSession.open(sys.argv[1], **options)
    if sys.argv[3] == "vit":
        read = session.shape.input
        size = (3, read.channels, read.height, read.width)
        found.append(session.run_images(np.random.default_rng(0).normal(size=size)))
    else:
        mask = np.array([[1] * 6, [1] * 2 + [0] * 4])
        found.append(session.run(np.arange(12).reshape(2, 6), attention_mask=mask)[mask > 0])
print(json.dumps([float(abs(found[0] - found[1]).max()), float(abs(found[0]).max())]))
"""


@pytest.fixture
def bundle(export_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    asked = {"batch": 2, "context": 128, "dtype": "fp32", "verify": False}
    return shutil.copytree(export_tiny("jetson-orin@jetpack6.2", **asked), tmp_path / "bundle")


def there(cuda: Path, program: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=device_environment(cuda),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_decoder_gives_what_onnxruntime_gives(bundle: Path, fake_cuda: Path) -> None:
    write_engine(bundle)
    found = there(fake_cuda, DECODER, bundle)
    assert "the newest cache of an engine" in found.pop("error")
    assert found == {"step": 0, "same bytes": True, "threads": True, "left": 0}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_an_encoder_gives_what_onnxruntime_gives(
    name: str, fake_cuda: Path, tmp_path: Path
) -> None:
    save_encoder(name, tmp_path / "model")
    path = tmp_path / "bundle"
    export(tmp_path / "model", Recipe("a100", batch=3), path, verify=False)
    tokens = None if name == "vit" else Range(1, 10, 40)
    engine = write_engine(path, [EncoderProfile("any", Range(1, 3, 3), tokens)])
    error, largest = there(fake_cuda, ENCODER, path, engine.path, name)
    assert error == 0
    assert largest > 0


def test_run_takes_an_engine_and_says_where_it_does_not(bundle: Path, fake_cuda: Path) -> None:
    words = ("run", bundle, "-p", "It is", "-n", "6", "--json")
    missing = edgeattn_there(fake_cuda, *words, "--backend", "tensorrt")
    assert missing.returncode == 1
    assert "an engine in" in json.loads(missing.stdout)["error"]
    write_engine(bundle)
    found, plain = (
        edgeattn_there(fake_cuda, *words, *more) for more in (("--backend", "tensorrt"), ())
    )
    assert json.loads(found.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]
    elsewhere = edgeattn_there(fake_cuda, *words, "--backend", "tensorrt", SM=90)
    assert elsewhere.returncode == 1
    assert "SM 90" in json.loads(elsewhere.stdout)["error"]


def test_bench_calls_the_figures_those_of_the_gpu(bundle: Path, fake_cuda: Path) -> None:
    engine = write_engine(bundle)
    words = ("bench", bundle, "--tokens", "8", "--new-tokens", "2", "--json", "--repeats", "2")
    found = edgeattn_there(fake_cuda, *words, "--backend", "tensorrt", "--engine", engine.path)
    record = json.loads(found.stdout)
    assert (record["machine"]["device"], record["machine"]["gpu"]) == ("a100", GPU)
    assert record["setup"]["engine"] == engine.path.name
    assert {phase["name"] for phase in record["phases"]} == {"prefill", "decode"}
    assert record["gpu_memory_bytes"] >= record["cache_bytes"] > 0
    plain = json.loads(edgeattn_there(fake_cuda, *words).stdout)
    assert (plain["machine"]["device"], plain["gpu_memory_bytes"]) == ("cpu", None)


@pytest.mark.parametrize("kind", [Session, EncoderSession])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "tensort"}, "tensort"),
        ({"engine": "some.engine"}, "expected engine together with backend tensorrt"),
        ({"backend": "tensorrt", "exact": True}, "expected exact together with backend onnxr"),
        ({"backend": "tensorrt", "threads": 2}, "expected threads together with"),
        ({"backend": "tensorrt", "provider": "cuda"}, "expected provider together with"),
    ],
)
def test_options_of_another_backend(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        kind.open("nowhere", **options)
