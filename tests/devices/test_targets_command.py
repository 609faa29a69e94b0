"""`edgeattn targets` shows every device, and every fact of one with its source."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from edgeattn.cli.targets import command
from edgeattn.devices.registry import all_devices, device_names
from edgeattn.errors import UsageError


def run(*arguments: str, columns: int = 80) -> Result:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(command, arguments)
    assert result.exit_code == 0, result.exception
    return result


def test_lists_every_target_within_80_columns() -> None:
    lines = run().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for device in all_devices():
        for word in (device.name, device.software.default, device.flavour, *device.aliases):
            assert word in text


def test_json_is_one_object() -> None:
    listed = json.loads(run("--json").stdout)
    assert [device["name"] for device in listed["targets"]] == list(device_names())
    one = json.loads(run("jetson-orin@jetpack6.2", "--json").stdout)
    assert one["target"] == "jetson-orin-agx-64gb@jetpack6.2"
    assert one["device"]["gpu"]["sm"] == 87
    assert one["software"]["graph"]["opset"] == 20


@pytest.mark.parametrize("name", device_names())
def test_facts_come_with_their_sources(name: str) -> None:
    text = run(name, columns=600).stdout
    device = next(device for device in all_devices() if device.name == name)
    for group in (device.memory, device.gpu, device.dtypes, device.software):
        assert group is None or group.source in text
    assert "opset 23" in text


def test_unknown_target_is_refused() -> None:
    result = CliRunner().invoke(command, ["jetson-orn"])
    assert isinstance(result.exception, UsageError)
    assert "jetson-orin" in str(result.exception)
