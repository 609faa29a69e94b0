"""Every target x software x scheme x dtype through `plan_lowering`, and its rules by table."""

from __future__ import annotations

import itertools

import pytest

from edgeattn.devices.registry import all_targets, parse_target
from edgeattn.errors import LoweringError
from edgeattn.planner.lowering import Lowering, check_shape, plan_lowering
from edgeattn.planner.memory import weight_bytes
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import DTYPES, Recipe
from edgeattn.shape import ModelShape

SMOLLM2 = ModelShape(
    "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, tied_embeddings=True
)
QUANTS = [*SCHEMES, "w4-rtn:group=32", "w4-rtn:group=128"]


def plan(target: str, quant: str = "none", dtype: str | None = None) -> Lowering:
    return plan_lowering(Recipe(target, quant, dtype), parse_target(target))


def test_every_combination_is_lowered_or_refused_with_a_reason() -> None:
    for target, quant, dtype in itertools.product(all_targets(), QUANTS, [None, *DTYPES]):
        recipe = Recipe(target.name, quant, dtype)
        try:
            lowering = plan_lowering(recipe, target)
        except LoweringError as error:
            assert target.name in str(error)
            continue
        assert lowering.opset <= 23
        assert (lowering.rtx_sm is None) == (target.flavour == "onnxruntime")
        if 4 in lowering.scheme.weight_bits:
            assert lowering.opset >= 21, "int4 exists from opset 21 on"
        if lowering.attention == "standard":
            assert lowering.opset >= 23, "Attention exists from opset 23 on"


@pytest.mark.parametrize(
    ("target", "quant", "expected"),
    [
        ("cpu", "none", ("fp32", 23, "standard", "gather-dequantize", None)),
        ("jetson-orin", "none", ("fp16", 23, "standard", "dequantize-gather", 86)),
        ("jetson-orin@jetpack6.2", "none", ("fp16", 20, "primitive", "dequantize-gather", 86)),
        ("jetson-orin@jetpack6.2", "w4-rtn", ("fp16", 21, "primitive", "dequantize-gather", 86)),
        ("l4", "w4-rtn:group=128", ("fp16", 23, "standard", "dequantize-gather", 89)),
        ("t4", "w8-rtn", ("fp16", 23, "standard", "dequantize-gather", 75)),
    ],
)
def test_lowering_table(target: str, quant: str, expected: tuple[object, ...]) -> None:
    low = plan(target, quant)
    assert (low.dtype, low.opset, low.attention, low.embedding, low.rtx_sm) == expected


@pytest.mark.parametrize(
    ("target", "quant", "dtype", "reason"),
    [
        ("t4", "w4-rtn", None, "SM75"),
        ("t4", "none", "bf16", "dtype"),
        ("jetson-orin", "w4-rtn:group=32", None, "a group of 64 or 128"),
        ("jetson-orin@jetpack7.2", "none", "fp32", "dtype"),
    ],
)
def test_refusal_table(target: str, quant: str, dtype: str | None, reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        plan(target, quant, dtype)


def test_a_group_that_does_not_divide_is_refused_by_layer() -> None:
    narrow = ModelShape("llama", 2, 96, 4, 4, 24, 172, 100, 512, 1e-5, 1e4)
    with pytest.raises(LoweringError, match="96 inputs of self_attn.q_proj"):
        check_shape(plan("cpu", "w4-rtn"), narrow)
    with pytest.raises(LoweringError, match="172 inputs of mlp.down_proj"):
        check_shape(plan("cpu", "w4-rtn:group=32"), narrow)


def test_a_context_beyond_the_checkpoint_is_refused() -> None:
    lowering = plan_lowering(Recipe("cpu", context=9000), parse_target("cpu"))
    with pytest.raises(LoweringError, match="at most 8192"):
        check_shape(lowering, SMOLLM2)


def test_parameters_and_bytes_of_a_known_model() -> None:
    assert SMOLLM2.num_parameters == 134_515_008  # as the model's page states
    assert weight_bytes(SMOLLM2, plan("jetson-orin")) == 2 * 134_515_008 + 4 * 32
