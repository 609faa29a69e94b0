"""`export --finetune-text` behind a lossy attention variant: what is trained, judged and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeattn.bundle.bundle import MODEL, REPORT_HTML, REPORT_JSON, WEIGHTS, Bundle
from edgeattn.errors import UsageError
from edgeattn.pipeline import export, plan_export
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
        finetune_steps=16,
        # What a polynomial loses is so little that steps of the default rate overshoot it.
        finetune_lr=1e-4 if POLYNOMIAL in attention else None,
    )
    transforms = json.loads((bundle / REPORT_JSON).read_text())["transforms"]
    notes = transforms["recovery training"]
    assert notes["learned"]
    assert notes["divergence_after"] < notes["divergence_before"]
    assert notes["perplexity_after"] < notes["perplexity_before"]
    if SPARSE in attention:  # which shows in decoding alone, and is judged there
        assert notes["perplexity_before"] > 1.01 * notes["perplexity_original"]
        assert "head sparsity" in transforms
        # Behind polynomials a step's loss is small, and differs more between windows than it falls.
        assert sum(notes["losses"][-3:]) < sum(notes["losses"][:3])
    assert Bundle.open(bundle).manifest.recipe["attention"] == list(attention)


def test_stopped_training_goes_on_and_another_variant_is_refused(
    stories260k: Path, novel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_SAVE_SECONDS", 0.0)
    seen = list[tuple[str, int]]()

    def run(attention: str = SPARSE, *, stop: int | None = None) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            seen.append((stage, done))
            if stage == "recovery training" and done == stop:
                raise KeyboardInterrupt

        recipe = Recipe(
            "cpu",
            attention=(attention,),
            calibration=novel,
            calibration_windows=4,
            finetune_text=novel,
            finetune_steps=3,
        )
        export(stories260k, recipe, tmp_path / "bundle", verify=False, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run(stop=1)
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        run("head-sparse:density=0.75")
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(stop=3)  # all steps; the rest of an export is tested elsewhere
    assert [done for stage, done in seen if stage == "recovery training" and done] == [2, 3]
    assert not [done for stage, done in seen if stage == "training routers" and done]


Export = Callable[..., tuple[Path, str]]


@pytest.fixture
def exported(stories260k: Path, novel: str, edgeattn: Callable[..., Any], tmp_path: Path) -> Export:
    """A function from an attention and options to an unproven bundle and what was printed."""

    def run(name: str, attention: str, *options: object) -> tuple[Path, str]:
        place = tmp_path / name
        asked = ("--target", "cpu", "--attention", attention, "--no-verify", "-o", place)
        done = edgeattn("export", stories260k, *asked, *options)
        assert done.exit_code == 0, done.stderr
        return place, done.stdout

    return run


def test_training_that_harms_is_discarded_and_the_user_told(exported: Export, novel: str) -> None:
    asked = (POLYNOMIAL, "--calibration", novel, "--calibration-windows", 4)
    rate = ("--finetune-text", novel, "--finetune-steps", 2, "--finetune-lr", 0.9)
    plain, _ = exported("plain", *asked)
    found, printed = exported("trained", *asked, *rate)
    reason = "the trained weights were discarded, as on text held out the divergence"
    assert reason in printed
    assert reason in (found / REPORT_HTML).read_text("utf-8")
    for file in (MODEL, WEIGHTS):
        assert (found / file).read_bytes() == (plain / file).read_bytes()


def test_nothing_is_trained_where_no_layer_takes_the_variant(exported: Export, novel: str) -> None:
    place, printed = exported(
        "bundle",
        "fft-rope:tolerance=0.000001",
        *("--calibration", novel, "--calibration-windows", 4),
        *("--finetune-text", novel, "--finetune-steps", 2),
    )
    reason = "skipped, as no layer takes fft-rope:tolerance=1e-06 and so nothing was lost"
    assert f"recovery training: learned False, verdict {reason}" in printed
    assert reason in (place / REPORT_HTML).read_text("utf-8")
    notes = json.loads((place / REPORT_JSON).read_text())["transforms"]
    assert notes["recovery training"].keys() == {"learned", "verdict"}


@pytest.mark.parametrize(
    ("variant", "option", "file"),
    [(SPARSE, f"{SPARSE},routers=", "routers"), (POLYNOMIAL, "fft-rope:heads=", "heads")],
)
def test_training_has_the_tables_of_a_file_in_its_loop(
    stories260k: Path,
    novel: str,
    edgeattn: Callable[..., Any],
    tmp_path: Path,
    variant: str,
    option: str,
    file: str,
) -> None:
    """Nothing is calibrated, so that no text is needed but the one to learn from."""
    path = tmp_path / f"{file}.{'json' if file == 'heads' else 'safetensors'}"
    options = ("--attention", variant, "--text", novel, "--windows", 4, "-o", path)
    done = edgeattn("calibrate", stories260k, *options)
    assert done.exit_code == 0, done.stderr
    asked: dict[str, Any] = {"finetune_text": novel, "finetune_steps": 16, "finetune_lr": 1e-4}
    recipe = Recipe("cpu", attention=(f"{option}{path}",), **asked)
    report = export(stories260k, recipe, tmp_path / "bundle")
    assert report.verification is not None
    notes = report.transforms["recovery training"]
    assert notes["learned"]
    assert 0 < notes["divergence_after"] < notes["divergence_before"]


def test_quantisation_alone_is_not_trained() -> None:
    with pytest.raises(UsageError, match="rounded weights are not trained"):
        Recipe("cpu", quant="w4-rtn", finetune_text="a", finetune_steps=9)


def test_a_plan_knows_the_training(stories260k: Path, novel: str, tmp_path: Path) -> None:
    recipe = Recipe("cpu", attention=(SPARSE,), calibration=novel)
    plain = plan_export(stories260k, recipe, tmp_path / "b").estimate
    recipe = replace(recipe, finetune_text=novel, finetune_steps=9)
    found = plan_export(stories260k, recipe, tmp_path / "b").estimate
    assert found.seconds.keys() - plain.seconds.keys() == {"recovery training"}
