"""Estimates of calibration beside what the committed benchmark measured, and in proportion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.planner.calibration import (
    calibration_bytes,
    calibration_seconds,
    learning_bytes,
    window_length,
    work_bytes,
)
from edgeattn.planner.estimate import estimate
from edgeattn.planner.lowering import plan_lowering
from edgeattn.planner.memory import weight_bytes
from edgeattn.quant.scheme import SCHEMES, parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

STAGES = {
    "calibration": "quantising layer by layer",
    "sensitivity": "measuring sensitivity",
    "learning": "learning rotations",
}
WINDOWS, LENGTH = 64, 512


def test_stages_take_about_as_long_as_measured(shape: ModelShape, repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "quantize.json"
    results = json.loads(file.read_text("utf-8"))["results"]
    compared = set()
    for label, result in results.items():
        if label.startswith("onnxruntime") or not parse_scheme(label).needs_calibration:
            continue
        if result.get("cpu_s", result["wall_s"] * 2) < 1.3 * result["wall_s"]:
            continue  # of the two processors other work had its share: no measure of time
        for stage, seconds in calibration_seconds(
            shape, parse_scheme(label), WINDOWS, LENGTH
        ).items():
            measured = result["seconds"][STAGES[stage]]
            assert measured / 2.2 < seconds < 2.2 * measured, (label, stage)
            compared.add(stage)
    assert compared >= {"calibration", "sensitivity"}


def test_memory_is_about_that_measured(shape: ModelShape, repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "quantize.json"
    results = json.loads(file.read_text("utf-8"))["results"]
    for label in ("w4a16-spinquant", "w4a16-spinquant:refit=off"):
        lowering = plan_lowering(Recipe("cpu", quant=label), parse_target("cpu"))
        found = estimate(shape, lowering, verify=False, calibration_windows=WINDOWS)
        assert found.memory_bytes / 1e6 == pytest.approx(results[label]["peak_rss_mb"], rel=0.25)


@pytest.mark.parametrize("name", SCHEMES)
def test_only_schemes_with_a_text_are_calibrated(shape: ModelShape, name: str) -> None:
    scheme = SCHEMES[name]
    assert bool(calibration_seconds(shape, scheme, WINDOWS, LENGTH)) == scheme.needs_calibration
    assert bool(calibration_bytes(shape, scheme, WINDOWS, LENGTH)) == scheme.needs_calibration


def test_more_text_and_more_weights_take_longer(shape: ModelShape) -> None:
    scheme = parse_scheme("w8a8-spinquant")

    def total(shape: ModelShape, windows: int) -> float:
        return sum(calibration_seconds(shape, scheme, windows, LENGTH).values())

    assert total(shape, 64) > total(shape, 32)
    assert total(replace(shape, num_layers=60), 32) > 1.9 * total(shape, 32)
    assert calibration_bytes(shape, scheme, 64, LENGTH) > 1.5 * calibration_bytes(
        shape, scheme, 32, LENGTH
    )
    assert calibration_bytes(shape, replace(scheme, refit=False), 64, LENGTH) < calibration_bytes(
        shape, scheme, 64, LENGTH
    )


def test_both_candidates_of_auto_are_counted(shape: ModelShape) -> None:
    one, both = (
        parse_scheme(f"w8a8-spinquant:rotation={rotation}") for rotation in ("hadamard", "auto")
    )
    seconds = [calibration_seconds(shape, scheme, WINDOWS, LENGTH) for scheme in (one, both)]
    assert seconds[1] == pytest.approx({stage: 2 * s for stage, s in seconds[0].items()})
    assert work_bytes(shape, both, 2) == 2 * work_bytes(shape, one, 2)
    memory = [calibration_bytes(shape, scheme, WINDOWS, LENGTH) for scheme in (one, both)]
    assert memory[0] == memory[1], "one after the other"


def test_rotations_of_a_file_are_not_learned(shape: ModelShape) -> None:
    lowering = plan_lowering(Recipe("cpu", quant="w4a16-spinquant-learned"), parse_target("cpu"))
    with_file, without = (
        estimate(shape, lowering, verify=False, calibration_windows=WINDOWS, learns=learns)
        for learns in (False, True)
    )
    assert "learning" not in with_file.seconds
    assert without.seconds["learning"] > 600
    assert with_file.memory_bytes <= without.memory_bytes


def test_learning_holds_the_whole_model(shape: ModelShape) -> None:
    blocks, table = 30 * 3_538_944, 49152 * 576
    assert learning_bytes(shape, LENGTH) > 4 * (blocks + 2 * table)
    assert learning_bytes(replace(shape, num_layers=60), LENGTH) > 4 * (2 * blocks + 2 * table)


def test_every_trial_of_sensitivity_has_a_stream(shape: ModelShape) -> None:
    """Of many layers and few windows those are the most there is."""
    deep, kept = replace(shape, num_layers=300), parse_scheme("w4a16-gptq:keep=5%,refit=off")
    streams = 300 * 7 * LENGTH * 576 * 4
    assert calibration_bytes(deep, kept, 1, LENGTH) == streams
    assert calibration_bytes(deep, replace(kept, keep=0.0), 1, LENGTH) < streams / 2


@pytest.mark.parametrize(("context", "length"), [(None, 512), (96, 96), (4096, 512)])
def test_windows_fit_the_context(shape: ModelShape, context: int | None, length: int) -> None:
    assert window_length(shape, context) == length
    assert window_length(replace(shape, max_context=64), None) == 64


@pytest.mark.parametrize("name", SCHEMES)
def test_finished_layers_take_a_byte_for_a_weight(shape: ModelShape, name: str) -> None:
    found, weights = work_bytes(shape, SCHEMES[name], 4), 30 * 3_538_944
    if not SCHEMES[name].needs_calibration:
        assert found == 0
    else:
        scales = weights // 16 if name.startswith("w4") else 30 * 4 * 6336
        expected = weights + scales
        if "learned" in name:  # and with the rotations that learning started from
            expected = 2 * expected + 16 * (576**2 + 30 * 64**2)
        assert found == pytest.approx(expected, rel=0.01)


def test_kept_layers_are_counted_as_int8(shape: ModelShape) -> None:
    def bytes_of(quant: str) -> int:
        lowering = plan_lowering(Recipe("jetson-orin", quant=quant), parse_target("jetson-orin"))
        return weight_bytes(shape, lowering)

    plain, some, all_of_them = (bytes_of(f"w4a16-gptq:keep={k}") for k in ("0", "10%", "100%"))
    assert plain + 20 * 576 * 1536 * 0.4 < some < all_of_them
    int8 = bytes_of("w8a8:keep=0")
    assert all_of_them == int8
    assert bytes_of("w8a8:keep=100%") == int8, "the inputs are kept, not the weights"


def test_the_disk_holds_finished_layers_beside_the_bundle(shape: ModelShape) -> None:
    found = {}
    for quant in ("w4-rtn", "w4a16-gptq"):
        lowering = plan_lowering(Recipe("cpu", quant=quant), parse_target("cpu"))
        found[quant] = estimate(shape, lowering, calibration_windows=WINDOWS).disk_bytes
    work = work_bytes(shape, parse_scheme("w4a16-gptq"), 4)
    assert found["w4a16-gptq"] == found["w4-rtn"] + work
