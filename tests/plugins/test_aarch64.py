"""The library for Jetson, built and loaded on another machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from op_cases import case_id
from plugin_commands import PLUGIN_CASES, PLUGIN_OPS, create_command, tensor_commands

from edgeattn.ops.spec import OpSpec


@pytest.fixture
def emulated(aarch64_library: Any) -> Any:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (apt install qemu-user)")
    if not Path(aarch64_library.driver[2], "lib", "libc.so.6").is_file():
        pytest.skip("needs an aarch64 C library (apt install libc6-arm64-cross)")
    return aarch64_library


def test_it_lists_creators_and_variants(emulated: Any) -> None:
    answers = emulated.drive("creators", "abi", "table", create_command(PLUGIN_OPS[0], {}), "shape")
    names = sorted(spec.name for spec in PLUGIN_OPS)
    assert sorted(line.split()[0] for line in answers.lines["creator"]) == names
    assert answers["abi"] == "1"
    table = json.loads(answers["table"])
    assert (table["arch"], table["ops"]) == ("aarch64", names)
    assert {variant["sm"] for variant in table["variants"]} >= {87, 110}
    assert answers["shape"] == "1"  # an exception was thrown and caught there
    assert answers.logged.startswith("1 edgeattn: ")


@pytest.mark.parametrize("spec", PLUGIN_OPS, ids=case_id)
def test_it_launches(emulated: Any, spec: OpSpec) -> None:
    case = next(case for one, case in PLUGIN_CASES if one is spec)
    commands = (create_command(spec, case.attributes), "device", *tensor_commands(spec, case))
    answers = emulated.drive(*commands, "shape", "enqueue")
    assert (answers["shape"], answers["enqueue"]) == ("0", "0")
    name = spec.outputs[0].name
    assert all(launch.name.startswith(f"{spec.snake_name}.") for launch in answers.launches)
    # The last that takes the result writes it.
    last = [launch for launch in answers.launches if name in launch.arguments][-1]
    assert last.arguments[name] == answers.addresses[name]


def test_it_is_small(aarch64_library: Any) -> None:
    assert os.stat(aarch64_library.path).st_size < 1_000_000  # besides the cubins
