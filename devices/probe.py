"""What this machine is: its GPU, driver, JetPack, memory, and the runtimes that are installed.

Nothing is imported or loaded but the driver's library, and nothing raises: a fact that cannot be
found out is None.
"""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from edgeattn.devices.libcuda import GpuFacts, read_driver
from edgeattn.devices.registry import Target, all_devices, all_software
from edgeattn.devices.schema import Device, Software

# How far the memory a system reports may be from the figure a device is sold with: firmware keeps
# some of it, and vendors count in powers of two or of ten.
_NEAR_MEMORY = (0.85, 1.15)
_NVPMODEL_TIMEOUT_S = 5
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_TENSORRT_RTX = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
_MEMORY_WORD = re.compile(r"\d+gb")


@dataclass(frozen=True)
class Probe:
    """The facts of a machine.

    Attributes:
        arch: of its processor, as "x86_64" or "aarch64".
        gpu: the first GPU; None where `gpu_problem` says why there is none.
        gpu_problem: one clause, empty with a GPU.
        driver: CUDA version that the driver supports, as "13.2".
        l4t: Jetson Linux, as "36.4.3".
        jetpack: name of the software it belongs to, as "jetpack6.2"; None also where that is none
            of ours.
        board: what a Jetson calls itself.
        power_mode: the mode a Jetson is in.
        tensorrt: version installed, for Python or else as a library alone.
        tensorrt_rtx: version installed.
        onnxruntime: version of the package for CPUs.
        onnxruntime_gpu: version of the package for GPUs.
        free_memory_bytes: what this process may still take of the CPU's memory.
        total_memory_bytes: what it may take in all.
    """

    arch: str
    gpu: GpuFacts | None
    gpu_problem: str
    driver: str | None
    l4t: str | None
    jetpack: str | None
    board: str | None
    power_mode: str | None
    tensorrt: str | None
    tensorrt_rtx: str | None
    onnxruntime: str | None
    onnxruntime_gpu: str | None
    free_memory_bytes: int
    total_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def probe(root: Path = Path("/")) -> Probe:
    """Looks at this machine; takes a moment, because the driver must make a context.

    Args:
        root: where /proc, /sys, /etc, /usr and /var are looked for.
    """
    driver, l4t = read_driver(), _l4t(root)
    gpu, free = driver.gpu, free_memory(root)
    if gpu is not None and gpu.integrated:  # the kernel gives it what it has cached, too
        gpu = replace(gpu, free_bytes=free)
    software = _software_of_l4t(l4t) if l4t else None
    return Probe(
        arch=platform.machine(),
        gpu=gpu,
        gpu_problem=driver.problem,
        driver=driver.version,
        l4t=l4t,
        jetpack=software.name if software else None,
        board=_text(root / "proc/device-tree/model").strip("\0 \n") or None,
        power_mode=_power_mode(root),
        tensorrt=_installed(root, *_TENSORRT) or _library_version(root),
        tensorrt_rtx=_installed(root, *_TENSORRT_RTX),
        onnxruntime=_installed(root, "onnxruntime"),
        onnxruntime_gpu=_installed(root, "onnxruntime-gpu"),
        free_memory_bytes=free,
        total_memory_bytes=_total_memory(root),
    )


def matching_device(found: Probe) -> Device | None:
    """The device that a machine is, None where it is none of ours or could be several."""
    words = _words(f"{found.gpu.name if found.gpu else ''} {found.board or ''}")
    fitting = [device for device in all_devices() if _could_be(found, device)]
    named = [device for device in fitting if _is_called(device, words)]
    if not named and found.gpu is not None:  # a carrier board of another maker has its own name
        named = [device for device in fitting if device.kind == "jetson"]
    return named[0] if len(named) == 1 else None


