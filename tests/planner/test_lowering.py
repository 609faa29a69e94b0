"""Every target x software x scheme x dtype through `plan_lowering`, and its rules by table."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from edgeattn.devices.registry import Target, all_targets, parse_target
from edgeattn.errors import LoweringError
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.planner.memory import weight_bytes
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import DTYPES, Recipe
from edgeattn.shape import LayerKind, ModelShape, Rope

ROTARY = (LayerKind(Rope(64, 1e5)),)
SMOLLM2 = ModelShape(
    "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, ROTARY, tied_embeddings=True
)
QUANTS = [*SCHEMES, "w4-rtn:group=32", "w4-rtn:group=128"]


def plan(target: str, quant: str = "none", dtype: str | None = None) -> Lowering:
    return plan_lowering(Recipe(target, quant, dtype), parse_target(target))


def fit(shape: ModelShape, target: str, quant: str) -> Lowering:
    return fit_lowering(plan(target, quant), shape, parse_target(target))


def lowered_or_reason(recipe: Recipe, target: Target) -> Lowering | str:
    try:
        return plan_lowering(recipe, target)
    except LoweringError as error:
        return str(error)


def test_every_combination_is_lowered_or_refused_with_a_reason() -> None:
    for target, quant, dtype in itertools.product(all_targets(), QUANTS, [None, *DTYPES]):
        lowering = lowered_or_reason(Recipe(target.name, quant, dtype), target)
        if isinstance(lowering, str):
            assert target.name in lowering
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
        ("cpu", "none", ("fp32", 23, "group-query", "gather-dequantize", None)),
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
    narrow = ModelShape("llama", 2, 96, 4, 4, 24, 172, 100, 512, 1e-5, (LayerKind(Rope(24, 1e4)),))
    with pytest.raises(LoweringError, match=r"96 inputs of self_attn\.q_proj"):
        fit(narrow, "cpu", "w4-rtn")
    with pytest.raises(LoweringError, match=r"172 inputs of mlp\.down_proj"):
        fit(narrow, "cpu", "w4-rtn:group=32")


def test_a_context_beyond_the_checkpoint_is_refused() -> None:
    target = parse_target("cpu")
    lowering = plan_lowering(Recipe("cpu", context=9000), target)
    with pytest.raises(LoweringError, match="at most 8192"):
        fit_lowering(lowering, SMOLLM2, target)


@pytest.mark.parametrize(
    ("target", "head_dim", "form"),
    [
        ("l4", 64, "standard"),
        ("l4", 8, "primitive"),
        ("l4", 320, "primitive"),
        ("cpu", 16, "group-query"),
        ("cpu", 24, "standard"),
    ],
)
def test_attention_without_a_kernel_is_spelled_out(target: str, head_dim: int, form: str) -> None:
    assert fit(with_heads(head_dim), target, "none").attention == form


@pytest.mark.parametrize(
    ("context", "form", "cache"),
    [
        (None, "standard", "concat"),
        (64, "group-query", "shared-buffer"),
        (65, "standard", "concat"),
    ],
)
def test_a_window_takes_the_cpu_off_its_fast_path_unless_the_context_fits_in_it(
    context: int | None, form: str, cache: str
) -> None:
    shape = replace(SMOLLM2, layer_cycle=(*ROTARY, LayerKind(Rope(64, 1e5), window=64)))
    target = parse_target("cpu")
    lowering = fit_lowering(plan_lowering(Recipe("cpu", context=context), target), shape, target)
    assert (lowering.attention, lowering.kv_cache) == (form, cache)
    assert fit(shape, "l4", "none").attention == "standard"


def test_a_rotated_part_of_odd_width_takes_the_cpu_off_its_fast_path() -> None:
    partly = replace(SMOLLM2, layer_cycle=(LayerKind(Rope(48, 1e5)), LayerKind(Rope(40, 1e5))))
    assert fit(partly, "cpu", "none").attention == "standard"
    assert fit(replace(partly, num_layers=1), "cpu", "none").attention == "group-query"


def with_heads(head_dim: int) -> ModelShape:
    return replace(SMOLLM2, head_dim=head_dim, layer_cycle=(LayerKind(Rope(head_dim, 1e5)),))


def test_a_lowering_survives_the_manifest() -> None:
    lowering = plan("l4", "w4-rtn:group=128")
    assert Lowering.from_dict(json.loads(json.dumps(lowering.to_dict()))) == lowering


def test_parameters_and_bytes_of_a_known_model() -> None:
    assert SMOLLM2.num_parameters == 134_515_008  # as the model's page states
    assert weight_bytes(SMOLLM2, plan("jetson-orin")) == 2 * 134_515_008 + 4 * 32
