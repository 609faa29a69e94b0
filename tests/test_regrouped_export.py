"""`export --attention gqa` from checkpoint and text to a bundle that verifies and is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeattn.bundle.bundle import CONFIG, REPORT_JSON, Bundle
from edgeattn.errors import EdgeattnError, LoweringError, RuntimeInputError, UsageError
from edgeattn.pipeline import default_output, export, plan_export
from edgeattn.pipeline.work import work_folder
from edgeattn.recipe import Recipe
from edgeattn.transforms import descent

GQA = "gqa:kv_heads=2"


@pytest.fixture(scope="module")
def novels(shared_dir: Path) -> tuple[str, str]:
    """To calibrate and train on, and to judge by."""
    folder = shared_dir / "data" / "austen"
    if not folder.is_dir():
        pytest.skip("no novels in shared/data")
    return str(folder / "emma.txt"), str(folder / "pride_and_prejudice.txt")


@pytest.fixture(scope="module")
def exported(
    stories260k: Path, novels: tuple[str, str], export_tiny: Callable[..., Path]
) -> Callable[..., Path]:
    """A function from quantisation and further fields to a regrouped bundle of a trained model."""

    def make(quant: str = "none", attention: tuple[str, ...] = (GQA,), **fields: Any) -> Path:
        texts = {"calibration": novels[0], "calibration_windows": 4, "eval_text": novels[1]}
        target = fields.pop("target", "cpu")
        return export_tiny(target, quant, model=stories260k, attention=attention, **texts, **fields)

    return make


def report_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / REPORT_JSON).read_text())
    return found


@pytest.mark.parametrize(
    ("quant", "fields"),
    [
        ("none", {}),
        ("w4a16-spinquant:down_proj=w8", {"target": "jetson-orin"}),
        ("w8a8-spinquant", {}),
        # `tests/test_compositions.py` has this pair with three schemes at a smaller size.
        pytest.param(
            "w8-rtn", {"attention": (GQA, "head-sparse:density=0.5")}, marks=pytest.mark.slow
        ),
        ("none", {"attention": ("gqa:heads=4", "fft-rope:window=16,tolerance=50%")}),
        ("none", {"attention": ("gqa:kv_heads=8",)}),
    ],
)
def test_a_bundle_is_proven_and_verifies(
    exported: Callable[..., Path],
    edgeattn: Callable[..., Any],
    quant: str,
    fields: dict[str, Any],
) -> None:
    bundle = exported(quant, **fields)
    manifest = Bundle.open(bundle).manifest
    request = Recipe.from_dict(manifest.recipe).group_query
    assert request is not None
    wanted = (request.heads or 8, request.kv_heads or 4)
    assert (manifest.shape["num_heads"], manifest.shape["num_kv_heads"]) == wanted
    config = json.loads((bundle / CONFIG).read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == wanted
    done = edgeattn("verify", bundle, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    if "target" not in fields:
        text = edgeattn("run", bundle, "-p", "Once upon a time", "--max-new-tokens", 4)
        assert text.exit_code == 0, text.stderr


def test_the_price_is_told(exported: Callable[..., Path]) -> None:
    report = report_of(exported())
    notes = report["transforms"]["regrouped heads"]
    assert notes["heads"] == "8 query and 4 KV heads became 8 and 2"
    assert notes["aligned and ordered (exact)"] == pytest.approx(
        notes["perplexity before"], rel=1e-5
    )
    assert notes["KV heads averaged"] > 1.01 * notes["perplexity before"]
    assert "training is needed" in notes["loss"]
    assert "averages lose" in notes["layer 4"]
    last = notes["layers"][4]
    assert sorted(head for group in last["groups"] for head in group) == [0, 1, 2, 3]
    assert [len(group) for group in last["groups"]] == [2, 2]
    assert 0 < last["key_loss"] < 1
    assert 0 < last["value_loss"] < 1
    assert report["quality"]["increase"] > 0.01


def test_a_checkpoint_alone_cannot_make_it_again(
    exported: Callable[..., Path], stories260k: Path, edgeattn: Callable[..., Any]
) -> None:
    done = edgeattn("verify", exported(), "--checkpoint", stories260k)
    assert done.exit_code == 2
    assert "gqa:kv_heads=2 chose some on a calibration text" in done.stderr


def test_copies_cost_nothing(exported: Callable[..., Path]) -> None:
    report = report_of(exported(attention=("gqa:kv_heads=8",)))
    assert report["transforms"]["regrouped heads"]["loss"].startswith("none")
    assert abs(report["quality"]["increase"]) < 1e-4


def test_training_pays_a_part_back(exported: Callable[..., Path], novels: tuple[str, str]) -> None:
    plain = report_of(exported())
    report = report_of(exported(finetune_text=novels[0], finetune_steps=8))
    notes = report["transforms"]["recovery training"]
    assert notes["learned"]
    assert notes["text"] == "emma.txt"
    assert notes["perplexity_after"] < notes["perplexity_before"]
    assert report["quality"]["perplexity"] < plain["quality"]["perplexity"]


def test_stopped_training_goes_on_and_another_recipe_is_refused(
    stories260k: Path,
    novels: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(descent, "_SAVE_SECONDS", 0.0)
    seen = list[tuple[str, int]]()

    def run(steps: int = 4, *, stop: int | None = None) -> None:
        def progress(stage: str, done: int, total: int) -> None:
            seen.append((stage, done))
            if stage == "recovery training" and done == stop:
                raise KeyboardInterrupt

        recipe = Recipe(
            "cpu",
            attention=(GQA,),
            calibration=novels[0],
            calibration_windows=4,
            finetune_text=novels[0],
            finetune_steps=steps,
        )
        export(stories260k, recipe, tmp_path / "bundle", verify=False, progress=progress)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(stop=2)
    assert "the same command goes on" in stopped.value.__notes__[0]
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        run(steps=5)
    seen.clear()
    run()
    assert [done for stage, done in seen if stage == "recovery training" and done] == [3, 4]
    assert not [done for stage, done in seen if stage == "comparing heads" and done]
    assert (tmp_path / "bundle").is_dir()
    assert not work_folder(tmp_path / "bundle").exists()


def test_a_short_training_text_is_refused(
    stories260k: Path, novels: tuple[str, str], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("It is a truth universally acknowledged. " * 20)
    recipe = Recipe(
        "cpu",
        attention=(GQA,),
        calibration=novels[0],
        calibration_windows=4,
        finetune_text=str(text),
        finetune_steps=4,
    )
    with pytest.raises(RuntimeInputError, match="at least 16 windows"):
        export(stories260k, recipe, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"attention": ("gqa:kv_heads=3",)}, LoweringError, "kv_heads=1 or 2 or 4 or 8"),
        ({"attention": ("gqa:heads=16",)}, LoweringError, "at most 8 query heads"),
        ({"attention": ("gqa:kv_heads=4",)}, LoweringError, "already"),
        ({"attention": (GQA,), "calibration": None}, UsageError, "gqa:kv_heads=2 can be"),
        (
            {"attention": (GQA, "head-sparse:density=0.5,routers=r.safetensors")},
            LoweringError,
            "the checkpoint's own heads",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    stories260k: Path,
    novels: tuple[str, str],
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[EdgeattnError],
    words: str,
) -> None:
    recipe = Recipe("cpu", **{"calibration": novels[0], **fields})
    with pytest.raises(error, match=words) as caught:
        export(stories260k, recipe, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_knows_the_smaller_cache_and_the_training(
    stories260k: Path, novels: tuple[str, str], tmp_path: Path
) -> None:
    plain = plan_export(stories260k, Recipe("cpu"), tmp_path / "b").estimate
    recipe = Recipe(
        "cpu",
        attention=("gqa:kv_heads=1",),
        calibration=novels[0],
        finetune_text=novels[0],
        finetune_steps=9,
    )
    found = plan_export(stories260k, recipe, tmp_path / "b").estimate
    assert 4 * found.cache_bytes_per_token == plain.cache_bytes_per_token
    assert found.weight_bytes < plain.weight_bytes
    assert {"regrouping", "recovery training"} <= found.seconds.keys()
    assert default_output("m", recipe).name == "m-cpu-none-gqa-kv_heads-1"
