"""Every target x software x scheme x dtype through `plan_lowering`, and its rules by table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from edgeattn.devices.registry import Target, all_targets, parse_target
from edgeattn.errors import LoweringError
from edgeattn.planner.estimate import weight_file_bytes
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


def with_mlp(width: int) -> ModelShape:
    return ModelShape("llama", 2, 64, 4, 2, 16, width, 272, 256, 1e-5, (LayerKind(Rope(16, 1e4)),))


@pytest.mark.parametrize("scheme", ["w4-rtn", "w4a16-gptq", "w4a16-spinquant"])
def test_a_down_projection_that_no_group_divides_may_be_int8(scheme: str) -> None:
    with pytest.raises(LoweringError, match=r"172 inputs of mlp\.down_proj") as caught:
        fit(with_mlp(172), "cpu", f"{scheme}:group=32")
    assert "down_proj=w8" in str(caught.value)
    assert "\n" not in str(caught.value)
    fit(with_mlp(172), "cpu", f"{scheme}:group=32,down_proj=w8")
    fit(with_mlp(172), "cpu", "w8a8-spinquant")


def test_where_another_layer_does_not_divide_int8_down_projections_are_no_way_out() -> None:
    narrow = replace(with_mlp(128), hidden_size=80)
    with pytest.raises(LoweringError, match="80 inputs") as caught:
        fit(narrow, "cpu", "w4-rtn:group=32,down_proj=w8")
    assert "down_proj=w8, " not in str(caught.value)
    assert "w8-rtn" in str(caught.value)


@pytest.mark.parametrize("quant", ["w4a16-spinquant", "w4a16-spinquant-learned", "w8a8-spinquant"])
@pytest.mark.parametrize("target", ["cpu", "jetson-orin", "l4"])
def test_rotations_and_norms_of_what_is_added_are_refused(target: str, quant: str) -> None:
    shape = replace(SMOLLM2, family="gemma2", output_norms=True)
    with pytest.raises(LoweringError, match="family gemma2 normalises"):
        fit(shape, target, quant)
    fit(shape, target, "w8a8")


@pytest.mark.parametrize("quant", ["w8a8", "w8a8-spinquant", "w4a16-spinquant:down_proj=w8"])
def test_schemes_with_calibration_survive_the_manifest(quant: str) -> None:
    lowering = plan("jetson-orin", quant)
    assert Lowering.from_dict(json.loads(json.dumps(lowering.to_dict()))) == lowering


def test_bytes_of_a_rotated_model_by_hand() -> None:
    """Per block: q, o [64, 64], k, v [32, 64], gate, up [172, 64] int4; down [64, 172] int8."""
    shape = replace(with_mlp(172), tied_embeddings=True)
    quant = "w4a16-spinquant:group=32,down_proj=w8"
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 172 * 64
    int4 = weights // 2 + weights // 32 * 4
    int8 = 64 * 172 + 64 * 4 + 64
    table = 272 * 64 + 272 * 4 + 272
    rotary = 2 * 256 * 8 * 4
    norms = (2 * 2 + 1) * 64 * 4
    expected = 2 * (int4 + int8) + 2 * table + norms + rotary
    assert weight_bytes(shape, fit(shape, "cpu", quant)) == expected
    once = quant.replace("spinquant", "gptq")
    assert weight_bytes(shape, fit(shape, "cpu", once)) == expected - table
    untied = replace(shape, tied_embeddings=False)
    assert weight_bytes(untied, fit(untied, "cpu", once)) == expected


FILES = {
    "cpu": ("cpu", "w4a16-spinquant:group=32,down_proj=w8", True),
    "cpu-untied": ("cpu", "w4a16-spinquant:group=32,down_proj=w8", False),
    "cpu-not-rotated": ("cpu", "w4a16-gptq:group=32,down_proj=w8", True),
    "cpu-online": ("cpu", "w8a8-spinquant", True),
    "jetson": ("jetson-orin", "w4a16-spinquant:group=64,down_proj=w8", True),
    "jetson-not-rotated": ("jetson-orin", "w4-rtn:down_proj=w8", True),
}


@pytest.mark.parametrize("name", FILES)
def test_bytes_are_those_that_are_written(
    random_checkpoint: Callable[..., Path], shared_traces: None, tmp_path: Path, name: str
) -> None:
    """With a head of its own and int8 down projections; rotating at run time takes no more."""
    pytest.importorskip("torch")
    from edgeattn.exporters.export import export_graph
    from edgeattn.models.checkpoint import open_checkpoint
    from edgeattn.models.model import TORCH_DTYPES, model_of
    from edgeattn.transforms.fuse import fuse_projections
    from edgeattn.transforms.quantize import quantize
    from edgeattn.transforms.rotate import hadamard_rotations, rotate

    target, quant, tied = FILES[name]
    path = random_checkpoint(intermediate_size=172, tie_word_embeddings=tied)
    model = model_of(open_checkpoint(path))
    shape, lowering = model.shape, fit(model.shape, target, quant)
    scheme = lowering.scheme
    if scheme.rotation != "none":
        model = rotate(model, hadamard_rotations(shape, online=scheme.online))
    model = quantize(model, scheme, scale_dtype=TORCH_DTYPES[lowering.dtype])
    if lowering.attention == "group-query":
        model = fuse_projections(model)
    weights = tmp_path / "model.onnx.data"
    export_graph(model, lowering, tmp_path / "model.onnx", weights)
    written = weights.stat().st_size
    assert weight_file_bytes(shape, lowering) == pytest.approx(written, abs=2 * 4096)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {
        tuple((entry.key, entry.value) for entry in tensor.external_data)
        for tensor in proto.graph.initializer
        if tensor.external_data
    }
    stored = sum(int(dict(place)["length"]) for place in places)
    assert weight_bytes(shape, lowering) == stored


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


KV_SCHEMES = ["w4a16-gptq", "w4a16-spinquant", "w8a8", "w8a8-spinquant"]


def cached(quant: str, kv: str) -> str:
    return f"{quant}{',' if ':' in quant else ':'}kv={kv}"


@pytest.mark.parametrize("quant", KV_SCHEMES)
def test_an_int8_cache_takes_the_cpu_off_its_fast_path(quant: str) -> None:
    """GroupQueryAttention writes its cache in place, in the dtype it computes in."""
    fast, joined = (fit(SMOLLM2, "cpu", cached(quant, kv)) for kv in ("float", "int8"))
    assert (fast.attention, fast.kv_cache) == ("group-query", "shared-buffer")
    assert (joined.attention, joined.kv_cache) == ("standard", "concat")
    assert joined.opset >= 23, "Attention exists from opset 23 on"
    rest = replace(joined, attention=fast.attention, kv_cache=fast.kv_cache, scheme=fast.scheme)
    assert rest == fast


@pytest.mark.parametrize("quant", KV_SCHEMES)
@pytest.mark.parametrize("target", ["jetson-orin", "jetson-orin@jetpack6.2", "l4"])
def test_where_caches_are_joined_anyway_int8_changes_nothing(target: str, quant: str) -> None:
    plain, joined = (fit(SMOLLM2, target, cached(quant, kv)) for kv in ("float", "int8"))
    assert joined.kv_cache == "concat"
    assert replace(joined, scheme=plain.scheme) == plain


def test_every_target_that_takes_a_scheme_takes_it_with_an_int8_cache() -> None:
    for target, quant in itertools.product(all_targets(), KV_SCHEMES):
        plain, joined = (
            lowered_or_reason(Recipe(target.name, cached(quant, kv)), target)
            for kv in ("float", "int8")
        )
        assert isinstance(plain, str) == isinstance(joined, str), target.name
        if isinstance(joined, Lowering):
            assert joined.attention != "group-query"
            assert joined.kv_cache == "concat"


@pytest.mark.parametrize("target", ["cpu", "jetson-orin"])
def test_an_int8_cache_survives_the_manifest(target: str) -> None:
    lowering = plan(target, "w8a8-spinquant:kv=int8")
    found = Lowering.from_dict(json.loads(json.dumps(lowering.to_dict())))
    assert found == lowering
    assert found.scheme.kv_bits == 8


@pytest.mark.parametrize("target", ["cpu", "jetson-orin"])
def test_an_int8_cache_adds_no_weights(target: str) -> None:
    """Scales and rotations lie in the graph; only the tables of the fast path are gone."""
    plain, joined = (fit(SMOLLM2, target, cached("w8a8", kv)) for kv in ("float", "int8"))
    tables = 2 * 8192 * 32 * 4 - 32 * 4 if target == "cpu" else 0
    assert weight_bytes(SMOLLM2, plain) - weight_bytes(SMOLLM2, joined) == tables


def static(target: str, quant: str = "none", **fields: object) -> Lowering:
    recipe = Recipe.from_dict({"target": target, "quant": quant, "kv_cache": "static", **fields})
    return fit_lowering(plan_lowering(recipe, parse_target(target)), SMOLLM2, parse_target(target))


@pytest.mark.parametrize("target", ["cpu", "jetson-orin", "l4", "rtx-4090", "rtx-5090", "t4"])
def test_a_static_cache_has_an_opset_and_a_capacity(target: str) -> None:
    lowering = static(target)
    assert (lowering.kv_cache, lowering.attention, lowering.opset) == ("static", "standard", 24)
    assert lowering.context == 8192, "the checkpoint's own"
    assert static(target, context=512).context == 512
    assert not lowering.packs_cache


@pytest.mark.parametrize(
    ("target", "fields", "reason"),
    [
        ("jetson-orin@jetpack6.2", {}, "jetpack6.2 has tensorrt 10.3"),
        ("l4@trt10.14", {}, "l4@trt10.14 has tensorrt 10.14"),
        ("cpu", {"attention": ["head-sparse:density=0.75"]}, "packs each row's keys at the front"),
        ("jetson-orin", {"quant": "w8a8:kv=int8"}, "int8, which tensorrt does not scatter"),
        ("cpu", {"context": 9000}, "at most 8192 tokens"),
    ],
)
def test_a_static_cache_is_refused(target: str, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(LoweringError, match=reason):
        static(target, **fields)


def test_a_static_cache_of_int8_on_the_cpu() -> None:
    lowering = static("cpu", "w8a8:kv=int8")
    assert (lowering.kv_cache, lowering.scheme.kv_bits) == ("static", 8)
