"""The library for Jetson, built and loaded on another machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def emulated(aarch64_library: Any) -> Any:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (apt install qemu-user)")
    if not Path(aarch64_library.driver[2], "lib", "libc.so.6").is_file():
        pytest.skip("needs an aarch64 C library (apt install libc6-arm64-cross)")
    return aarch64_library


def test_it_lists_creators_and_variants_and_launches(emulated: Any) -> None:
    tensors = (
        *("input q fp16 1x2x1x64", "input k fp16 1x2x1x64", "input v fp16 1x2x1x64"),
        *("input log_decay fp32 1x2x1x1", "input beta fp32 1x2x1"),
        *("input past_state fp32 1x2x64x64", "input past_normaliser fp32 1x2x64"),
        *("output y fp16 1x2x1x64", "output s fp32 1x2x64x64", "output n fp32 1x2x64"),
    )
    create = "create RecurrentLinearAttention"
    answers = emulated.drive(
        "creators", "abi", "table", create, "shape", "device", *tensors, "shape", "enqueue"
    )
    assert answers["creator"].startswith("RecurrentLinearAttention 1 edgeattn ")
    assert answers["abi"] == "1"
    table = json.loads(answers["table"])
    assert (table["arch"], table["ops"]) == ("aarch64", ["RecurrentLinearAttention"])
    assert {variant["sm"] for variant in table["variants"]} >= {87, 110}
    assert answers.lines["shape"] == ["1", "0"]  # an exception was thrown and caught there
    assert answers["enqueue"] == "0"
    assert answers.launches[0].arguments["scale"] == 0.125


def test_it_is_small(aarch64_library: Any) -> None:
    assert os.stat(aarch64_library.path).st_size < 1_000_000  # besides the cubins
