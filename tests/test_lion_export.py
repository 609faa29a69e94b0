"""LION through the whole chain: distilled, exported, proven, verified; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from encoders import save_embedder, save_encoder

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import EdgeattnError, ProofError
from edgeattn.pipeline import export, plan_export, verify_bundle
from edgeattn.pipeline.work import work_folder
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession
from edgeattn.transforms import descent
from edgeattn.verify import compare

TEXT = "It is a truth universally acknowledged that a single man is in want of a wife. " * 20
OPERATOR = "BidirectionalLinearAttention"


def recipe(file: Path, variant: str = "d", target: str = "cpu", **fields: Any) -> Recipe:
    options = {"finetune_text": str(file), "finetune_steps": 4, **fields}
    return Recipe(target, attention=(f"lion:variant={variant}",), **options)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("embedder") / "tiny"
    save_embedder(path, tiny_checkpoint / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def bundle(embedder: Path, novel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(embedder, recipe(novel, quant="w8-rtn"), path)
    return path


def operators(bundle: Path) -> list[str]:
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node if node.domain == "edgeattn"]


def test_every_layer_is_linear_and_proven(bundle: Path, novel: Path) -> None:
    opened = Bundle.open(bundle)
    assert operators(bundle) == [OPERATOR] * 3
    assert Recipe.from_dict(opened.manifest.recipe) == recipe(novel, quant="w8-rtn")
    assert {kind.attention.variant for kind in opened.encoder_shape.layer_kinds} == {"d"}
    report = json.loads((bundle / "report.json").read_text())
    assert {row["attention"]["kind"] for row in report["layers"]} == {"lion"}
    rows = report["verification"]["agreements"][0]["comparisons"]
    assert any(row["tensor"].startswith(compare.OPERATOR) for row in rows)
    assert verify_bundle(bundle).passed
    session = EncoderSession.open(bundle)
    texts = ["one or two words", "a"]
    alone = np.concatenate([session.embed([text]) for text in texts])
    np.testing.assert_allclose(session.embed(texts), alone, atol=1e-5)


def test_the_report_says_how_it_agrees(bundle: Path) -> None:
    notes = json.loads((bundle / "report.json").read_text())["transforms"]["linear attention"]
    page = (bundle / "report" / "index.html").read_text()
    assert "LION-D, silu features" in page
    assert "layer 2 alone" in page
    assert notes["agreement with the original"] in page
    assert [row["step"] for row in notes["losses"]] == [1, 2, 3, 4]
    assert len(notes["after"][0]["layers"]) == 3


@pytest.mark.parametrize(
    ("variant", "quant", "target"),
    [
        ("s", "w8a8-spinquant", "cpu"),
        ("s", "w4a16-gptq:group=32", "cpu"),
        ("d", "w8a8", "cpu"),
        ("lit", "w4a16-spinquant:group=32", "cpu"),
        ("d", "w4-rtn:group=64,down_proj=w8", "jetson-orin"),
        ("s", "w8a8-spinquant", "jetson-orin"),
        ("d", "w4a16-spinquant:group=64,down_proj=w8", "l4"),
        pytest.param("s", "w4a16-gptq:group=64,down_proj=w8", "l4", marks=pytest.mark.slow),
    ],
)
def test_it_goes_with_every_scheme_of_encoders(
    embedder: Path, novel: Path, tmp_path: Path, variant: str, quant: str, target: str
) -> None:
    calibration = {"calibration": str(novel), "calibration_windows": 4}
    asked = recipe(novel, variant, target, quant=quant, **calibration)
    made = export(embedder, asked, tmp_path / "out", plugins=False)
    assert made.verification is not None
    assert made.verification.passed
    if target != "cpu" and TENSORRT_RTX.is_available():
        assert made.verification.tensorrt is not None
        assert made.verification.tensorrt.status == "built"
    weights = made.layers[0]["weights"]
    assert weights["self_attn.q_proj"].startswith("int")
    if variant == "s":
        assert weights["self_attn.gate_proj"].startswith("fp")


def test_its_operators_are_kept_for_a_gpu(bundle: Path) -> None:
    from edgeattn.verify.operators import load_samples

    (sample,) = load_samples(bundle / "golden" / "operators.npz")
    assert sample.op == OPERATOR
    padding = sample.inputs[4]
    assert padding.any() and not padding.all()  # noqa: PT018
    assert sample.inputs[3].max() < 0


def test_a_wrong_decay_is_named(bundle: Path, changed: Callable[..., Path]) -> None:
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    node = [n for n in graph.graph.node if n.op_type == OPERATOR][1]
    next(a for a in node.attribute if a.name == "normalise").i = 0
    verification = verify_bundle(changed(bundle, {"model.onnx": graph.SerializeToString()}))
    assert not verification.passed
    assert verification.agreements[0].first_bad == "layer 1"


def test_it_cannot_be_made_again_from_the_checkpoint(bundle: Path, embedder: Path) -> None:
    with pytest.raises(EdgeattnError, match="learned its own on a text"):
        verify_bundle(bundle, checkpoint=embedder)


@pytest.mark.parametrize(("name", "variant"), [("vit-classifier", "s"), ("dinov2", "lit")])
def test_an_encoder_of_images_learns_on_images(tmp_path: Path, name: str, variant: str) -> None:
    save_encoder(name, tmp_path / "model")
    images = np.random.default_rng(0).standard_normal((18, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    made = export(tmp_path / "model", recipe(tmp_path / "images.npy", variant), tmp_path / "out")
    assert made.verification is not None
    assert made.verification.passed
    assert ("same class" in str(made.transforms)) == (name == "vit-classifier")
    session = EncoderSession.open(tmp_path / "out")
    assert np.isfinite(session.run_images(images[:2])).all()


def test_rope_and_shared_heads(tmp_path: Path, tiny_checkpoint: Path, novel: Path) -> None:
    save_encoder("eurobert", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(
        (tiny_checkpoint / "tokenizer.json").read_bytes()
    )
    made = export(tmp_path / "model", recipe(novel, "s"), tmp_path / "out")
    assert made.verification is not None
    assert made.verification.passed
    assert operators(tmp_path / "out") == [OPERATOR] * 3


@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX")
def test_tensorrt_builds_it(embedder: Path, novel: Path, tmp_path: Path) -> None:
    asked = recipe(novel, "s", "jetson-orin")
    made = export(embedder, asked, tmp_path / "out", plugins=False)
    assert made.verification is not None
    assert made.verification.tensorrt is not None
    assert made.verification.tensorrt.status == "built"


def test_stopped_training_goes_on(
    embedder: Path, novel: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_SAVE_SECONDS", 0.0)
    out = tmp_path / "out"
    stages = list[tuple[str, int]]()

    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("distilling") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(embedder, recipe(novel, quant="w8-rtn"), out, progress=stop)
    assert work_folder(out).is_dir()
    for other in (recipe(novel, "s"), recipe(novel, finetune_lr=1e-3)):
        with pytest.raises(EdgeattnError, match="started with another model, recipe"):
            export(embedder, other, out)
    export(
        embedder,
        recipe(novel, quant="w8-rtn"),
        out,
        progress=lambda stage, done, _: stages.append((stage, done)),
    )
    trained = [done for stage, done in stages if stage.startswith("distilling")]
    assert trained[-2:] == [3, 4]
    assert 1 not in trained
    assert not work_folder(out).exists()
    weights = [(path / "model.onnx.data").read_bytes() for path in (out, bundle)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention": ("fft-rope",), "calibration": __file__}, "a decoder, for --attention"),
        ({"attention": ("gqa:kv_heads=1",), "calibration": __file__}, "a decoder, for --attention"),
        ({"finetune_text": "/nowhere.txt"}, "/nowhere.txt"),
        ({"quant": "w8a8-spinquant:kv=int8", "calibration": __file__}, "floating-point cache"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    embedder: Path, novel: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    asked = Recipe("cpu", **fields) if "attention" in fields else replace(recipe(novel), **fields)
    for run in (export, plan_export):
        with pytest.raises(EdgeattnError, match=r"expected .*, but .*: ") as caught:
            run(embedder, asked, tmp_path / "out")
        assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_material_it_is_refused(
    embedder: Path, tiny_checkpoint: Path, novel: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeattnError, match="linear attention is distilled on"):
        Recipe("cpu", attention=("lion:variant=d",))
    (tmp_path / "short.txt").write_text("A short text.")
    with pytest.raises(EdgeattnError, match="at least 16 windows of"):
        export(embedder, recipe(tmp_path / "short.txt"), tmp_path / "out")
    with pytest.raises(EdgeattnError, match="is a decoder"):
        export(tiny_checkpoint, recipe(novel), tmp_path / "out")
    save_encoder("vit", tmp_path / "vit")
    np.save(tmp_path / "images.npy", np.zeros((18, 3, 32, 40), np.float32))
    with pytest.raises(EdgeattnError, match=r"3, 32, 32.*size is \[18, 3, 32, 40\]"):
        export(tmp_path / "vit", recipe(tmp_path / "images.npy"), tmp_path / "out")
    np.save(tmp_path / "few.npy", np.zeros((3, 3, 32, 32), np.float32))
    with pytest.raises(EdgeattnError, match="at least 16 images"):
        export(tmp_path / "vit", recipe(tmp_path / "few.npy"), tmp_path / "out")


def test_the_plan_counts_the_training(embedder: Path, novel: Path, tmp_path: Path) -> None:
    plan = plan_export(embedder, recipe(novel, "s"), tmp_path / "out")
    plain = plan_export(embedder, Recipe("cpu"), tmp_path / "out")
    assert plan.estimate.seconds["distilling"] > 0
    gates = 3 * (2 * 64 + 2) * 4
    assert plan.estimate.weight_bytes == plain.estimate.weight_bytes + gates


def test_a_graph_that_disagrees_is_no_bundle(
    embedder: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeattn.models import encoder

    real = encoder.attend_lion

    def shifted(attention: Any, q: Any, k: Any, *rest: Any, **options: Any) -> Any:
        return real(attention, q, k + 0.1, *rest, **options)

    def load(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(encoder, "attend_lion", shifted)
        return loaded(*args, **options)

    from edgeattn.verify import encoder as verify_encoder

    loaded = verify_encoder._run_torch
    monkeypatch.setattr(verify_encoder, "_run_torch", load)
    with pytest.raises(ProofError):
        export(embedder, recipe(novel), tmp_path / "out")
    assert not (tmp_path / "out").exists()
