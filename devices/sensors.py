"""What a machine's clocks, temperatures and memory are at this moment.

Read where a system shows them to everyone: the files of the kernel that tegrastats reads too, and
`nvidia-smi`. As in `probe`, nothing raises: what a machine does not show is absent.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NVIDIA_SMI_TIMEOUT_S = 10
_NVIDIA_SMI_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# What Linux calls a Jetson's GPU: 17000000.gpu (JetPack 6), 17000000.ga10b, gpu-gpc-0 (JetPack 7).
_JETSON_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b")
# Sensors that are switched off show temperatures near or below absolute zero.
_COLDEST_C = -100


@dataclass(frozen=True)
class Reading:
    """A machine at one moment.

    Attributes:
        clocks_mhz: by what has the clock, as "cpu" (the fastest cores), "gpu", "gpu memory".
        temperatures_c: by sensor.
        gpu_watts: power that the GPU draws; None where it does not say.
    """

    clocks_mhz: dict[str, float]
    temperatures_c: dict[str, float]
    gpu_watts: float | None


def read_sensors(root: Path = Path("/")) -> Reading:
    """Looks at the clocks and sensors; takes about a tenth of a second with a GPU.

    Args:
        root: where /sys is looked for.
    """
    sm, memory, heat, watts = _nvidia_smi()
    clocks = {"cpu": _cpu_mhz(root), "gpu": sm or _jetson_gpu_mhz(root), "gpu memory": memory}
    heats = {**dict(_thermal_zones(root)), **({} if heat is None else {"gpu": heat})}
    return Reading({name: mhz for name, mhz in clocks.items() if mhz}, heats, watts)


def processor_name(root: Path = Path("/")) -> str | None:
    """What the processor calls itself; None on Arm, where Linux does not say.

    Args:
        root: where /proc is looked for.
    """
    found = re.search(r"^model name\s*: (.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else None


def peak_memory(root: Path = Path("/")) -> int | None:
    """Most bytes of the CPU's memory that this process ever held at once.

    Args:
        root: where /proc is looked for.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB$", _text(root / "proc/self/status"), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def _nvidia_smi() -> list[float | None]:
    """The first GPU's `_NVIDIA_SMI_FIELDS`; None for what it does not say, as much on a Jetson."""
    absent: list[float | None] = [None] * len(_NVIDIA_SMI_FIELDS)
    if (tool := shutil.which("nvidia-smi")) is None:
        return absent
    query = f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}"
    command = [tool, query, "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return absent
    values = [_number(value.strip()) for value in said.split(",")]
    return values if len(values) == len(absent) else absent


def _cpu_mhz(root: Path) -> float | None:
    files = (root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq")
    clocks = (_number(_text(file).strip()) for file in files)  # in kHz
    return max((clock / 1e3 for clock in clocks if clock), default=None)


def _jetson_gpu_mhz(root: Path) -> float | None:
    for file in sorted((root / "sys/class/devfreq").glob("*/cur_freq")):
        clock = _number(_text(file).strip())  # in Hz
        if clock and _JETSON_GPU.search(file.parent.name):
            return clock / 1e6
    return None


def _thermal_zones(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, heat = _text(zone / "type").strip(), _number(_text(zone / "temp").strip())
        if name and heat is not None and heat / 1e3 > _COLDEST_C:
            yield name.removesuffix("-thermal"), heat / 1e3


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def _text(file: Path) -> str:
    """The content of a file, empty where it cannot be read."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""
