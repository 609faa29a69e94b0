"""A decoder of linear attention with int8 weights in a real TensorRT, which needs the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.build import BuildOptions, BuildReport, build_engine
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import decoder_profiles, input_shapes
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe

pytestmark = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
CONTEXT = 256
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 272,
    "layer_types": ["linear_attention"],
    "head_dim": 32,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


@pytest.fixture(scope="module")
def exported(random_checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("recurrent") / "bundle"
    recipe = Recipe("rtx-4090", "w8-rtn", attention=("recurrent",), context=CONTEXT)
    export(random_checkpoint(**CONFIG), recipe, path, verify=False, plugins=False)
    return Bundle.open(path).model_file


@pytest.mark.parametrize("sm", [86, 89])
def test_with_the_library(exported: Path, library: Any, sm: int) -> None:
    report = built(exported, sm, BuildOptions(plugin_library=library.path))
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


def test_what_tensorrt_rtx_makes_of_the_body(exported: Path) -> None:
    """Tells when a new one has learnt it, and `tests/test_compositions.py` can build it, too."""
    report = built(exported, 89, BuildOptions())
    assert report.status == "refused"
    assert "MyelinCheckException" in report.reason


def built(model: Path, sm: int, options: BuildOptions) -> BuildReport:
    """With the profiles of `edgeattn build`; no engine is kept."""
    shapes = [input_shapes(model, p) for p in decoder_profiles(CONTEXT, 1, separate=True)]
    flavour = TENSORRT_RTX
    return build_engine(
        model, None, flavour=flavour, sms=(sm,), profiles=shapes, options=options, timeout_s=240
    )
