"""Curves of an encoder's cost: operations as torch counts them, time by the roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeattn.devices.registry import parse_target
from edgeattn.encoder_shape import EncoderShape, PatchInput, TokenInput
from edgeattn.models.encoder import Encoder
from edgeattn.planner.encoder_cost import attention_operations, encoder_cost_curves
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.planner.roofline import rates_of
from edgeattn.recipe import Recipe
from edgeattn.shape import LayerKind

SHAPE = EncoderShape(
    family="bert",
    input=TokenInput(100, 300, learned_positions=True, token_types=2, norm=True),
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=96,
    norm_eps=1e-12,
    layer_cycle=(LayerKind(None),),
)
ORIN = parse_target("jetson-orin")


def lowering(target: str, quant: str = "none", batch: int = 1) -> Lowering:
    return plan_lowering(Recipe(target, quant=quant, batch=batch), parse_target(target))


def test_operations_are_what_torch_counts() -> None:
    (curve,) = encoder_cost_curves(SHAPE, lowering("cpu", batch=2), parse_target("cpu"))
    assert [point.context for point in curve.points] == [75, 150, 300]
    encoder = Encoder(SHAPE, form="primitive").eval()
    for point in curve.points:
        ids = torch.zeros(2, point.context, dtype=torch.int64)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            encoder(ids, torch.ones_like(ids), ids)
        assert point.operations == counter.get_total_flops()
        assert point.seconds is None


def test_time_is_the_longer_of_computing_and_reading() -> None:
    asked = lowering("jetson-orin")
    rates = rates_of(ORIN, asked)
    assert rates is not None
    assert rates.flops_per_s is not None
    (curve,) = encoder_cost_curves(SHAPE, asked, ORIN)
    matrices = [p.numel() for _, p in Encoder(SHAPE).layers.named_parameters() if p.dim() == 2]
    reading = 2 * sum(matrices) / rates.bytes_per_s  # fp16
    assert curve.points[0].seconds == pytest.approx(reading)
    wide = replace(SHAPE, input=replace(SHAPE.input, max_positions=8192))
    last = encoder_cost_curves(wide, asked, ORIN)[0].points[-1]
    assert last.seconds == pytest.approx(last.operations / rates.flops_per_s)


def test_a_state_grows_with_the_length_and_softmax_with_its_square() -> None:
    """Any attention that is no softmax stands for one with a state."""
    state = replace(SHAPE, layer_cycle=(LayerKind(None, attention=object()),))  # type: ignore[arg-type]
    assert attention_operations(state, 200) == 2 * attention_operations(state, 100)
    assert attention_operations(SHAPE, 200) == 4 * attention_operations(SHAPE, 100)
    # Outer product and product with the state, two directions: where 2 D tokens are, both are even.
    assert attention_operations(state, 32) == attention_operations(SHAPE, 32)
    ours, plain = encoder_cost_curves(state, lowering("cpu"), parse_target("cpu"))
    assert plain == replace(
        encoder_cost_curves(SHAPE, lowering("cpu"), parse_target("cpu"))[0], label=plain.label
    )
    assert ours.points[-1].operations < plain.points[-1].operations


def test_a_quantised_encoder_is_drawn_beside_the_plain_one_and_images_have_no_length() -> None:
    asked = lowering("jetson-orin", "w8-rtn")
    ours, plain = encoder_cost_curves(SHAPE, asked, ORIN)
    assert plain.label == f"the model in {asked.dtype}"
    assert ours.points[0].seconds is not None
    assert plain.points[0].seconds is not None
    assert ours.points[0].seconds < plain.points[0].seconds
    images = replace(SHAPE, input=PatchInput(32, 32, 8, 3))
    assert encoder_cost_curves(images, asked, ORIN) == []
