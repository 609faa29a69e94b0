"""`edgeattn targets` shows every device, and every fact of one with its source."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from edgeattn.cli.targets import command
from edgeattn.devices.registry import all_devices, all_software, device_names
from edgeattn.errors import UsageError


def run(*arguments: str, columns: int = 80) -> Result:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(command, arguments)
    assert result.exit_code == 0, result.exception
    return result


@pytest.mark.parametrize("columns", [80, 120])
def test_lists_every_target_and_software(columns: int) -> None:
    lines = run(columns=columns).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    # the aliases may take a second line, the rest must not
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    for device in all_devices():
        assert str(device.sm or "-") in rows[device.name]
        assert device.software.default in rows[device.name]
    text = " ".join(lines)
    for device in all_devices():
        assert all(alias in text for alias in device.aliases)
    for software in all_software():
        assert software.name in rows
        assert software.description in text


def test_the_list_stays_on_two_screens() -> None:
    assert len(run().stdout.splitlines()) <= 48


def test_json_is_one_object() -> None:
    listed = json.loads(run("--json").stdout)
    assert [device["name"] for device in listed["targets"]] == list(device_names())
    assert [stack["name"] for stack in listed["software"]] == [s.name for s in all_software()]
    one = json.loads(run("jetson-orin@jetpack6.2", "--json").stdout)
    assert one["target"] == "jetson-orin-agx-64gb@jetpack6.2"
    assert one["device"]["gpu"]["sm"] == 87
    assert one["device"]["peak"]["mode"] == "MAXN"
    assert one["software"]["graph"]["opset"] == 20


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("sm87", "jetson-orin-agx-64gb@jetpack7.2"),
        ("jetson-orin@jetpack6.2", "jetson-orin-agx-64gb@jetpack6.2"),
        ("rtx5090@trt11", "rtx-5090@trt11"),
    ],
)
def test_an_alias_shows_its_target(name: str, heading: str) -> None:
    assert run(name).stdout.startswith(f"{heading}: NVIDIA")


@pytest.mark.parametrize("name", device_names())
def test_facts_come_with_their_sources(name: str) -> None:
    text = run(name, columns=600).stdout
    device = next(device for device in all_devices() if device.name == name)
    for group in (device.memory, device.gpu, device.dtypes, device.software):
        assert group is None or group.source in text
    assert "opset 23" in text


def test_facts_fit_80_columns_and_name_the_power_mode() -> None:
    lines = run("orin-nano@jetpack6.2").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("mode MAXN_SUPER" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("jetson-orn", "jetson-orin"),
        ("orin-nono", "orin-nano"),
        ("rtx6090", "rtx5090"),
        ("l4@jetpack6.2", "trt10.13"),
    ],
)
def test_unknown_target_is_refused_with_near_ones(name: str, hint: str) -> None:
    result = CliRunner().invoke(command, [name])
    assert isinstance(result.exception, UsageError)
    assert hint in str(result.exception)
