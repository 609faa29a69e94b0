"""Clocks, temperatures and memory, read from trees and tools made by hand."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeattn.devices.sensors import Reading, peak_memory, processor_name, read_sensors

Tree = Callable[[dict[str, str]], Path]
NOTHING = Reading({}, {}, None)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A function from paths to contents, which writes them below a root."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "root"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return root

    return write


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts a program of that text in the search path, which else has none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(text: str) -> None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)

    return write


def test_a_jetson(tree: Tree) -> None:
    root = tree(
        {
            "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
            "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1510400\n",
            "sys/class/devfreq/13e00000.host1x/cur_freq": "204000000\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48531\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "46250\n",
            "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # switched off
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",
        }
    )
    clocks = {"cpu": 1510.4, "gpu": 624.75}
    assert read_sensors(root) == Reading(clocks, {"cpu": 48.531, "gpu": 46.25}, None)


def test_a_gpu_card(tree: Tree, nvidia_smi: Callable[[str], None]) -> None:
    """The program answers the fields in the order they are asked for."""
    nvidia_smi(
        "case $1 in --query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw) "
        "echo '1980, 2619, 41, 117.52';; *) exit 2;; esac"
    )
    expected = Reading({"gpu": 1980, "gpu memory": 2619}, {"gpu": 41}, 117.52)
    assert read_sensors(tree({})) == expected


@pytest.mark.parametrize(
    "text",
    [
        "echo '[N/A], [N/A], [N/A], [Not Supported]'",  # as on a Jetson
        "echo 'nan, inf, nan, nan'",
        "echo '1980, 2619'",
        "echo 'Failed to initialize NVML'",
        "printf '\\377\\376'",
        "echo '1980, 2619, 41, 117'; exit 9",
    ],
)
def test_what_is_not_said_is_absent(
    tree: Tree, nvidia_smi: Callable[[str], None], text: str
) -> None:
    nvidia_smi(text)
    assert read_sensors(tree({})) == NOTHING


def test_files_that_hold_no_number(tree: Tree) -> None:
    names = [
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq",
        "sys/class/devfreq/17000000.gpu/cur_freq",
        "sys/class/thermal/thermal_zone0/type",
        "sys/class/thermal/thermal_zone0/temp",
    ]
    assert read_sensors(tree(dict.fromkeys(names, "<unknown>\n"))) == NOTHING
    assert read_sensors(tree({})) == NOTHING


def test_processor(tree: Tree) -> None:
    said = "processor\t: 0\nmodel name\t: A CPU @ 2.00GHz\nmodel name\t: Another\n"
    assert processor_name(tree({"proc/cpuinfo": said})) == "A CPU @ 2.00GHz"
    assert processor_name(tree({"proc/cpuinfo": "processor\t: 0\n"})) is None


def test_peak_memory(tree: Tree) -> None:
    said = "VmPeak:\t 9999999 kB\nVmHWM:\t  123456 kB\nVmRSS:\t    1000 kB\n"
    assert peak_memory(tree({"proc/self/status": said})) == 123456 * 1024
    assert peak_memory(tree({"proc/self/status": ""})) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
def test_peak_memory_of_this_process() -> None:
    """A block that was held and given back counts; the kernel's other counter agrees."""
    before = peak_memory()
    block = bytearray(os.urandom(1 << 20) * 64)
    del block
    after = peak_memory()
    assert before is not None
    assert after is not None
    assert after >= before
    assert after <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.01
