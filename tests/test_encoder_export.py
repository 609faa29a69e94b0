"""Encoders through the whole chain: exported, proven, verified again, run; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from encoders import inputs_of, save_embedder, save_encoder

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import BundleError, EdgeattnError, ProofError, RuntimeInputError
from edgeattn.pipeline import default_output, export, plan_export, verify_bundle
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession, Session

needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("embedder") / "tiny"
    save_embedder(path, tiny_checkpoint / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def bundle(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(embedder, Recipe("cpu"), path)
    return path


@pytest.mark.parametrize(
    ("name", "target", "quant", "dtype"),
    [
        ("bert", "cpu", "w8-rtn", None),
        ("bert-classifier", "cpu", "none", "fp16"),
        ("vit", "cpu", "w4-rtn:group=32", None),
        ("eurobert", "cpu", "w8-rtn", None),
        ("dinov2-classifier", "jetson-orin@jetpack6.2", "none", None),
        ("eurobert", "jetson-orin", "none", "bf16"),
    ],
)
def test_every_family_is_proven(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    target: str,
    quant: str,
    dtype: str | None,
) -> None:
    monkeypatch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
    save_encoder(name, tmp_path / "model")
    report = export(tmp_path / "model", Recipe(target, quant=quant, dtype=dtype), tmp_path / "out")
    assert report.verification is not None
    (agreement,) = report.verification.agreements
    assert agreement.passed
    cases = {row.tensor.partition(".")[0] for row in agreement.comparisons}
    assert cases == ({"images"} if "vit" in name or "dinov2" in name else {"text", "ragged"})
    assert (agreement.kl is None) == (not name.endswith("classifier"))
    assert verify_bundle(tmp_path / "out", tensorrt=False).passed


@needs_rtx
@pytest.mark.parametrize(
    ("name", "target"),
    [("bert", "jetson-orin@jetpack6.2"), ("vit", "jetson-orin"), ("eurobert", "l4")],
)
def test_tensorrt_builds_it(tmp_path: Path, name: str, target: str) -> None:
    save_encoder(name, tmp_path / "model")
    report = export(tmp_path / "model", Recipe(target), tmp_path / "out")
    assert report.verification is not None
    assert report.verification.tensorrt is not None
    assert report.verification.tensorrt.status == "built"
    assert "pixel_values" in (tmp_path / "out" / "build_on_device.sh").read_text() or name != "vit"


def test_the_report_has_its_layers_and_no_cache(bundle: Path) -> None:
    found = json.loads((bundle / "report.json").read_text())
    assert {row["cache"] for row in found["layers"]} == {"none"}
    assert all(len(row["weights"]) >= 6 for row in found["layers"])
    assert "cache" not in found["sizes"]
    page = (bundle / "report" / "index.html").read_text()
    assert f"{found['sizes']['weights']:,}" in page
    assert "✓ ok" in page


def test_the_bundle_embeds_as_torch_does(bundle: Path, embedder: Path) -> None:
    import transformers

    reference = transformers.AutoModel.from_pretrained(embedder).eval()
    session = EncoderSession.open(bundle)
    texts = ["a", "one or two words", "It is a truth", "b"]
    found = session.embed(texts, rows=3)
    assert found.shape == (4, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([session.text.encode(text)])
        with torch.no_grad():
            mean = reference(ids).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_it_is_verified_again_with_and_without_the_checkpoint(
    bundle: Path, embedder: Path, tmp_path: Path
) -> None:
    assert verify_bundle(bundle).passed
    assert verify_bundle(bundle, checkpoint=embedder).passed
    save_encoder("bert-relu", tmp_path / "other")
    with pytest.raises(BundleError, match="is another one"):
        verify_bundle(bundle, checkpoint=tmp_path / "other")
    with pytest.raises(BundleError, match="an engine in"):
        verify_bundle(bundle, backend="tensorrt")


def test_a_wrong_layer_is_named(
    bundle: Path, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "Gelu" and "layers.1" in n.name)
    node.op_type = "Relu"
    del node.attribute[:]
    wrong = changed(bundle, {"model.onnx": graph.SerializeToString()})
    verification = verify_bundle(wrong)
    assert not verification.passed
    assert verification.agreements[0].first_bad == "layer 1"
    with pytest.raises(ProofError, match="layer 1"):
        verification.raise_if_failed()


def test_an_ignored_mask_is_found(bundle: Path, changed: Callable[..., Path]) -> None:
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "Attention":
            node.input[3] = ""
    wrong = changed(bundle, {"model.onnx": graph.SerializeToString()})
    failed = {c.tensor for c in verify_bundle(wrong).agreements[0].comparisons if not c.passed}
    assert any(name.startswith("ragged.") for name in failed)
    assert not any(name.startswith("text.") for name in failed)


def test_each_kind_of_session_refuses_the_other(bundle: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="EncoderSession"):
        Session.open(bundle)
    with pytest.raises(BundleError, match="it is a decoder"):
        EncoderSession.open(tiny_bundle)
    with pytest.raises(BundleError, match="it is a decoder"):
        _ = Bundle.open(tiny_bundle).encoder_shape
    assert Bundle.open(bundle).encoder_shape.task == "embedding"


@pytest.mark.parametrize("verb", [("run", "-p", "x"), ("eval", "--text", __file__)])
def test_verbs_of_decoders_refuse_it(
    bundle: Path, edgeattn: Callable[..., Any], verb: tuple[str, ...]
) -> None:
    name, *rest = verb
    done = edgeattn(name, bundle, *rest)
    assert done.exit_code == 1
    assert "it is an encoder" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_cache": "static"}, "--kv-cache static"),
        ({"logits": "last"}, "--logits last"),
        ({"context": 41}, "at most 40 tokens"),
        ({"eval_text": __file__}, "--eval-text"),
        ({"task": "classification"}, "trained to classify"),
        ({"task": "speech"}, "known task"),
        ({"quant": "w4-rtn:group=128"}, "divides the 64 inputs"),
    ],
)
def test_what_an_encoder_cannot_is_refused(
    embedder: Path, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    recipe = Recipe("cpu", **fields)
    with pytest.raises(EdgeattnError, match=r"expected .*, but .*: ") as caught:
        export(embedder, recipe, tmp_path / "out")
    assert said in str(caught.value)
    with pytest.raises(EdgeattnError):
        plan_export(embedder, recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_decoder_has_no_task(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeattnError, match="an encoder, for --task"):
        export(tiny_checkpoint, Recipe("cpu", task="embedding"), tmp_path / "out")


def test_the_plan_tells_what_is_written(embedder: Path, bundle: Path, tmp_path: Path) -> None:
    plan = plan_export(embedder, Recipe("cpu"), tmp_path / "out")
    written = (bundle / "model.onnx.data").stat().st_size
    # beside the padding between tensors
    assert plan.estimate.weight_bytes <= written < plan.estimate.weight_bytes + 80 * 4096
    assert plan.estimate.disk_bytes >= sum(
        file.stat().st_size for file in bundle.rglob("*") if file.is_file()
    )
    assert plan.estimate.cache_bytes == 0
    assert default_output(embedder, Recipe("cpu")).name == "tiny-cpu-none"


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    save_encoder("vit", tmp_path / "model")
    export(tmp_path / "model", Recipe("cpu"), tmp_path / "out", verify=False)
    session = EncoderSession.open(tmp_path / "out")
    pixels = inputs_of("vit")["pixel_values"].numpy()
    assert session.run_images(pixels).shape == (2, 17, 64)
    for wrong, said in (
        (pixels[:, :, :31], r"\[2, 3, 31, 32\]"),
        (pixels[0], r"\[3, 32, 32\]"),
        ((pixels * 100).astype(np.int64), "int64"),
        (pixels * np.nan, "some are not"),
        (pixels.astype(np.float64) * 1e300, "some are not"),
    ):
        with pytest.raises(EdgeattnError, match=said):
            session.run_images(wrong)
    with pytest.raises(EdgeattnError, match="reads images"):
        session.run([[1, 2]])
    with pytest.raises(BundleError, match="--no-verify"):
        verify_bundle(tmp_path / "out")


class Silent:
    """A back end whose output is not finite in one place."""

    def __init__(self, *shape: int, bad: tuple[int, ...]) -> None:
        self._output = np.zeros(shape, np.float32)
        self._output[bad] = np.nan

    def run(self, feeds: object) -> np.ndarray:
        return self._output


def test_an_output_that_is_not_finite_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    with pytest.raises(RuntimeInputError, match=r"finite output.*NaN"):
        EncoderSession(opened, Silent(2, 8, bad=(1, 3))).embed(["a", "b"])
    ids, mask = [[1, 2], [3, 0]], [[1, 1], [1, 0]]
    with pytest.raises(RuntimeInputError, match="finite output"):
        EncoderSession(opened, Silent(2, 2, 8, bad=(1, 0, 3))).run(ids, attention_mask=mask)
    at_padding = Silent(2, 2, 8, bad=(1, 1, 3))
    assert EncoderSession(opened, at_padding).run(ids, attention_mask=mask).shape == (2, 2, 8)


def test_a_single_text_is_refused(bundle: Path) -> None:
    """Each of its characters would get a vector."""
    session = EncoderSession.open(bundle)
    for call in (session.embed, session.encode):
        with pytest.raises(RuntimeInputError, match="single text: pass"):
            call("a cat")
    with pytest.raises(RuntimeInputError, match="not all in it are texts"):
        session.embed(["a", 1])  # type: ignore[list-item]


def test_a_text_that_does_not_fit_is_refused(bundle: Path) -> None:
    session = EncoderSession.open(bundle)
    assert session.context == 40
    for texts, said in (
        (["a" * 41], "at most 40 tokens"),
        (["", "a"], "one is empty"),
    ):
        for rows in (1, 2):
            with pytest.raises(EdgeattnError, match=said):
                session.embed(texts, rows=rows)
    assert session.embed([]).shape == (0, 64)
    with pytest.raises(EdgeattnError, match="0 to 271"):
        session.run([[272]])
    with pytest.raises(EdgeattnError, match="0 to 1"):
        session.run([[1]], token_type_ids=[[2]])
    with pytest.raises(EdgeattnError, match="zeros in each row"):
        session.run([[1, 2]], attention_mask=[[0, 1]])
    with pytest.raises(EdgeattnError, match="a row is all padding"):
        session.run([[1, 2], [3, 4]], attention_mask=[[1, 0], [0, 0]])
    with pytest.raises(EdgeattnError, match="reads texts"):
        session.run_images(np.zeros((1, 3, 32, 32), np.float32))


def test_the_manifest_says_what_it_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["shape"]["kind"] == "encoder"
    assert manifest["shape"]["task"] == "embedding"
    (curve,) = json.loads((bundle / "report.json").read_text())["costs"]
    assert [point["context"] for point in curve["points"]] == [40]
    assert "genai_config.json" not in manifest["files"]
