"""Estimates of calibration beside what the committed benchmark measured, and in proportion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.planner.calibration import calibration_bytes, calibration_seconds
from edgeattn.planner.estimate import estimate
from edgeattn.planner.lowering import plan_lowering
from edgeattn.quant.scheme import SCHEMES, parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

STAGES = {
    "calibration": "quantising layer by layer",
    "sensitivity": "measuring sensitivity",
    "learning": "learning rotations",
}
WINDOWS = 64


def test_stages_take_about_as_long_as_measured(shape: ModelShape, repository: Path) -> None:
    file = repository / "benchmarks" / "results" / "quantize.json"
    results = json.loads(file.read_text("utf-8"))["results"]
    compared = set()
    for label, result in results.items():
        if label.startswith("onnxruntime") or not parse_scheme(label).needs_calibration:
            continue
        for stage, seconds in calibration_seconds(shape, parse_scheme(label), WINDOWS).items():
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
    assert bool(calibration_seconds(shape, scheme, WINDOWS)) == scheme.needs_calibration
    assert bool(calibration_bytes(shape, scheme, WINDOWS)) == scheme.needs_calibration


def test_more_text_and_more_weights_take_longer(shape: ModelShape) -> None:
    scheme = parse_scheme("w8a8-spinquant")

    def total(shape: ModelShape, windows: int) -> float:
        return sum(calibration_seconds(shape, scheme, windows).values())

    assert total(shape, 64) > total(shape, 32)
    assert total(replace(shape, num_layers=60), 32) > 1.9 * total(shape, 32)
    assert calibration_bytes(shape, scheme, 64) > 1.5 * calibration_bytes(shape, scheme, 32)
    assert calibration_bytes(shape, replace(scheme, refit=False), 64) < calibration_bytes(
        shape, scheme, 64
    )
