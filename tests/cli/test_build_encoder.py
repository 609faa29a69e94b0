"""`edgeattn build` and `verify --backend tensorrt` of encoders: each family, texts and images."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from encoders import save_encoder

from edgeattn.engine.flavours import TENSORRT_RTX, Flavour
from edgeattn.engine.record import EngineRecord
from edgeattn.pipeline import build as module
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe

needs_rtx = pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="needs edgeattn[rtx]")
BOTH = ["--target", "rtx-4090", "--target", "rtx-5090"]
# For int4, whose groups of 64 divide its widths.
WIDER = {"eurobert": {"intermediate_size": 128}}
TOKENS = ["--profile", "sequence_length=1:8:16"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function to the bundle of a tiny encoder that is not proven, exported once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, target: str, **fields: Any) -> Path:
        key = (name, target, *sorted(fields.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("encoder")
            save_encoder(name, folder / "model", **WIDER.get(name, {}))
            export(folder / "model", Recipe(target, **fields), folder / "out", verify=False)
            made[key] = folder / "out"
        return made[key]

    return make


@pytest.fixture
def bundle(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function to a copy of such a bundle."""
    return lambda *args, **fields: shutil.copytree(exported(*args, **fields), tmp_path / "bundle")


@needs_rtx
@pytest.mark.parametrize(
    ("name", "quant", "options", "sizes"),
    [
        ("bert", "none", [], {"batch_size": "1:3:3", "sequence_length": "1:10:40"}),
        (
            "eurobert",
            "w4-rtn",
            TOKENS,
            {"batch_size": "1:3:3", "sequence_length": "1:8:16"},
        ),
        ("vit", "w8-rtn", ["--profile", "any.batch_size=2:2:3"], {"batch_size": "2:2:3"}),
        ("dinov2-classifier", "none", [], {"batch_size": "1:3:3"}),
    ],
)
def test_an_engine_for_two_gpus(
    bundle: Callable[..., Path],
    edgeattn: Callable[..., Any],
    name: str,
    quant: str,
    options: list[str],
    sizes: dict[str, str],
) -> None:
    """Patches of an image are as many as they are; rows and tokens vary."""
    path = bundle(name, "rtx-4090", quant=quant, batch=3)
    result = edgeattn("build", path, *BOTH, *options, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["sms"] == [89, 120]
    assert facts["profiles"] == {"any": sizes}
    engine = Path(facts["path"])
    record = EngineRecord.model_validate_json(engine.with_name(f"{engine.name}.json").read_bytes())
    kinds = {layer.precision for layer in record.layer_list}
    assert record.layers == len(record.layer_list) > 50
    assert {q for q in ("INT4", "INT8") if q in kinds} == {
        "none": set(),
        "w4-rtn": {"INT4", "INT8"},
        "w8-rtn": {"INT8"},
    }[quant]
    assert "was there already" in edgeattn("build", path, *BOTH, *options).output


@needs_rtx
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_what_is_built_on_the_device_is_checked_here(
    bundle: Callable[..., Path], edgeattn: Callable[..., Any], name: str
) -> None:
    result = edgeattn("build", bundle(name, "jetson-orin@jetpack6.2"), "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert "parsed and built the graph for SM 86 here: copy" in facts["error"]
    assert facts["check"]["status"] == "built"


@pytest.mark.parametrize(
    ("name", "options", "code", "words"),
    [
        ("bert", ["--profile", "sequence_length=1:1:41"], 1, "1 to 40 tokens in profile any"),
        ("bert", ["--profile", "past_sequence_length=0:1:2"], 2, "did you mean sequence_length"),
        ("bert", ["--profile", "decode.batch_size=1:1:1"], 2, "known optimisation profile"),
        ("vit", ["--profile", "sequence_length=1:1:17"], 2, "known dimension.*: .* batch_size"),
        ("vit", ["--profile", "batch_size=1:1:2"], 1, "1 to 1 rows .* larger --batch"),
        ("vit", ["--target", "cpu"], 1, "cpu@onnxruntime runs the graph itself"),
        ("vit", ["--target", "rtx-4090@trt10.13"], 1, "with standard: export it"),
    ],
)
def test_refused_before_anything_is_built(
    bundle: Callable[..., Path],
    edgeattn: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(module, "build_engine", None)
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)
    path = bundle(name, "rtx-4090")
    result = edgeattn("build", path, *options)
    assert result.exit_code == code
    assert re.search(words, result.output.replace("\n", " ")), result.output
    assert not list(path.glob("engines/*.engine"))
