"""An encoder's engine is run on its golden vectors, on the fake TensorRT of tests/support."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from encoders import save_encoder
from fake_engine import GPU, edgeattn_there, write_engine

from edgeattn.engine.loaded import to_bf16
from edgeattn.engine.profiles import EncoderProfile, Range
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe

ROWS, TOKENS = Range(1, 3, 3), Range(1, 10, 40)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function to a proven bundle of a tiny encoder, exported once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, target: str = "a100") -> Path:
        if (name, target) not in made:
            folder = tmp_path_factory.mktemp(name)
            save_encoder(name, folder / "model")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
                dtype = None if target == "a100" else "fp32"
                recipe = Recipe(target, batch=3, dtype=dtype)
                export(folder / "model", recipe, folder / "out")
            made[name, target] = folder / "out"
        return made[name, target]

    return make


@pytest.fixture
def bundle(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return lambda *arguments: shutil.copytree(exported(*arguments), tmp_path / "bundle")


def profile(name: str, rows: Range = ROWS) -> list[EncoderProfile]:
    return [EncoderProfile("any", rows, None if name == "vit" else TOKENS)]


def verify(cuda: Path, bundle: Path, *words: object) -> Any:
    return edgeattn_there(cuda, "verify", bundle, "--backend", "tensorrt", *words)


@pytest.mark.parametrize(
    ("name", "output", "case"),
    [("bert", "last_hidden_state", "ragged"), ("vit", "last_hidden_state", "images")],
)
def test_an_engine_agrees_and_a_wrong_number_is_named(
    bundle: Callable[..., Path], fake_cuda: Path, name: str, output: str, case: str
) -> None:
    path = bundle(name)
    engine = write_engine(path, profile(name))
    done = verify(fake_cuda, path, "--json")
    assert done.returncode == 0, done.stderr
    (agreement,) = json.loads(done.stdout)["agreements"]
    assert agreement["backend"].endswith(f"on {GPU}, engine {engine.path.name}")
    errors = {row["tensor"]: row["error"] for row in agreement["comparisons"]}
    assert f"{case}.{output}" in errors
    assert 0 < max(errors.values()) < 0.05
    stored = json.loads(engine.selftest_file.read_text())
    assert (stored["passed"], stored["left_out"]) == (True, [])

    wrong = write_engine(path, profile(name), perturb={output: 9.0})
    done = verify(fake_cuda, path)
    assert done.returncode == 1
    assert f"{output} differs by" in done.stderr
    assert not json.loads(wrong.selftest_file.read_text())["passed"]


def test_rows_it_was_not_built_for_are_left_out_and_said(
    bundle: Callable[..., Path], fake_cuda: Path
) -> None:
    path = bundle("bert")
    write_engine(path, profile("bert", Range(1, 1, 1)))
    done = verify(fake_cuda, path)
    assert done.returncode == 0, done.stderr
    assert "not run: ragged: no optimisation profile holds its 3 x 13 tokens" in done.stdout
    shutil.rmtree(path)
    path = bundle("vit")
    write_engine(path, profile("vit", Range(1, 1, 1)))
    done = verify(fake_cuda, path)
    assert done.returncode == 1
    assert "no optimisation profile holds its 2 rows" in done.stderr


def test_pixels_are_rounded_to_bf16_as_the_engine_reads_them(
    bundle: Callable[..., Path], fake_cuda: Path
) -> None:
    """Of an fp32 graph; whole numbers for pixels would err by far more."""
    path = bundle("vit", "jetson-orin@jetpack6.2")
    write_engine(path, profile("vit"), bf16=True)
    found = json.loads(verify(fake_cuda, path, "--json").stdout)
    worst = max(row["error"] for row in found["agreements"][0]["comparisons"])
    assert 1e-4 < worst < 0.01


def test_bf16_is_that_of_torch() -> None:
    numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    numbers[:3] = 1 + 2**-8, 1 + 3 * 2**-8, -0.0  # two ties, to even
    expected = torch.from_numpy(numbers).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(to_bf16(numbers), expected.view(np.uint16))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_is_built_on_the_device_is_tested_there(
    bundle: Callable[..., Path], fake_cuda: Path, name: str
) -> None:
    path = bundle(name)
    built = edgeattn_there(fake_cuda, "build", path)
    assert built.returncode == 0, built.stderr
    assert f"built on {GPU}" in built.stdout
    assert "self-test passed" in built.stdout
    (record,) = (path / "engines").glob("*.engine.json")
    sizes = json.loads(record.read_text())["profiles"]["any"]
    assert sizes == {n: str(r) for n, r in profile(name)[0].dimensions().items()}
