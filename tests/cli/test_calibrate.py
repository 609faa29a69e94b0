"""`edgeattn calibrate`: the file of chosen heads, its refusals, and what a stop leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import checkpoint_digest
from edgeattn.pipeline import calibrate_attention, heat_map
from edgeattn.planner.polynomial_heads import check_fits, read_polynomial_heads
from edgeattn.transforms import polynomial

SENTENCE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
ASKED = ("--attention", "fft-rope:window=16,tolerance=0.3")
Run = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} {SENTENCE}" for i in range(40)))
    return file


@pytest.fixture
def calibrate(edgeattn: Run, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> Run:
    """Runs the verb with usual options; others may be added, or replaced."""

    def run(*options: object, **changed: object) -> Any:
        values = {"text": text, "length": 200, "windows": 4, "output": tmp_path / "heads.json"}
        pairs = [(f"--{name}", value) for name, value in {**values, **changed}.items()]
        return edgeattn("calibrate", tiny_checkpoint, *ASKED, *sum(pairs, ()), *options)

    return run


def sentence(done: Any, exit_code: int) -> str:
    """The one sentence of a refusal."""
    assert done.exit_code == exit_code, done.output
    assert "internal error" not in done.stderr
    line: str = done.stderr.strip().splitlines()[-1]
    assert line.startswith("edgeattn: expected ")
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_heads_and_their_picture(
    calibrate: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    done = calibrate("--target", "jetson-orin")
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["heads.json", "heads.png", "text.txt"]
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    heads = read_polynomial_heads(tmp_path / "heads.json")
    checkpoint = open_checkpoint(tiny_checkpoint)
    check_fits(heads, checkpoint.shape, checkpoint_digest(checkpoint))
    assert heads.passed > 0
    assert f"{heads.passed} of 12 heads" in done.stdout
    assert "times the FLOPs of exact attention" in done.stdout
    assert "on jetson-orin-agx-64gb" in done.stdout


def test_json(calibrate: Run, tmp_path: Path) -> None:
    done = calibrate("--json", "--target", "cpu", "--context", 100)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    heads = read_polynomial_heads(tmp_path / "heads.json")
    assert (report["passed"], report["heads"]) == (heads.passed, 12)
    assert report["context"] == 100
    assert report["gain"]["speed"] is None, "nothing is known of this machine"
    assert [layer["degree"] for layer in report["layers"]] == [x.degree for x in heads.layers]


def test_nothing_passes_and_it_says_so(
    edgeattn: Run, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "heads.json"
    options = ("--text", text, "--length", 200, "--windows", 2, "-o", output)
    strict = ("--attention", "fft-rope:tolerance=0.0001%")
    done = edgeattn("calibrate", tiny_checkpoint, *strict, *options)
    assert done.exit_code == 0, done.output
    assert "none of 12 heads stays within" in done.stdout
    assert "attention stays exact" in done.stdout
    assert read_polynomial_heads(output).passed == 0


def test_without_matplotlib(
    calibrate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_attention, "HAS_MATPLOTLIB", False)
    monkeypatch.setattr(heat_map, "heat_map", None)
    done = calibrate()
    assert done.exit_code == 0, done.output
    assert "matplotlib is missing: pip install 'edgeattn[report]'" in done.stdout
    assert names(tmp_path) == ["heads.json", "text.txt"]


def test_a_stop_leaves_no_half_file_and_goes_on(
    calibrate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = polynomial.measure_layer

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(polynomial, "measure_layer", stopping)
    done = calibrate()
    assert done.exit_code == 130
    assert "goes on from there" in done.stderr
    assert names(tmp_path) == [".heads.json.layers", "text.txt"]
    assert not list(tmp_path.rglob("*.partial"))
    refused = sentence(calibrate(length=198), 2)
    assert "started with another model, recipe or calibration text" in refused
    measured.clear()
    assert calibrate().exit_code == 0
    assert len(measured) == 1, "the third layer alone"
    assert [name for name in names(tmp_path) if name.endswith("layers")] == []


@pytest.mark.parametrize(
    ("changed", "exit_code", "words"),
    [
        ({"length": 2000}, 2, "windows of 192 to 256 tokens"),
        ({"length": 100}, 2, "the length is 100"),
        ({"windows": 1}, 2, "at least 2 windows"),
        ({"windows": 0}, 2, "number of windows of at least 1"),
        ({"windows": 400}, 1, "or --windows"),
        ({"text": "nowhere.txt"}, 1, "nowhere.txt"),
        ({"context": 5000}, 2, "a context of 1 to 256 tokens"),
        ({"target": "toaster"}, 2, "a known target"),
        ({"output": "heads.png"}, 2, "the name of a picture"),
        ({"output": "nowhere/heads.json"}, 1, "a folder for nowhere/heads.json"),
        ({"attention": "fft-rope:colour=red"}, 2, "option of fft-rope"),
        ({"attention": "fft-rope:heads=x.json"}, 2, "leave it out"),
        ({"attention": "magic"}, 2, "attention variant"),
    ],
)
def test_refusals(
    calibrate: Run, changed: dict[str, Any], exit_code: int, words: str, tmp_path: Path
) -> None:
    assert words in sentence(calibrate(**changed), exit_code)
    assert names(tmp_path) == ["text.txt"]


def test_empty_text(calibrate: Run, text: Path, tmp_path: Path) -> None:
    text.write_text("")
    assert "text.txt" in sentence(calibrate(), 1)
    assert names(tmp_path) == ["text.txt"]


def test_no_file_is_replaced_unasked(calibrate: Run, tmp_path: Path) -> None:
    output = tmp_path / "heads.json"
    output.write_text("mine")
    assert "--force" in sentence(calibrate(), 1)
    assert output.read_text() == "mine"
    assert calibrate("--force").exit_code == 0
    assert read_polynomial_heads(output).passed > 0


def test_capped_scores_are_refused(
    edgeattn: Run, random_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    gemma = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
    path = random_checkpoint(**gemma, attn_logit_softcapping=50.0)
    options = ("--text", text, "--length", 200, "-o", tmp_path / "heads.json", "--windows", 2)
    done = edgeattn("calibrate", path, *ASKED, *options)
    assert "without a cap on its attention's scores" in sentence(done, 1)
    assert names(tmp_path) == ["text.txt"]
