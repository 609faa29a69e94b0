"""`export --attention` from checkpoint and text to a bundle that verifies, runs and is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import torch

from edgeattn.bundle.bundle import REPORT_JSON, Bundle
from edgeattn.errors import LoweringError, UsageError
from edgeattn.models.hub import open_model
from edgeattn.models.model import load_decoder, model_of
from edgeattn.pipeline import default_output, export
from edgeattn.planner.polynomial_heads import read_polynomial_heads
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session, perplexity

SPARSE, POLYNOMIAL = "head-sparse:density=0.5", "fft-rope:window=16,tolerance=50%"


@pytest.fixture(scope="module")
def novels(shared_dir: Path) -> tuple[Path, Path]:
    """To calibrate on, and to judge by."""
    folder = shared_dir / "data" / "austen"
    if not folder.is_dir():
        pytest.skip("no novels in shared/data")
    return folder / "emma.txt", folder / "pride_and_prejudice.txt"


@pytest.fixture(scope="module")
def exported(
    stories260k: Path, novels: tuple[Path, Path], export_tiny: Callable[..., Path]
) -> Callable[..., Path]:
    """A function from a variant to a bundle of a small trained model."""
    calibration, judged = map(str, novels)

    def make(attention: str, quant: str = "none", **fields: Any) -> Path:
        return export_tiny(
            "cpu",
            quant,
            model=stories260k,
            attention=(attention,),
            calibration=calibration,
            calibration_windows=4,
            eval_text=judged,
            **fields,
        )

    return make


def report_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / REPORT_JSON).read_text())
    return found


@pytest.mark.parametrize(
    ("attention", "quant"),
    [
        (SPARSE, "none"),
        (POLYNOMIAL, "none"),
        # With other schemes `tests/test_compositions.py` proves them at a smaller size.
        pytest.param(SPARSE, "w4a16-spinquant:down_proj=w8", marks=pytest.mark.slow),
        pytest.param(POLYNOMIAL, "w8-rtn", marks=pytest.mark.slow),
    ],
)
def test_a_bundle_is_proven_and_verifies(
    exported: Callable[..., Path], edgeattn: Callable[..., Any], attention: str, quant: str
) -> None:
    bundle = exported(attention, quant)
    manifest = Bundle.open(bundle).manifest
    assert manifest.recipe["attention"] == [attention]
    assert manifest.lowering["kv_cache"] == "packed"
    done = edgeattn("verify", bundle, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    text = edgeattn("run", bundle, "-p", "Once upon a time", "--max-new-tokens", 4)
    assert text.exit_code == 0, text.stderr


def test_what_routers_do_is_told(exported: Callable[..., Path]) -> None:
    notes = report_of(exported(SPARSE))["transforms"]["head sparsity"]
    assert notes["active"] == f"{8 + 4 * 4} of 40 heads"  # the first of five layers is dense
    assert notes["layer 0"] == "8 of 8, dense"
    assert all("recall" in notes[f"layer {i}"] for i in range(1, 5))
    assert "at most" in notes["decoding"]
    dense, *sparse = notes["layers"]
    assert dense == {"layer": 0, "slots": 8, "units": 8, "recall": None, "active": []}
    for row in sparse:
        assert sum(row["active"]) == pytest.approx(row["slots"], abs=0.01)
        assert len(set(row["active"])) > 1


def test_what_polynomials_do_is_told(exported: Callable[..., Path]) -> None:
    report = report_of(exported(POLYNOMIAL))
    notes = report["transforms"]["polynomial heads"]
    assert "of 40 heads" in notes["passed"]
    assert int(notes["passed"].split()[0]) > 0
    assert "times those of exact attention" in notes["FLOPs of attention"]
    assert 0 <= report["quality"]["fallback_share"] <= 1
    taken = [degree is not None for row in notes["layers"] for degree in row["degree"]]
    assert (sum(taken), len(taken)) == (int(notes["passed"].split()[0]), 40)
    errors = [error for row in notes["layers"] for error in row["error"]]
    assert max(error for error, chosen in zip(errors, taken, strict=True) if chosen) <= 0.5
    kinds = {row["attention"]["kind"] for row in report["layers"]}
    assert "fft-rope" in kinds


def test_sparse_quality_is_that_of_decoding(
    exported: Callable[..., Path], stories260k: Path, novels: tuple[Path, Path]
) -> None:
    """A window at once would have all heads: the loss would not be seen."""
    bundle = exported(SPARSE)
    session = Session.open(bundle, exact=True)
    text = novels[1].read_text("utf-8")
    found = perplexity(session, text, windows=2, length=64)
    ids = np.array(session.text.encode(text[2000:], add_special_tokens=False)[: 2 * 64])
    decoder = load_decoder(
        model_of(open_model(stories260k)), weight_dtype=torch.float32, compute_dtype=torch.float32
    )
    rows = torch.from_numpy(ids).reshape(2, 64)
    places = torch.arange(64).expand(2, -1)
    with torch.inference_mode():
        logits = decoder(rows, torch.ones_like(rows), places, decoder.empty_cache(2)).logits
    dense = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert found.nll > float(dense) + 0.01
    at_once = [session.run(row[None]).logits[0] for row in rows.numpy()]
    for ours, theirs in zip(at_once, logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert report_of(bundle)["quality"]["increase"] > 0.01


def test_files_of_calibrate_are_used(
    exported: Callable[..., Path],
    edgeattn: Callable[..., Any],
    stories260k: Path,
    tiny_checkpoint: Path,
    novels: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    heads, routers = tmp_path / "heads.json", tmp_path / "routers.safetensors"
    common = ("--text", novels[0], "--windows", 4)
    for attention, file in ((POLYNOMIAL, heads), (SPARSE, routers)):
        done = edgeattn("calibrate", stories260k, "--attention", attention, *common, "-o", file)
        assert done.exit_code == 0, done.stderr
    assert read_polynomial_heads(heads).passed > 0
    asked = {
        POLYNOMIAL: f"fft-rope:heads={heads}",
        SPARSE: f"{SPARSE},routers={routers}",
    }
    for name, attention in asked.items():
        recipe = Recipe("cpu", attention=(attention,))
        report = export(stories260k, recipe, tmp_path / name.partition(":")[0])
        assert report.verification is not None
        wrong = tmp_path / "wrong"
        with pytest.raises(UsageError, match=r"another (checkpoint|one)"):
            export(tiny_checkpoint, recipe, wrong)
        assert not wrong.exists()
    text = {"calibration": str(novels[0]), "calibration_windows": 4}
    recipe = Recipe("cpu", "w4a16-spinquant:down_proj=w8", attention=(asked[SPARSE],), **text)
    found = export(stories260k, recipe, tmp_path / "rotated")
    assert found.verification is not None
    assert "head sparsity" in found.transforms


@pytest.mark.parametrize(
    ("attention", "fields", "part"),
    [
        (SPARSE, {}, "a text that head-sparse:density=1/2 can be calibrated on"),
        ("fft-rope", {}, "a text that fft-rope can be calibrated on"),
        (f"{SPARSE},routers=nowhere", {}, "a file nowhere, but there is none"),
        ("fft-rope:heads=nowhere", {}, "a file nowhere, but there is none"),
        (
            SPARSE,
            {"quant": "w4a16-gptq:kv=int8", "calibration": "x"},
            "a floating-point cache for an attention variant",
        ),
    ],
)
def test_refusals_before_any_work(
    stories260k: Path, tmp_path: Path, attention: str, fields: dict[str, Any], part: str
) -> None:
    with pytest.raises((UsageError, LoweringError), match=part):
        export(stories260k, Recipe("cpu", attention=(attention,), **fields), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_no_head_left(stories260k: Path, novels: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = Recipe("cpu", attention=("head-sparse:density=0.1",), calibration=str(novels[0]))
    with pytest.raises(LoweringError, match="at least 1/8: one of the model's 8 heads"):
        export(stories260k, recipe, tmp_path / "bundle")


def test_a_cap_on_scores_is_refused(
    random_checkpoint: Callable[..., Path], novels: tuple[Path, Path], tmp_path: Path
) -> None:
    gemma = random_checkpoint(
        model_type="gemma2",
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
    )
    for attention in ("fft-rope", SPARSE):
        recipe = Recipe("cpu", attention=(attention,), calibration=str(novels[0]))
        with pytest.raises(LoweringError, match="without a cap on its attention's scores"):
            export(gemma, recipe, tmp_path / "bundle")


def test_layers_with_a_sliding_window_stay_as_they_are(
    random_checkpoint: Callable[..., Path], novels: tuple[Path, Path], tmp_path: Path
) -> None:
    mistral = random_checkpoint(model_type="mistral", sliding_window=8)
    for attention in ("fft-rope:window=16", SPARSE):
        recipe = Recipe(
            "cpu", attention=(attention,), calibration=str(novels[0]), calibration_windows=2
        )
        report = export(mistral, recipe, tmp_path / attention.partition(":")[0])
        assert report.verification is not None
        proto = (report.path / "model.onnx").read_bytes()
        assert b"HeadSparseAttention" not in proto
        assert b"FftRopeAttention" not in proto


def test_the_budget_holds(
    stories260k: Path, novels: tuple[Path, Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    done = edgeattn(
        *("export", stories260k, "--target", "cpu", "--attention", "head-sparse:density=0.25"),
        *("--calibration", novels[0], "--calibration-windows", 4, "--eval-text", novels[1]),
        *("--max-ppl-increase", "1%", "--no-verify", "-o", tmp_path / "bundle"),
    )
    assert done.exit_code == 1
    assert "at most 1 % above the checkpoint's" in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_names_of_bundles_tell_variants_apart(stories260k: Path) -> None:
    names = {
        default_output(stories260k, Recipe("cpu", attention=asked)).name
        for asked in ((), (SPARSE,), ("fft-rope",), ("head-sparse:density=7/9",))
    }
    assert len(names) == 4
    assert all("/" not in name and ":" not in name for name in names)
