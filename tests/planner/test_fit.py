"""What a model takes of a device's memory, against exported graphs, engines, and counting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from live_tensors import largest_live_bytes
from model_configs import LLAMA3_8B

from edgeattn.bundle.bundle import WEIGHTS, Bundle
from edgeattn.devices.registry import all_targets, parse_target
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import PREFILL_PIECE
from edgeattn.models.huggingface import shape_from_config
from edgeattn.planner import fit as module
from edgeattn.planner.fit import Choice, MemoryFit, memory_fit, what_fits
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

GB = 1e9
# Wide enough that masks and positions are a small part of a step.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 400}


def fitted(shape: ModelShape, target: str, quant: str = "none", **fields: object) -> MemoryFit:
    lowering = lowered(shape, target, quant, **fields)
    return memory_fit(shape, lowering, parse_target(target).device.memory, available=None)


def lowered(shape: ModelShape, target: str, quant: str = "none", **fields: object) -> Lowering:
    asked = Recipe.from_dict({"target": target, "quant": quant, **fields})
    return fit_lowering(plan_lowering(asked, parse_target(target)), shape, parse_target(target))


@pytest.fixture
def llama() -> ModelShape:
    return shape_from_config(LLAMA3_8B)


@pytest.mark.parametrize("quant", ["none", "w8-rtn"])
def test_weights_are_those_of_a_bundle(
    export_tiny: Callable[..., Path], stories260k: Path, quant: str
) -> None:
    bundle = Bundle.open(export_tiny("jetson-orin", quant, model=stories260k, verify=False))
    graph = onnx.load(bundle.model_file, load_external_data=False).graph
    stored = [
        {entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer
    ]
    places = {
        int(one["offset"]): int(one["length"]) for one in stored if one
    }  # a table has two uses
    counted = sum(places.values())
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    memory = parse_target("jetson-orin").device.memory
    engine = module.ENGINE_BYTES + module.ENGINE_LAYER_BYTES * bundle.shape.num_layers
    fit = memory_fit(bundle.shape, lowering, memory)
    assert fit.weights - engine == pytest.approx(counted, rel=0.01)
    size = bundle.manifest.files[WEIGHTS].bytes
    assert memory_fit(bundle.shape, lowering, memory, stored=size).weights - engine == size


@pytest.mark.parametrize(
    ("target", "quant", "item", "copies"),
    [
        ("jetson-orin", "none", 2, 2),
        ("jetson-orin@jetpack6.2", "w4-rtn", 2, 2),
        ("jetson-orin", "w8a8:kv=int8", 1, 2),
        ("cpu", "none", 4, 1),  # GroupQueryAttention writes in place
        ("cpu", "w8a8:kv=int8", 1, 2),
    ],
)
def test_the_cache_is_counted_row_by_row(
    shape: ModelShape, target: str, quant: str, item: int, copies: int
) -> None:
    context, batch, counted = 700, 3, 0
    for _row in range(batch):
        for _layer in range(shape.num_layers):
            for _part in ("key", "value"):
                counted += shape.num_kv_heads * context * shape.head_dim * item
    fit = fitted(shape, target, quant, context=context, batch=batch)
    assert fit.cache == copies * counted


@pytest.mark.parametrize("target", ["jetson-orin", "jetson-orin@jetpack6.2"])
@pytest.mark.parametrize(("rows", "context"), [(1, 256), (2, 192)])
def test_a_step_is_that_of_the_graph(
    export_tiny: Callable[..., Path],
    random_checkpoint: Callable[..., Path],
    target: str,
    rows: int,
    context: int,
) -> None:
    checkpoint = random_checkpoint("float16", **WIDE)
    bundle = Bundle.open(export_tiny(target, model=checkpoint, verify=False))
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    asked = replace(lowering, context=context, batch=rows)
    found = largest_live_bytes(bundle.model_file, rows=rows, tokens=context, past=0)
    memory = parse_target(target).device.memory
    assert memory_fit(bundle.shape, asked, memory).activations == pytest.approx(found, rel=0.12)
    other = "primitive" if lowering.attention == "standard" else "standard"
    wrong = memory_fit(bundle.shape, replace(asked, attention=other), memory)  # type: ignore[arg-type]
    assert wrong.activations != pytest.approx(found, rel=0.12)


def test_an_engine_is_little_larger_than_its_weights(
    tiny_bundle: Path, shared_traces: None
) -> None:
    if not TENSORRT_RTX.is_available():
        pytest.skip("TensorRT-RTX is not installed (edgeattn[rtx])")
    from edgeattn.verify.verify import check_tensorrt

    bundle = Bundle.open(tiny_bundle)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    report = check_tensorrt(bundle.model_file, lowering, bundle.shape)
    assert report is not None
    assert report.engine_bytes is not None
    more = report.engine_bytes - bundle.manifest.files[WEIGHTS].bytes
    limit = module.ENGINE_BYTES + module.ENGINE_LAYER_BYTES * bundle.shape.num_layers
    assert limit / 10 < more < limit


def test_pieces_of_a_prompt_are_those_engines_are_built_for() -> None:
    assert module.PREFILL_TOKENS == PREFILL_PIECE


@pytest.mark.parametrize(
    ("target", "quant", "context", "runs", "builds", "needed"),
    [
        # Llama 3 8B, in GB.
        ("jetson-orin-nano-8gb", "none", 8192, False, False, 20.4),
        ("jetson-orin-nano-8gb", "w4-rtn", 8192, False, False, 9.1),
        ("jetson-orin-nano-8gb", "w4-rtn", 2048, True, False, 7.5),
        ("jetson-orin-nano-8gb@jetpack6.2", "w4-rtn", 8192, False, False, 10.1),
        ("jetson-orin-nx-16gb", "w4-rtn", 8192, True, False, 9.1),
        ("jetson-orin-agx-64gb", "none", 8192, True, True, 20.4),
        ("jetson-orin-agx-64gb", "w4-rtn", 8192, True, True, 9.1),
        ("t4", "none", 1024, False, True, 17.1),
        ("t4", "w8-rtn", 8192, True, True, 10.9),
        ("l4", "none", 8192, True, True, 18.9),
    ],
)
def test_llama3(
    llama: ModelShape,
    target: str,
    quant: str,
    context: int,
    runs: bool,
    builds: bool,
    needed: float,
) -> None:
    fit = fitted(llama, target, quant, context=context)
    assert (fit.runs, fit.building <= fit.device) == (runs, builds)
    assert fit.fits is (runs and builds)
    assert fit.needed / GB == pytest.approx(needed, abs=0.1)


def test_smollm2_fits_the_smallest_board(shape: ModelShape) -> None:
    for target in ("jetson-orin-nano-4gb", "jetson-orin-nano-8gb@jetpack6.2"):
        fit = fitted(shape, target, "w4-rtn")
        assert fit.fits
        assert fit.loading < fit.device


def test_memory_of_its_own_holds_neither_system_nor_file_nor_builder(llama: ModelShape) -> None:
    own, shared = (fitted(llama, target, "w8-rtn") for target in ("l4", "jetson-orin"))
    assert (own.system, own.building, own.loading) == (0, 0, own.weights + own.runtime)
    assert shared.system == module.SYSTEM_BYTES
    assert shared.loading == 2 * shared.weights + shared.runtime + shared.system
    assert shared.building == own.build + shared.system > 0


def test_a_cpu_takes_what_this_machine_has(shape: ModelShape) -> None:
    needed = memory_fit(shape, lowered(shape, "cpu"), None, available=2**40).needed
    for available, fits in ((needed, True), (needed - 1, False)):
        fit = memory_fit(shape, lowered(shape, "cpu"), None, available=available)
        assert (fit.fits, fit.runtime, fit.system, fit.building) == (fits, 0, 0, 0)
    half = memory_fit(shape, lowered(shape, "cpu", dtype="fp16"), None, available=1)
    assert half.weights == pytest.approx(  # which is computed in fp32 there
        memory_fit(shape, lowered(shape, "cpu"), None, available=1).weights, rel=0.05
    )


def test_the_last_logits_are_fewer(shape: ModelShape) -> None:
    every, last = (fitted(shape, "l4", logits=which) for which in ("all", "last"))
    assert every.logits == module.PREFILL_TOKENS * last.logits == 512 * 49152 * 2


def check(shape: ModelShape, recipe: Recipe, choice: Choice) -> MemoryFit:
    target = parse_target(choice.target)
    asked = replace(
        recipe, target=target.name, quant=choice.quant, context=choice.context, batch=choice.batch
    )
    lowering = fit_lowering(plan_lowering(asked, target), shape, target)
    return memory_fit(shape, lowering, target.device.memory)


@pytest.mark.parametrize("target", [t for t in all_targets() if t.device.memory], ids=str)
def test_what_is_advised_fits_and_no_longer_context_does(llama: ModelShape, target: object) -> None:
    name = target.name  # type: ignore[attr-defined]
    recipe = Recipe(name, batch=4, context=8192)
    choices = what_fits(llama, recipe, parse_target(name))
    assert choices
    for choice in choices:
        fit = check(llama, recipe, choice)
        assert fit.fits
        assert (fit.needed, fit.device) == (choice.needed, choice.device)
        if choice.context < 8192 and choice.target == name:
            assert not check(llama, recipe, replace(choice, context=2 * choice.context)).fits


@pytest.mark.parametrize(
    ("target", "batch", "expected"),
    [
        # The board has no room for the build, the next larger one that has is named.
        ("jetson-orin-nano-8gb", 1, [("jetson-orin-agx-32gb@jetpack7.2", "w8-rtn", 8192, 1)]),
        # No int4 on a T4.
        ("t4", 1, [("t4@trt11", "w8-rtn", 8192, 1)]),
        ("t4", 8, [("t4@trt11", "w8-rtn", 2048, 8)]),
        ("l4", 1, [("l4@trt11", "none", 8192, 1), ("l4@trt11", "w8-rtn", 8192, 1),
                   ("l4@trt11", "w4-rtn", 8192, 1)]),
    ],
)  # fmt: skip
def test_what_is_advised(
    llama: ModelShape, target: str, batch: int, expected: list[tuple[str, str, int, int]]
) -> None:
    choices = what_fits(llama, Recipe(target, batch=batch), parse_target(target))
    found = [(c.target, c.quant, c.context, c.batch) for c in choices]
    assert [one for one in found if one[1] in ("none", "w8-rtn", "w4-rtn")] == expected


def test_nothing_helps_a_model_larger_than_every_board(llama: ModelShape) -> None:
    huge = replace(llama, num_layers=2_000)
    assert what_fits(huge, Recipe("jetson-orin"), parse_target("jetson-orin")) == []


def test_json(llama: ModelShape) -> None:
    fit = fitted(llama, "jetson-orin-nano", "w4-rtn", context=2048)
    values = json.loads(json.dumps(fit.to_dict()))
    assert (values["runs"], values["fits"], values["needed"]) == (True, False, fit.needed)
