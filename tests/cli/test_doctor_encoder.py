"""`edgeattn doctor` of encoders, what it says they take, and the commands that are for decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from encoders import save_encoder
from live_tensors import largest_live_bytes

from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.registry import parse_target
from edgeattn.pipeline import export
from edgeattn.planner.fit import memory_fit
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A function to a tiny encoder's bundle, its checkpoint beside it; exported once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, target: str) -> Path:
        if (name, target) not in made:
            folder = tmp_path_factory.mktemp("encoder")
            save_encoder(name, folder / "model")
            export(folder / "model", Recipe(target, batch=2), folder / "out", verify=False)
            made[name, target] = folder / "out"
        return made[name, target]

    return make


def findings(edgeattn: Callable[..., Any], *words: object) -> dict[str, dict[str, str]]:
    result = edgeattn("doctor", *words, "--json")
    return {found["about"]: found for found in json.loads(result.stdout)["findings"]}


@pytest.mark.parametrize("target", ["jetson-orin", "jetson-orin@jetpack6.2"])
@pytest.mark.parametrize("name", ["bert", "vit", "eurobert"])
def test_a_step_is_that_of_the_graph(exported: Exported, name: str, target: str) -> None:
    """One layer has it all; ONNX's own shapes of the exported graph say what is alive together."""
    bundle = Bundle.open(exported(name, target))
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    tokens = bundle.encoder_shape.max_context
    found = largest_live_bytes(bundle.model_file, rows=2, tokens=tokens, past=0)
    fit = memory_fit(bundle.encoder_shape, lowering, parse_target(target).device.memory)
    assert fit.activations == pytest.approx(found, rel=0.15)
    one_row = memory_fit(bundle.encoder_shape, replace(lowering, batch=1), None)
    assert one_row.activations != pytest.approx(found, rel=0.15)
    assert fit.cache == 0


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_bundle(exported: Exported, edgeattn: Callable[..., Any], name: str) -> None:
    path = exported(name, "jetson-orin")
    found = findings(edgeattn, path)
    assert found["support"]["level"] == found["memory"]["level"] == "ok"
    tokens = 40 if name == "bert" else 17
    assert f"at {tokens} tokens in 2 rows" in found["memory"]["found"]
    assert "cache" not in found["memory"]["found"]
    assert found["engines"]["found"] == "none is built yet"
    assert findings(edgeattn, path, "--batch", 3)["batch"]["level"] == "problem"
    context = findings(edgeattn, path, "--context", 50)["context"]
    asked = "50 tokens are asked for, the bundle is for 40"
    assert context["found"] == (asked if name == "bert" else "an image is always 17 tokens")
    other = findings(edgeattn, path, "--target", "jetson-orin@jetpack6.2")["support"]
    assert other["level"] == "problem"
    assert "attention primitive" in other["found"]


@pytest.mark.parametrize("name", ["bert", "vit", "eurobert"])
def test_a_checkpoint(exported: Exported, edgeattn: Callable[..., Any], name: str) -> None:
    model = exported(name, "jetson-orin").parent / "model"
    found = findings(edgeattn, model, "--target", "jetson-orin", "--quant", "w8-rtn")
    assert "3 layers" in found["model"]["found"]
    assert found["support"]["found"].startswith("fp16, w8-rtn, standard attention, opset")
    refused = findings(edgeattn, model, "--target", "jetson-orin", "--quant", "w4-rtn")
    assert refused["support"]["level"] == "problem"  # groups of 64 do not divide 96


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan"], "is an encoder: use edgeattn export or edgeattn doctor"),
        (["quantize", "--quant", "w8-rtn", "--output"], "is an encoder: use edgeattn export"),
        (
            ["calibrate", "--attention", "fft-rope", "--text", __file__, "--output"],
            "is an encoder: use edgeattn export",
        ),
    ],
)
@pytest.mark.parametrize("name", ["bert", "vit.onnx"])
def test_commands_for_decoders_say_so(
    exported: Exported,
    edgeattn: Callable[..., Any],
    tmp_path: Path,
    name: str,
    words: list[str],
    expected: str,
) -> None:
    """Of an ONNX file, too, which only encoders come in."""
    model = exported("bert", "jetson-orin").parent / "model"
    if name.endswith(".onnx"):
        model = tmp_path / name
        model.write_bytes(b"")
    output = [tmp_path / "out"] if "--output" in words else []
    target = ["--target", "jetson-orin"] if words == ["plan"] else []
    result = edgeattn(words[0], model, *words[1:], *output, *target)
    assert result.exit_code == 1
    assert expected in result.output.replace("\n", " "), result.output
    assert result.output.count("edgeattn: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["run", "-p", "a"], ["eval", "--text", "TEXT"]], ids=["run", "eval"]
)
def test_commands_for_bundles_of_decoders_say_so(
    exported: Exported, edgeattn: Callable[..., Any], tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "text").write_text("It is a truth")
    words = [str(tmp_path / "text") if word == "TEXT" else word for word in words]
    result = edgeattn(words[0], exported("bert", "jetson-orin"), *words[1:])
    assert result.exit_code == 1
    assert "it is an encoder, which generates no tokens" in result.output.replace("\n", " ")
