"""Whole encoders with linear attention in a real TensorRT: one plugin layer per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from encoders import save_encoder

from edgeattn.attention import LionRequest, LionVariant
from edgeattn.devices.registry import parse_target
from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.plugins import plugin_nodes
from edgeattn.engine.profiles import encoder_check_profile, input_shapes
from edgeattn.exporters.export import export_graph
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_model import encoder_of
from edgeattn.planner.encoder_lowering import fit_encoder_lowering
from edgeattn.planner.lowering import plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.transforms.linearize import with_lion

pytestmark = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)


@pytest.mark.parametrize(
    ("name", "variant"), [("bert", "d"), ("eurobert", "s"), ("vit", "lit"), ("vit", "d")]
)
def test_with_the_library_and_without(
    tmp_path: Path, library: Any, name: str, variant: LionVariant
) -> None:
    import onnx

    save_encoder(name, tmp_path / "model")
    checkpoint, target = open_encoder(tmp_path / "model"), parse_target("jetson-orin")
    model = with_lion(encoder_of(checkpoint.shape, checkpoint.weights), LionRequest(variant))
    lowering = plan_lowering(Recipe("jetson-orin"), target)
    lowering = fit_encoder_lowering(lowering, checkpoint.shape, target)
    file = tmp_path / "model.onnx"
    export_graph(model, lowering, file, tmp_path / "model.onnx.data")
    # Which kernel a node needs follows from its head dimension.
    nodes = plugin_nodes(onnx.load(file, load_external_data=False))
    assert [node.shapes[0][-1] for node in nodes] == [32] * 3
    profiles = input_shapes(file, encoder_check_profile(model.shape.max_context, 1))
    for plugins, count in ((library.path, 3), (None, 0)):
        report = check_build(file, sm=86, profiles=profiles, timeout_s=240, plugin_library=plugins)
        assert (report.status, report.reason, report.plugin_layers) == ("built", "", count)
