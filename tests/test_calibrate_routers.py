"""Routers from a checkpoint and a text: what is reported, refused, stopped and gone on with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from edgeattn.attention import HeadSparseRequest, parse_attention
from edgeattn.cli.tables import print_routers
from edgeattn.errors import BundleError, EdgeattnError, LoweringError, RuntimeInputError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import checkpoint_digest
from edgeattn.pipeline.calibrate_routers import RoutersReport, TextLoss, calibrate_routers
from edgeattn.transforms import sparsify as module
from edgeattn.transforms.routers_file import load_routers

Calibrate = Callable[..., RoutersReport]


def request(options: str = "density=3/4") -> HeadSparseRequest:
    found = parse_attention(f"head-sparse:{options}")
    assert isinstance(found, HeadSparseRequest)
    return found


@pytest.fixture(scope="module")
def novels(shared_dir: Path) -> Path:
    return shared_dir / "data" / "austen"


@pytest.fixture
def calibrate(stories260k: Path, novels: Path, tmp_path: Path) -> Calibrate:
    """A function of options; few short windows of a novel."""

    def run(options: str = "density=3/4", **changed: Any) -> RoutersReport:
        arguments: dict[str, Any] = {
            "model": stories260k,
            "request": request(options),
            "text": novels / "emma.txt",
            "output": tmp_path / "routers.safetensors",
            "windows": 8,
            "length": 64,
        }
        return calibrate_routers(**{**arguments, **changed})

    return run


@pytest.mark.parametrize(
    ("options", "units", "slots"),
    [
        ("density=3/4", 8, {6}),
        ("density=0.5,unit=groups", 4, {2}),
        ("density=5/8,layers=importance", 8, set(range(1, 9))),
    ],
)
def test_a_report_says_what_the_file_holds(
    calibrate: Calibrate, stories260k: Path, options: str, units: int, slots: set[int]
) -> None:
    report = calibrate(options)
    checkpoint = open_checkpoint(stories260k)
    digest = checkpoint_digest(checkpoint)
    routers, made_from = load_routers(report.path, checkpoint.shape, digest, request(options))
    assert made_from["text"] == "emma.txt"
    assert (made_from["windows"], made_from["length"]) == (8, 64)
    assert routers.units == units
    dense, *others = report.layers
    assert (dense.slots, dense.density, dense.recall) == (units, 1, None)
    for layer in others:
        routed = routers.layers.get(layer.layer)
        assert layer.slots in slots
        assert layer.slots == (routed.slots if routed else units)
        assert layer.recall == (routed.recall if routed else None)
        assert layer.density == layer.slots / units
    wanted = math.floor(request(options).density * units) * len(others)
    assert sum(layer.slots for layer in others) == wanted
    json.dumps(report.to_dict())


def test_the_worst_text_is_named(
    calibrate: Calibrate, stories260k: Path, novels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [novels / "persuasion.txt", novels / "emma.txt"]
    report = calibrate(eval_texts=texts)
    assert [text.text for text in report.texts] == ["persuasion.txt", "emma.txt"]
    assert all(text.sparse > text.dense > 1 for text in report.texts)
    checkpoint = open_checkpoint(stories260k)
    digest = checkpoint_digest(checkpoint)
    _, made_from = load_routers(report.path, checkpoint.shape, digest, request())
    assert [(t["text"], t["dense"], t["sparse"]) for t in made_from["texts"]] == [
        (text.text, text.dense, text.sparse) for text in report.texts
    ], "the report of a bundle shows them"
    worst = max(report.texts, key=lambda text: text.sparse / text.dense)
    assert report.to_dict()["worst"] == worst.text
    print_routers(report)
    printed = capsys.readouterr().out
    assert f"the worst text is {worst.text}" in printed
    assert "dense" in printed
    for layer in report.layers[1:]:
        assert f"{layer.recall:.1%}" in printed


def test_the_worst_loses_most_not_the_one_of_highest_perplexity() -> None:
    texts = (TextLoss("hard", 50, 51), TextLoss("easy", 10, 11))
    report = RoutersReport(Path("file"), "", (), texts, {})
    assert report.worst == texts[1]
    assert RoutersReport(Path("file"), "", (), (), {}).worst is None


@pytest.mark.parametrize("options", ["density=1/2", "density=1/2,layers=importance"])
def test_stopped_work_goes_on(
    calibrate: Calibrate, tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_file(calibrate(options, output=tmp_path / "whole").path)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training routers" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(options, progress=stop)
    assert "the same command goes on from there" in str(caught.value.__notes__)
    assert not (tmp_path / "routers.safetensors").exists()
    trained: list[int] = []
    train = module.train_router
    monkeypatch.setattr(
        module, "train_router", lambda *a, **k: (trained.append(1), train(*a, **k))[1]
    )
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        calibrate("density=3/8")
    again = load_file(calibrate(options).path)
    assert len(trained) == len(whole) // 2 - 2
    assert all((again[name] == value).all() for name, value in whole.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["routers.safetensors", "whole"]


def test_routers_of_another_model_are_refused(
    calibrate: Calibrate, stories260k: Path, tmp_path: Path
) -> None:
    """Fine-tuned, so that config and headers are the same."""
    path, other = calibrate().path, tmp_path / "other"
    shutil.copytree(stories260k, other, copy_function=shutil.copyfile)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = open_checkpoint(stories260k), open_checkpoint(other)
    load_routers(path, ours.shape, checkpoint_digest(ours), request())
    with pytest.raises(UsageError, match="they are of another checkpoint: pass routers that"):
        load_routers(path, theirs.shape, checkpoint_digest(theirs), request())


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"options": "density=1/9"}, LoweringError, "a density of at least 1/8"),
        ({"options": "density=1/2,routers=file"}, UsageError, "leave out routers="),
        ({"length": 513}, UsageError, "at most 512 tokens"),
        ({"windows": 1}, UsageError, "at least 2 windows"),
        ({"windows": 10**6}, RuntimeInputError, "a text of 1000000 windows"),
        ({"text": Path("none")}, RuntimeInputError, "a text at none"),
        ({"eval_texts": [Path("none")]}, RuntimeInputError, "a text at none"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(
    calibrate: Calibrate,
    tmp_path: Path,
    changed: dict[str, Any],
    kind: type[EdgeattnError],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        calibrate(**changed)
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_to_judge_by_is_refused_before_training(
    calibrate: Calibrate, tmp_path: Path
) -> None:
    short, stages = tmp_path / "short.txt", set[str]()
    short.write_text("It is a truth universally acknowledged. " * 99)
    with pytest.raises(RuntimeInputError, match="12 windows"):
        calibrate(eval_texts=[short], progress=lambda stage, *_: stages.add(stage))
    assert stages == {"reading the checkpoint"}
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


def test_a_file_that_is_there_is_not_replaced(calibrate: Calibrate, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    path.write_text("weights")
    with pytest.raises(BundleError, match="there is one: pass --force"):
        calibrate()
    assert path.read_text() == "weights"
    assert calibrate(force=True).path == path
    assert load_file(path)


def test_a_file_is_named_after_the_model(
    calibrate: Calibrate, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate(output=None).path == Path("stories260k-head-sparse.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["stories260k-head-sparse.safetensors"]
