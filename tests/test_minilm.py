"""all-MiniLM-L6-v2: exported, it embeds as transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.",
    "A cat sat on the mat.",
    "A kitten rests on a rug.",
    "x",
]


def reference(path: Path) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).float()
    pooled = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


def test_it_embeds_as_transformers_does(minilm: Path, tmp_path: Path) -> None:
    report = export(minilm, Recipe("cpu"), tmp_path / "bundle")
    assert report.verification is not None
    assert report.verification.passed
    found = EncoderSession.open(tmp_path / "bundle").embed(TEXTS)
    np.testing.assert_allclose(found, reference(minilm), rtol=0, atol=1e-5)
    # the two cats are nearer to each other than to anything else
    likeness = found @ found.T
    assert likeness[1, 2] > 0.5 > max(likeness[1, 0], likeness[1, 3], likeness[2, 0])


@pytest.mark.parametrize(("quant", "least"), [("w8-rtn", 0.998), ("w4-rtn", 0.9)])
def test_rounded_weights_turn_its_vectors_little(
    minilm: Path, tmp_path: Path, quant: str, least: float
) -> None:
    export(minilm, Recipe("cpu", quant=quant), tmp_path / "bundle")
    found = EncoderSession.open(tmp_path / "bundle", exact=True).embed(TEXTS)
    cosines = (found * reference(minilm)).sum(axis=1)
    assert least < cosines.min() < 0.99999


def paragraphs(file: Path, count: int) -> list[str]:
    """The first paragraphs of at least 200 characters, behind the title pages."""
    parts = file.read_text("utf-8-sig")[2000:].split("\n\n")
    return [" ".join(part.split()) for part in parts if len(part) >= 200][:count]


@pytest.mark.parametrize(
    ("quant", "least", "most"),
    [
        ("w8a8-spinquant", 0.995, 1),
        # what activations lose without a rotation
        pytest.param("w8a8", 0.9, 0.99, marks=pytest.mark.slow),
        pytest.param("w4a16-spinquant", 0.97, 1, marks=pytest.mark.slow),
    ],
)
def test_calibrated_schemes_turn_its_vectors_little(
    minilm: Path, shared_dir: Path, tmp_path: Path, quant: str, least: float, most: float
) -> None:
    books = shared_dir / "data" / "austen"
    calibration = {"calibration": str(books / "emma.txt"), "calibration_windows": 32}
    export(minilm, Recipe("cpu"), tmp_path / "exact", verify=False)
    export(minilm, Recipe("cpu", quant=quant, **calibration), tmp_path / "out", verify=False)
    texts = paragraphs(books / "pride_and_prejudice.txt", 8)
    expected, found = (
        EncoderSession.open(tmp_path / name, exact=True).embed(texts) for name in ("exact", "out")
    )
    assert least < (expected * found).sum(axis=1).mean() < most


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="needs edgeattn[rtx]")
@pytest.mark.parametrize(
    ("target", "quant"), [("l4", "w4a16-spinquant"), ("jetson-orin", "w8a8-spinquant")]
)
def test_tensorrt_builds_its_calibrated_graphs(
    minilm: Path, shared_dir: Path, tmp_path: Path, target: str, quant: str
) -> None:
    text = shared_dir / "data" / "austen" / "emma.txt"
    recipe = Recipe(target, quant=quant, calibration=str(text), calibration_windows=8)
    report = export(minilm, recipe, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.passed
    assert report.verification.tensorrt is not None
    assert report.verification.tensorrt.status == "built"


@pytest.mark.slow
def test_it_is_distilled_to_linear_attention(
    minilm: Path, shared_dir: Path, tmp_path: Path
) -> None:
    """A dozen steps bring its vectors much nearer to its own than those it starts with."""
    recipe = Recipe(
        "cpu",
        attention=("lion:variant=d",),
        finetune_text=str(shared_dir / "data" / "austen" / "emma.txt"),
        finetune_steps=12,
        finetune_lr=1e-3,
    )
    report = export(minilm, recipe, tmp_path / "bundle")
    assert report.verification is not None
    assert report.verification.passed
    notes = report.transforms["linear attention"]
    (before,), (after,) = notes["before"], notes["after"]
    assert after["cosine"] > before["cosine"] + 0.1
    found = EncoderSession.open(tmp_path / "bundle").embed(TEXTS)
    cosines = (found * reference(minilm)).sum(axis=1)
    assert 0.4 < cosines.mean() < 0.999
