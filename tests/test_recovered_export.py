"""`export --finetune-text` behind a lossy attention variant: what is trained, judged and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeattn.bundle.bundle import REPORT_JSON, Bundle
from edgeattn.errors import UsageError
from edgeattn.pipeline import export
from edgeattn.pipeline.work import work_folder
from edgeattn.recipe import Recipe
from edgeattn.transforms import descent

SPARSE, POLYNOMIAL = "head-sparse:density=0.5", "fft-rope:window=16,tolerance=50%"


@pytest.fixture(scope="module")
def novel(shared_dir: Path) -> str:
    """To calibrate and train on."""
    file = shared_dir / "data" / "austen" / "emma.txt"
    if not file.is_file():
        pytest.skip("no novels in shared/data")
    return str(file)


@pytest.mark.parametrize(
    ("attention", "quant"),
    [
        ((SPARSE,), "none"),
        ((SPARSE,), "w8-rtn"),
        ((POLYNOMIAL,), "none"),
        (("gqa:kv_heads=2", SPARSE), "none"),
    ],
)
def test_training_pays_a_part_back(
    stories260k: Path,
    novel: str,
    export_tiny: Callable[..., Path],
    attention: tuple[str, ...],
    quant: str,
) -> None:
    bundle = export_tiny(
        "cpu",
        quant,
        model=stories260k,
        attention=attention,
        calibration=novel,
        calibration_windows=4,
        finetune_text=novel,
        finetune_steps=6,
    )
    transforms = json.loads((bundle / REPORT_JSON).read_text())["transforms"]
    notes = transforms["recovery training"]
    assert notes["learned"]
    assert notes["perplexity_after"] < notes["perplexity_before"]
    assert sum(notes["losses"][-3:]) < sum(notes["losses"][:3])
    if SPARSE in attention:  # which shows in decoding alone, and is judged there
        assert notes["perplexity_before"] > 1.01 * notes["perplexity_original"]
        assert "head sparsity" in transforms
    assert Bundle.open(bundle).manifest.recipe["attention"] == list(attention)
