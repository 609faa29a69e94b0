"""Whole decoders with an attention variant in a real TensorRT: one plugin layer per such layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from attention_models import with_fft_rope, with_head_sparse

from edgeattn.devices.registry import parse_target
from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import check_profile, input_shapes
from edgeattn.errors import LoweringError
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, model_of
from edgeattn.planner.lowering import fit_lowering, plan_lowering
from edgeattn.recipe import Recipe

pytestmark = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
VARIANTS: dict[str, Callable[[Model], Model]] = {
    "fft-rope": with_fft_rope,
    "head-sparse:density=0.5": lambda model: with_head_sparse(model, 2),
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: Any
) -> tuple[Path, dict[str, Any], int]:
    """A graph, the shapes it is built for, and how many of its layers have the variant."""
    target = parse_target("jetson-orin")
    model = model_of(open_checkpoint(tiny_checkpoint))
    recipe = Recipe("jetson-orin", attention=(request.param,), context=128, batch=2)
    lowering = fit_lowering(plan_lowering(recipe, target), model.shape, target)
    model = VARIANTS[request.param](model)
    folder = tmp_path_factory.mktemp("variant")
    export_graph(model, lowering, folder / "model.onnx", folder / "model.onnx.data")
    profiles = input_shapes(folder / "model.onnx", check_profile(128, 2))
    return folder / "model.onnx", profiles, model.shape.num_layers - 1


@pytest.mark.parametrize("sm", [80, 86, 89, 120])
def test_with_the_library_and_without(
    exported: tuple[Path, dict[str, Any], int], library: Any, sm: int
) -> None:
    model, profiles, layers = exported
    for plugins, count in ((library.path, layers), (None, 0)):
        report = check_build(model, sm=sm, profiles=profiles, timeout_s=240, plugin_library=plugins)
        assert (report.status, report.reason, report.plugin_layers) == ("built", "", count)


def test_as_a_parser_reads_it_that_prefers_function_bodies(
    exported: tuple[Path, dict[str, Any], int], library: Any
) -> None:
    """Of TensorRT up to 10.6: the bodies are taken away, so there must be a library."""
    model, profiles, layers = exported
    stripped = {"sm": 86, "profiles": profiles, "timeout_s": 240, "strip_functions": True}
    report = check_build(model, plugin_library=library.path, **stripped)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", layers)
    with pytest.raises(LoweringError, match=r"no function body.*no plugin library was given"):
        check_build(model, **stripped)