def matching_target(found: Probe) -> Target | None:
    """The target that a machine is, with the software installed on it.

    On a Jetson the software is its JetPack; elsewhere it is that of the installed TensorRT, or the
    device's default where there is none.

    Returns:
        None where the device is none of ours, or does not run its software.
    """
    device = matching_device(found)
    if device is None:
        return None
    allowed = [one for one in all_software() if one.name in device.software.allowed]
    if device.kind == "jetson":
        fitting = [one for one in allowed if one.name == found.jetpack]
    elif device.flavour == "tensorrt" and found.tensorrt is not None:
        fitting = [one for one in allowed if _is_version(found.tensorrt, one.stack.version)]
    else:
        fitting = [one for one in allowed if one.name == device.software.default]
    return Target(device, fitting[0]) if fitting else None


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of its control groups.

    Args:
        root: where /proc and /sys are looked for.

    Returns:
        0 where the system does not say.
    """
    machine = _meminfo(root)
    free = machine.get("MemAvailable", machine.get("MemFree", 0))
    left = (limit - used for limit, used in _group_memory(root))
    return max(0, min([free, *left]))


def _total_memory(root: Path) -> int:
    limits = (limit for limit, _ in _group_memory(root))
    return min([_meminfo(root).get("MemTotal", 0), *limits])


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name, of lines such as "MemTotal:  24684092 kB"."""
    return {name: 1024 * size for name, size in _numbers(root / "proc/meminfo").items()}


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of this process's control groups, those above included, where one has a limit.

    Use is without the files that the kernel drops before it refuses memory.
    """
    for folder, limit, use, cached in _memory_groups(root):
        most, used = _text(folder / limit).strip(), _text(folder / use).strip()
        if most.isdigit() and used.isdigit():  # cgroup v2 says "max" where there is none
            yield int(most), int(used) - _numbers(folder / "memory.stat").get(cached, 0)


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of control groups with the names of their files, by version."""
    names = {
        "": ("memory.max", "memory.current", "inactive_file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        for controller in {"", "memory"} & set(controllers.split(",")):
            mount = root / "sys/fs/cgroup" / controller
            place = mount / group.strip("/")
            for folder in (place, *place.parents):
                if folder.is_relative_to(mount):
                    yield (folder, *names[controller])


def _l4t(root: Path) -> str | None:
    """Version of Jetson Linux: release and revision, as "36.4.3"."""
    release = re.search(
        r"#\s*R(\d+)\D.*?REVISION:\s*([\d.]+)", _text(root / "etc/nv_tegra_release")
    )
    if release:
        return f"{release[1]}.{release[2].strip('.')}"
    package = re.search(
        r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)",
        _text(root / "var/lib/dpkg/status"),
        re.MULTILINE,
    )
    return package[1] if package else None


def _software_of_l4t(l4t: str) -> Software | None:
    known = (s for s in all_software() if s.stack.l4t and _is_version(l4t, s.stack.l4t))
    return next(known, None)


def _is_version(version: str, of: str) -> bool:
    """Whether a version is one `of` a line: 10.16.1 and 10.16 are of 10.16, 10.1 is not."""
    return f"{version}.".startswith(f"{of}.")


def _power_mode(root: Path) -> str | None:
    tool = root / "usr/sbin/nvpmodel"
    if not tool.is_file():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        said = subprocess.run(
            [tool, "-q"], capture_output=True, text=True, timeout=_NVPMODEL_TIMEOUT_S, check=False
        ).stdout
        if mode := re.search(r"Power Mode:\s*(\S+)", said):
            return mode[1]
    return None


def _installed(root: Path, *packages: str) -> str | None:
    """Version of the first of these packages that this Python or the system's has.

    JetPack's TensorRT is among the latter, which a virtual environment does not see.
    """
    system = sorted(str(place) for place in (root / "usr/lib").glob("python3*/dist-packages"))
    own = sys.path if root == Path("/") else []
    for package in packages:
        for found in distributions(name=package, path=[*own, *system]):
            with contextlib.suppress(KeyError, OSError, UnicodeDecodeError):
                return found.version
    return None


def _library_version(root: Path) -> str | None:
    """Version in the name of TensorRT's library, as in libnvinfer.so.10.3.0."""
    for place in ("usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib"):
        for file in sorted((root / place).glob("libnvinfer.so.*.*")):
            return file.name.removeprefix("libnvinfer.so.")
    return None


def _could_be(found: Probe, device: Device) -> bool:
    """Whether GPU and memory are those of a device."""
    if device.memory is None or (found.gpu is not None and device.sm != found.gpu.sm):
        return False
    size = found.gpu.memory_bytes if found.gpu else found.total_memory_bytes
    low, high = _NEAR_MEMORY
    return low <= size / (1e9 * device.memory.total_gb) <= high


def _is_called(device: Device, words: set[str]) -> bool:
    """Whether all words of one of a device's names occur, sizes of memory left out."""
    names = (_words(name) for name in (device.name, *device.aliases))
    return any({w for w in name if not _MEMORY_WORD.fullmatch(w)} <= words for name in names)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _numbers(file: Path) -> dict[str, int]:
    """The lines "NAME NUMBER" or "NAME: NUMBER UNIT" of a file."""
    lines = (line.split() for line in _text(file).splitlines())
    return {w[0].rstrip(":"): int(w[1]) for w in lines if len(w) > 1 and w[1].isdigit()}


def _text(file: Path) -> str:
    """The content of a file, empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return file.read_text("utf-8", errors="replace")
    return ""
