"""Sizes and memory against real bundles; of the seconds only what must hold on any machine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeattn.bundle.bundle import GOLDEN, MODEL, WEIGHTS, Bundle
from edgeattn.devices.registry import all_targets, parse_target
from edgeattn.errors import LoweringError
from edgeattn.planner import estimate as module
from edgeattn.planner.estimate import Estimate, estimate
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

# Large enough that the tables of arrays and names are a small part of the bundle.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 4000}


def lowered(shape: ModelShape, target: str, quant: str = "none", **fields: object) -> Lowering:
    asked = Recipe.from_dict({"target": target, "quant": quant, **fields})
    return fit_lowering(plan_lowering(asked, parse_target(target)), shape, parse_target(target))


def sizes(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("target", "quant", "config"),
    [
        ("cpu", "none", {}),
        ("cpu", "w8-rtn", WIDE),
        ("cpu", "w4-rtn", {**WIDE, "tie_word_embeddings": False}),
        ("jetson-orin", "none", WIDE),
        ("jetson-orin@jetpack6.2", "w8-rtn", {}),
        ("jetson-orin static", "none", WIDE),
        ("cpu static", "none", {}),
    ],
)
def test_sizes_are_those_of_the_bundle(
    export_tiny: Callable[..., Path],
    random_checkpoint: Callable[..., Path],
    target: str,
    quant: str,
    config: dict[str, int],
) -> None:
    target, _, kv_cache = target.partition(" ")
    asked = {"kv_cache": kv_cache} if kv_cache else {}
    bundle = Bundle.open(export_tiny(target, quant, model=random_checkpoint(**config), **asked))
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    found = sizes(bundle.path)
    text = found["tokenizer.json"]
    expected = estimate(bundle.shape, lowering, text_bytes=text)
    assert expected.weight_bytes == pytest.approx(found[WEIGHTS], abs=4096)
    assert expected.graph_bytes == pytest.approx(found[MODEL], rel=0.2)
    assert module.golden_bytes(bundle.shape, lowering) == pytest.approx(found[GOLDEN], rel=0.05)
    assert expected.disk_bytes == pytest.approx(sum(found.values()), rel=0.03)


def test_without_a_proof_there_is_less(
    export_tiny: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    bundle = Bundle.open(export_tiny("cpu", verify=False))
    found = sizes(bundle.path)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    text = found["tokenizer.json"]
    expected = estimate(bundle.shape, lowering, text_bytes=text, verify=False)
    assert expected.disk_bytes == pytest.approx(sum(found.values()), rel=0.03)
    assert set(expected.seconds) == {"start", "trace", "weights"}


def test_the_proof_is_as_long_as_assumed(shape: ModelShape) -> None:
    from edgeattn.verify.cases import MANY_RAGGED_STEPS, build_cases

    cases = build_cases(1000, 4096)
    steps = [step for case in cases for step in case.steps]
    assert len(cases) == module.PROOF_CASES
    assert sum(len(case.steps[0].input_ids) for case in cases) == module.PROOF_ROWS
    assert len(steps) == module.PROOF_STEPS
    assert sum(int(step.new_mask.sum()) for step in steps) == module.PROOF_TOKENS
    assert sum(step.input_ids.shape[0] for step in steps) == module.PROOF_LAST_TOKENS
    longer = build_cases(1000, 4096, exact=68, ragged_steps=MANY_RAGGED_STEPS)
    tokens = sum(int(step.new_mask.sum()) for case in longer for step in case.steps)
    variant = plan_lowering(Recipe("cpu", attention=("fft-rope",)), parse_target("cpu"))
    assert tokens == module.PROOF_TOKENS + module._more_tokens(shape, variant)


def test_every_target_and_scheme_has_an_estimate(shape: ModelShape) -> None:
    for target, quant in itertools.product(all_targets(), SCHEMES):
        try:
            lowering = lowered(shape, target.name, quant)
        except LoweringError:
            continue
        found = estimate(shape, lowering, tensorrt=True, calibration_windows=64)
        assert found.weight_bytes + found.graph_bytes < found.disk_bytes
        assert found.memory_bytes > found.weight_bytes
        assert all(value > 0 for value in found.seconds.values())
        assert ("TensorRT-RTX" in found.seconds) == (lowering.rtx_sm is not None)
        assert json.loads(json.dumps(found.to_dict()))["seconds_measured_on"] == "a 2-core server"


def test_the_cache(shape: ModelShape) -> None:
    found = estimate(shape, lowered(shape, "jetson-orin", context=1024, batch=2))
    assert found.cache_bytes_per_token == 2 * 30 * 192 * 2  # keys and values, layers, width, fp16
    assert found.cache_bytes == found.cache_bytes_per_token * 1024 * 2
    assert (found.context, found.batch) == (1024, 2)
    assert estimate(shape, lowered(shape, "jetson-orin")).context == 8192
    whole = estimate(shape, lowered(shape, "jetson-orin", kv_cache="static", batch=2))
    assert whole.cache_bytes == found.cache_bytes_per_token * 8192 * 2  # all slots, from the start


def test_what_makes_an_export_smaller_or_shorter(shape: ModelShape) -> None:
    def of(target: str, quant: str = "none", **options: bool) -> Estimate:
        return estimate(shape, lowered(shape, target, quant), **options)

    def seconds(found: Estimate) -> float:
        return sum(found.seconds.values())

    none, int8, int4 = (of("jetson-orin", quant) for quant in ("none", "w8-rtn", "w4-rtn"))
    assert none.disk_bytes > int8.disk_bytes > int4.disk_bytes
    assert seconds(none) < seconds(int4), "choosing scales takes time"
    assert none.weight_bytes < of("cpu").weight_bytes
    fast = of("jetson-orin", verify=False)
    assert seconds(fast) < seconds(none)
    assert fast.memory_bytes < none.memory_bytes
    assert seconds(of("jetson-orin", tensorrt=True)) > seconds(none)
    assert of("jetson-orin", verify=False, tensorrt=True) == fast
    last = estimate(shape, replace(lowered(shape, "cpu"), logits="last"))
    assert last.disk_bytes < of("cpu").disk_bytes


def test_a_model_as_measured(shape: ModelShape) -> None:
    """SmolLM2-135M at fp16 with its proof: 292.1 MB, the tokenizer 3.5 MB of them."""
    found = estimate(shape, lowered(shape, "jetson-orin"), text_bytes=3_523_535)
    assert found.disk_bytes == pytest.approx(292.1e6, rel=0.005)


@pytest.mark.parametrize("target", ["cpu", "jetson-orin", "l4"])
@pytest.mark.parametrize("quant", ["w8a8", "w4a16-spinquant"])
def test_an_int8_cache_takes_one_byte_per_number(
    shape: ModelShape, target: str, quant: str
) -> None:
    fields = {"context": 1024, "batch": 2}
    plain, small = (
        estimate(shape, lowered(shape, target, f"{quant}:kv={kv}", **fields))
        for kv in ("float", "int8")
    )
    assert small.cache_bytes_per_token == 2 * 30 * 192  # keys and values, layers, width
    assert small.cache_bytes == small.cache_bytes_per_token * 1024 * 2
    wide = {"cpu": 4}.get(target, 2)
    assert plain.cache_bytes_per_token == wide * small.cache_bytes_per_token


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_dtype_of_activations_does_not_matter_to_an_int8_cache(
    shape: ModelShape, dtype: str
) -> None:
    lowering = lowered(shape, "cpu", "w8a8:kv=int8", dtype=dtype)
    assert estimate(shape, lowering).cache_bytes_per_token == 2 * 30 * 192
