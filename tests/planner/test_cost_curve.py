"""Curves of cost by context: the planner's own arithmetic, at the contexts a report shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeattn.attention import HeadSparse
from edgeattn.devices.registry import parse_target
from edgeattn.planner.cost_curve import cost_curves
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes, weight_bytes
from edgeattn.recipe import Recipe
from edgeattn.shape import LayerKind, ModelShape

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=128,
    vocab_size=512,
    max_context=2048,
    norm_eps=1e-5,
    layer_cycle=(LayerKind(None),),
)


def lowering(target: str, quant: str = "none", batch: int = 1) -> Lowering:
    return plan_lowering(Recipe(target, quant=quant, batch=batch), parse_target(target))


def test_points_are_the_planners_arithmetic() -> None:
    asked = lowering("jetson-orin", "w8-rtn", batch=3)
    ours, plain = cost_curves(SHAPE, asked, parse_target("jetson-orin"))
    contexts = [point.context for point in ours.points]
    assert contexts == [64, 128, 256, 512, 1024, 2048]
    per_token = 3 * cache_bytes_per_token(SHAPE, asked)
    for point in ours.points:
        assert point.memory_bytes == weight_bytes(SHAPE, asked) + point.context * per_token
        assert point.moved_bytes == read_bytes(SHAPE, asked) + point.context * per_token
    speeds = [point.tokens_per_s for point in ours.points]
    assert None not in speeds
    assert speeds == sorted(speeds, key=lambda speed: -(speed or 0))
    assert plain.label == f"the model in {asked.dtype}"
    assert all(
        p.memory_bytes > o.memory_bytes for p, o in zip(plain.points, ours.points, strict=True)
    )


def test_a_plain_model_has_one_curve_and_a_cpu_no_speed() -> None:
    (only,) = cost_curves(SHAPE, lowering("cpu"), parse_target("cpu"))
    assert {point.tokens_per_s for point in only.points} == {None}


@pytest.mark.parametrize(("groups", "slots"), [(False, 4), (True, 2)])
def test_heads_that_are_left_out_are_not_read(groups: bool, slots: int) -> None:
    half = LayerKind(None, attention=HeadSparse(slots=slots, groups=groups))
    shape, asked = replace(SHAPE, layer_cycle=(LayerKind(None), half)), lowering("jetson-orin")
    ours, plain = cost_curves(shape, asked, parse_target("jetson-orin"))
    last, dense = ours.points[-1], plain.points[-1]
    assert last.memory_bytes == dense.memory_bytes, "the cache stays whole"
    cache = 2048 * cache_bytes_per_token(SHAPE, asked)
    assert dense.moved_bytes - last.moved_bytes == cache // 4, (
        "half of the heads in half the layers"
    )
    assert last.tokens_per_s is not None
    assert dense.tokens_per_s is not None
    assert last.tokens_per_s > dense.tokens_per_s
