"""Encoders rotated and quantised on a text or on images: the whole chain, and what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import onnx
import torch
from encoders import inputs_of, save_embedder, save_encoder

from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import EdgeattnError
from edgeattn.pipeline import export, plan_export, plugins, verify_bundle
from edgeattn.planner.estimate import Estimate
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession

needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
WORDS = "It is a truth that a bridge is proven by the load it carries, and a model by its tokens. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 40)
    return file


@pytest.fixture
def images(tmp_path: Path) -> Path:
    file = tmp_path / "images.npy"
    np.save(file, np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32))
    return file


@pytest.fixture
def saved(tmp_path: Path, tiny_checkpoint: Path) -> Callable[[str], Path]:
    """A function from a name to a tiny random checkpoint, with a tokenizer for texts."""

    def save(name: str) -> Path:
        path = tmp_path / name
        if name == "embedder":
            save_embedder(path, tiny_checkpoint / "tokenizer.json")
            return path
        save_encoder(name, path)
        tokenizer = (tiny_checkpoint / "tokenizer.json").read_bytes()
        (path / "tokenizer.json").write_bytes(tokenizer)
        return path

    return save


def nodes(bundle: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(bundle / "model.onnx", load_external_data=False).graph.node)


def count(bundle: Path, op: str) -> int:
    return sum(node.op_type == op for node in nodes(bundle))


@pytest.mark.parametrize(
    ("name", "quant", "rotated", "rounded"),
    [
        ("bert", "w8a8-spinquant", 9, 12),
        ("bert-classifier", "w4a16-spinquant:group=32", 6, 0),
        ("vit", "w8a8-spinquant:online=off", 6, 12),
        ("dinov2-classifier", "w8a8", 0, 12),
        ("eurobert", "w8a8-spinquant:refit=off", 9, 12),
        ("eurobert", "w4a16-gptq:group=32,down_proj=w8", 0, 0),
    ],
)
def test_every_family_is_proven(
    saved: Callable[[str], Path],
    text: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    quant: str,
    rotated: int,
    rounded: int,
) -> None:
    monkeypatch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
    file = images if name.startswith(("vit", "dinov2")) else text
    recipe = Recipe("cpu", quant=quant, calibration=str(file), calibration_windows=4)
    report = export(saved(name), recipe, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.passed
    # in each of three layers: what q, k and v read, what the MLP does, and the down projection
    assert count(tmp_path / "out", "HadamardTransform") == rotated
    assert count(tmp_path / "out", "QuantizeLinear") == rounded
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["transforms"]
    assert notes["calibration"]["windows"] == 4
    assert ("rotation" in notes) == bool(rotated)
    assert verify_bundle(tmp_path / "out", tensorrt=False).passed
    assert not (tmp_path / ".out.layers").exists()


def test_a_wrong_scale_is_found(
    saved: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    changed: Callable[..., Path],
) -> None:
    recipe = Recipe("cpu", quant="w8a8-spinquant", calibration=str(text), calibration_windows=4)
    export(saved("embedder"), recipe, tmp_path / "out")
    assert verify_bundle(tmp_path / "out", tensorrt=False).passed
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "QuantizeLinear")
    scale = next(t for t in graph.graph.initializer if t.name == node.input[1])
    value = onnx.numpy_helper.to_array(scale) * np.float32(1.3)
    scale.CopyFrom(onnx.numpy_helper.from_array(value, scale.name))
    # the integers stand for other numbers than the ones they were made of
    other = next(
        n for n in graph.graph.node if n.op_type == "DequantizeLinear" and node.output[0] in n.input
    )
    other.input[1] = f"{scale.name}_right"
    right = onnx.numpy_helper.from_array(value / np.float32(1.3), other.input[1])
    graph.graph.initializer.append(right)
    wrong = changed(tmp_path / "out", {"model.onnx": graph.SerializeToString()})
    verification = verify_bundle(wrong, tensorrt=False)
    assert not verification.passed
    assert verification.agreements[0].first_bad == "layer 0"


@needs_rtx
@pytest.mark.parametrize(
    ("target", "quant"),
    [("jetson-orin@jetpack6.2", "w8a8-spinquant"), ("l4", "w8a8-spinquant:online=off")],
)
def test_tensorrt_builds_it(
    saved: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    quant: str,
) -> None:
    # All kernels of the library take minutes to compile; those that the graph needs are checked.
    smoke = functools.partial(plugins.build_plugins, subset="smoke")
    monkeypatch.setattr(plugins, "build_plugins", smoke)
    recipe = Recipe(target, quant=quant, calibration=str(text), calibration_windows=4)
    report = export(saved("embedder"), recipe, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.tensorrt is not None
    assert report.verification.tensorrt.status == "built"


def test_stopped_work_goes_on(
    saved: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("embedder")
    recipe = Recipe(
        "cpu", quant="w4a16-spinquant:group=32", calibration=str(text), calibration_windows=4
    )
    export(model, recipe, tmp_path / "whole", verify=False)
    from edgeattn.calibration.store import LayerStore

    write, written = LayerStore.write, list[object]()

    def stopping(self: LayerStore, layer: Any, *rest: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(layer)
        write(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            export(model, recipe, tmp_path / "out", verify=False)
    assert written == [0]
    assert (tmp_path / ".out.layers").exists()
    other = Recipe("cpu", quant="w4a16-gptq:group=32", calibration=str(text), calibration_windows=4)
    with pytest.raises(EdgeattnError, match="to be of this command"):
        export(model, other, tmp_path / "out", verify=False)
    monkeypatch.setattr(
        LayerStore, "write", lambda self, *a: written.append(a[0]) or write(self, *a)
    )
    export(model, recipe, tmp_path / "out", verify=False)
    assert written == [0, 1, 2]
    first, second = (
        (tmp_path / name / "model.onnx.data").read_bytes() for name in ("whole", "out")
    )
    assert first == second


def test_its_vectors_stay_near_those_of_torch(
    saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = saved("embedder")
    export(model, Recipe("cpu"), tmp_path / "plain", verify=False)
    recipe = Recipe("cpu", quant="w8a8-spinquant", calibration=str(text), calibration_windows=8)
    export(model, recipe, tmp_path / "out", verify=False)
    expected, found = (
        EncoderSession.open(tmp_path / name).embed(["a", "It is a truth", WORDS[:30]])
        for name in ("plain", "out")
    )
    assert 0.99 < (expected * found).sum(axis=1).min() < 0.99999


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("w8a8-spinquant:kv=int8", "int8 cache"),
        ("w4a16-spinquant:head=w4", "LM head"),
        ("w4a16-spinquant:rotation=auto", "judged by the next token"),
        ("w4a16-spinquant-learned", "judged by the next token"),
        ("w8a8:keep=20%", "judged by the next token"),
        ("w4a16-spinquant:group=128", "divides the 64 inputs"),
    ],
)
def test_what_is_a_decoders_is_refused(
    saved: Callable[[str], Path], text: Path, tmp_path: Path, quant: str, said: str
) -> None:
    recipe = Recipe("cpu", quant=quant, calibration=str(text))
    with pytest.raises(EdgeattnError, match=r"expected .*, but .*: ") as caught:
        export(saved("embedder"), recipe, tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / ".out.layers").exists()


def test_calibration_that_does_not_do_is_refused(
    saved: Callable[[str], Path], text: Path, images: Path, tmp_path: Path
) -> None:
    def refused(name: str, said: str, **fields: Any) -> None:
        model = tmp_path / name if (tmp_path / name).exists() else saved(name)
        with pytest.raises(EdgeattnError, match=said):
            export(model, Recipe("cpu", quant="w8a8-spinquant", **fields), tmp_path / "out")
        assert not (tmp_path / ".out.layers").exists()

    refused("embedder", "a text that", calibration=None)
    refused("embedder", "UTF-8", calibration=str(images))
    refused("embedder", "a text of 900 windows", calibration=str(text), calibration_windows=900)
    refused("vit", "--calibration-windows 4", calibration=str(images), calibration_windows=5)
    refused("vit", "an array", calibration=str(text), calibration_windows=4)


def test_the_plan_tells_what_calibrating_takes(
    saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = saved("embedder")

    def planned(quant: str, windows: int) -> Estimate:
        recipe = Recipe("cpu", quant=quant, calibration=str(text), calibration_windows=windows)
        return plan_export(model, recipe, tmp_path / "out").estimate

    plain, few, many = (planned(*asked) for asked in (("w8-rtn", 4), ("w8a8", 4), ("w8a8", 400)))
    assert "calibration" not in plain.seconds
    assert many.seconds["calibration"] == pytest.approx(100 * few.seconds["calibration"])
    # two streams of 396 more windows of 40 tokens, 64 + 64 + 96 wide, in fp32
    assert many.memory_bytes - few.memory_bytes == 2 * 396 * 40 * 224 * 4
    # a byte for each of 3 * 28,672 weights in linear layers, and a scale for each of 416 rows
    assert few.disk_bytes - plain.disk_bytes == 3 * (28_672 + 4 * 416)


def test_it_is_not_made_again_from_the_checkpoint(
    saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    model = saved("embedder")
    recipe = Recipe("cpu", quant="w8a8", calibration=str(text), calibration_windows=4)
    export(model, recipe, tmp_path / "out", verify=False)
    with pytest.raises(EdgeattnError, match="w8a8 chose some on a calibration text"):
        verify_bundle(tmp_path / "out", checkpoint=model)


def test_special_tokens_stand_around_every_window(saved: Callable[[str], Path], text: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    from edgeattn.calibration.encoder_windows import encoder_text_windows
    from edgeattn.models.encoder_checkpoint import open_encoder

    checkpoint = open_encoder(saved("embedder"))
    tokenizer = Tokenizer.from_str(checkpoint.text["tokenizer.json"].decode())
    tokenizer.post_processor = TemplateProcessing(
        single="[C] $A [S]", special_tokens=[("[C]", 1), ("[S]", 2)]
    )
    found, about = encoder_text_windows(
        text, tokenizer.to_str().encode(), checkpoint.shape.input, windows=3, length=20
    )
    assert found.shape == (3, 20)
    assert (found[:, 0] == 1).all()
    assert (found[:, -1] == 2).all()
    bare = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    inner = found[1, 1:-1].tolist()
    assert any(bare[i : i + 18] == inner for i in range(len(bare)))
    assert about["length"] == 20


def test_images_are_calibrated_on_as_they_are(images: Path) -> None:
    from edgeattn.calibration.encoder_windows import image_windows
    from edgeattn.encoder_shape import PatchInput

    found, about = image_windows(images, PatchInput(32, 32, 8), windows=3)
    assert torch.equal(found, torch.from_numpy(np.load(images))[:3])
    assert about["length"] == 17
    assert inputs_of("vit")["pixel_values"].shape[1:] == found.shape[1:]
