"""What a machine is, read from trees of files as a Jetson has, and from a fake driver."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from machines import BARE_MACHINE

from edgeattn.devices.libcuda import GpuFacts
from edgeattn.devices.probe import free_memory, matching_device, matching_target, probe

TEGRA_RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed\n"
)
DPKG = """Package: bash
Version: 5.1

Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.3-20250107174145

"""
MEMINFO = "MemTotal:  7802140 kB\nMemFree:   100000 kB\nMemAvailable:  6000000 kB\nHugePages: 0\n"
KIB = 1024


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """A function from paths to contents, which writes them below a root."""

    def write(files: dict[str, str]) -> Path:
        for name, content in files.items():
            file = tmp_path / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return tmp_path / "root"

    return write


def probed_with(cuda: Path, **settings: object) -> dict[str, Any]:
    """What a child process finds out with another libcuda, and contexts it left behind."""
    program = """
import ctypes, json
from edgeattn.devices.probe import probe
found = probe().to_dict()
left = getattr(ctypes.CDLL("libcuda.so.1"), "fakeCudaContextsLeft", lambda: 0)()
print(json.dumps({**found, "contexts left": left}))
"""
    fake = {f"FAKE_CUDA_{name}": str(value) for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(cuda), **fake},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_jetson(tree: Callable[..., Path]) -> None:
    root = tree(
        {
            "etc/nv_tegra_release": TEGRA_RELEASE,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit Super\0",
            "proc/meminfo": MEMINFO,
            "usr/sbin/nvpmodel": "#!/bin/sh\n[ $1 = -q ] && echo 'NV Power Mode: 15W'; echo 0\n",
            "usr/lib/python3.10/dist-packages/tensorrt-10.3.0.dist-info/METADATA": (
                "Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n"
            ),
            "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.2.0": "",
        }
    )
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    found = probe(root)
    assert (found.l4t, found.jetpack, found.power_mode) == ("36.4.3", "jetpack6.2", "15W")
    assert found.board == "NVIDIA Jetson Orin Nano Developer Kit Super"
    assert found.tensorrt == "10.3.0"  # what Python imports comes before the bare library
    assert found.total_memory_bytes == 7802140 * KIB
    assert found.free_memory_bytes == 6000000 * KIB
    assert found.arch == platform.machine()
    if found.gpu is None:
        target = matching_target(found)
        assert target is not None
        assert target.name == "jetson-orin-nano-8gb@jetpack6.2"


@pytest.mark.parametrize(
    ("files", "l4t", "jetpack"),
    [
        ({"etc/nv_tegra_release": TEGRA_RELEASE}, "36.4.3", "jetpack6.2"),
        ({"var/lib/dpkg/status": DPKG}, "36.4.3", "jetpack6.2"),
        ({"etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID"}, "39.2.0", "jetpack7.2"),
        ({"etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID"}, "35.4.1", None),
        ({"etc/nv_tegra_release": "# R36 (release), REVISION: 40.1, GCID"}, "36.40.1", None),
        ({"etc/nv_tegra_release": "no release"}, None, None),
        ({"var/lib/dpkg/status": "Package: bash\nVersion: 36.4\n"}, None, None),
        ({}, None, None),
    ],
)
def test_jetson_linux(
    tree: Callable[..., Path], files: dict[str, str], l4t: str | None, jetpack: str | None
) -> None:
    found = probe(tree({"proc/meminfo": MEMINFO, **files}))
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0", "10.3.0"),
        ("usr/lib/x86_64-linux-gnu/libnvinfer.so.11.4.0", "11.4.0"),
        ("usr/lib/x86_64-linux-gnu/libnvinfer.so.10", None),
        ("usr/lib/x86_64-linux-gnu/libnvinfer_plugin.so.10.3.0", None),
    ],
)
def test_a_tensorrt_that_is_no_python_package(
    tree: Callable[..., Path], file: str, version: str | None
) -> None:
    assert probe(tree({file: ""})).tensorrt == version


def test_a_tool_that_fails_gives_no_power_mode(tree: Callable[..., Path]) -> None:
    assert probe(tree({"usr/sbin/nvpmodel": "no program"})).power_mode is None


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 6000000 * KIB),
        (  # version 2: a limit above the process's own group, of whose use files can be dropped
            {
                "proc/self/cgroup": "0::/box/job\n",
                f"{V2}/box/memory.max": "2000000000\n",
                f"{V2}/box/memory.current": "700000000\n",
                f"{V2}/box/memory.stat": "anon 1\ninactive_file 200000000\n",
                f"{V2}/box/job/memory.max": "max\n",
                f"{V2}/box/job/memory.current": "1\n",
            },
            1_500_000_000,
        ),
        (  # version 1: in a container the group is the mount itself
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "1000000000\n",
                f"{V1}/memory.usage_in_bytes": "400000000\n",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 100000000\n",
            },
            700_000_000,
        ),
        (  # version 1 writes a huge number where there is no limit
            {
                "proc/self/cgroup": "4:memory:/a\n",
                f"{V1}/a/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/a/memory.usage_in_bytes": "5\n",
            },
            6000000 * KIB,
        ),
        (  # full, and more
            {
                "proc/self/cgroup": "0::/\n",
                f"{V2}/memory.max": "1000\n",
                f"{V2}/memory.current": "2000\n",
            },
            0,
        ),
    ],
)
def test_free_memory(tree: Callable[..., Path], files: dict[str, str], free: int) -> None:
    assert free_memory(tree({"proc/meminfo": MEMINFO, **files})) == free


def test_a_limit_is_all_the_memory_there_is(tree: Callable[..., Path]) -> None:
    limit = {"sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "10\n"}
    found = probe(tree({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **limit}))
    assert (found.total_memory_bytes, found.free_memory_bytes) == (1000, 990)


def test_an_empty_tree_raises_nothing(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert found.free_memory_bytes == found.total_memory_bytes == 0
    assert found.board is found.l4t is found.tensorrt is found.onnxruntime is None
    if found.gpu is None:
        assert matching_target(found) is None


def test_the_packages_of_this_python() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    found = probe()
    assert onnxruntime.__version__ in (found.onnxruntime, found.onnxruntime_gpu)
    assert 0 < found.free_memory_bytes < found.total_memory_bytes


def test_a_gpu(fake_cuda: Path) -> None:
    settings = {"NAME": "Tesla T4", "SM": 75, "MEMORY": 15_828_320_256, "FREE": 15_000_000_001}
    found = probed_with(fake_cuda, **settings, DRIVER=12080)
    assert found["gpu"] == {
        "name": "Tesla T4",
        "sm": 75,
        "memory_bytes": 15_828_320_256,
        "free_bytes": 15_000_000_001,
        "integrated": False,
    }
    assert (found["gpu_problem"], found["driver"], found["contexts left"]) == ("", "12.8", 0)


def test_the_memory_of_an_integrated_gpu_is_what_the_system_has_available(fake_cuda: Path) -> None:
    found = probed_with(fake_cuda, SM=87, INTEGRATED=1, FREE=5)
    assert found["gpu"]["free_bytes"] == found["free_memory_bytes"] > 5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"FAIL": "cuInit:100"}, "cuInit says: no CUDA-capable device is detected"),
        ({"FAIL": "cuInit:35"}, "cuInit says: error 35"),
        ({"COUNT": 0}, "the driver sees no GPU"),
        ({"FAIL": "cuDeviceGetName:999"}, "cuDeviceGetName says: unknown error"),
    ],
)
def test_no_gpu(fake_cuda: Path, settings: dict[str, object], problem: str) -> None:
    found = probed_with(fake_cuda, **settings)
    assert (found["gpu"], found["gpu_problem"], found["driver"]) == (None, problem, "13.2")


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"])
def test_a_gpu_that_takes_no_context_has_nothing_free(fake_cuda: Path, function: str) -> None:
    found = probed_with(fake_cuda, FAIL=f"{function}:2")
    assert (found["gpu"]["free_bytes"], found["contexts left"]) == (0, 0)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.write_bytes(b"no library"), "there is no libcuda.so.1"),
        (
            lambda file: subprocess.run(
                [shutil.which("cc"), "-shared", "-o", file, "-x", "c", os.devnull], check=True
            ),
            "libcuda.so.1 is not the driver's",
        ),
    ],
)
def test_a_libcuda_that_is_none(
    fake_cuda: Path, tmp_path: Path, make: Callable[[Path], object], problem: str
) -> None:
    make(tmp_path / "libcuda.so.1")
    program = "from edgeattn.devices.libcuda import read_driver; print(read_driver().problem)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == problem


def gpu(name: str, sm: int, mib: int) -> GpuFacts:
    return GpuFacts(name, sm, mib * 2**20, mib * 2**20)


ORIN = "NVIDIA Jetson AGX Orin Developer Kit"


@pytest.mark.parametrize(
    ("facts", "target"),
    [
        # Memory in MiB as nvidia-smi or tegrastats reports it.
        ({"gpu": gpu("Tesla T4", 75, 15360)}, "t4@trt11"),
        ({"gpu": gpu("NVIDIA L4", 89, 23034), "tensorrt": "10.13.3.9"}, "l4@trt10.13"),
        ({"gpu": gpu("NVIDIA L40S", 89, 46068), "tensorrt": "10.1.0"}, None),
        ({"gpu": gpu("NVIDIA A10", 86, 23028)}, "a10@trt11"),
        ({"gpu": gpu("NVIDIA A10G", 86, 23028)}, None),
        ({"gpu": gpu("NVIDIA A100-SXM4-80GB", 80, 81920)}, "a100@trt11"),
        ({"gpu": gpu("NVIDIA A100-SXM4-40GB", 80, 40960)}, None),
        ({"gpu": gpu("NVIDIA H100 80GB HBM3", 90, 81559), "tensorrt": "11.4.0.1"}, "h100@trt11"),
        ({"gpu": gpu("NVIDIA H200", 90, 143771)}, "h200@trt11"),
        ({"gpu": gpu("NVIDIA GeForce RTX 4090", 89, 24564)}, "rtx-4090@rtx1.7"),
        ({"gpu": gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 16376)}, None),
        ({"gpu": gpu("NVIDIA GeForce RTX 3090", 86, 24576)}, None),
        ({"gpu": gpu("NVIDIA GB10", 121, 122570), "tensorrt": "10.14.1"}, "dgx-spark@trt10.14"),
        (
            {"gpu": gpu("Orin", 87, 62841), "board": ORIN, "l4t": "36.4.3",
             "jetpack": "jetpack6.2"},
            "jetson-orin-agx-64gb@jetpack6.2",
        ),
        (
            {"gpu": gpu("Orin", 87, 30697), "board": ORIN, "l4t": "39.2", "jetpack": "jetpack7.2"},
            "jetson-orin-agx-32gb@jetpack7.2",
        ),
        ({"gpu": gpu("Orin", 87, 62841), "board": ORIN, "l4t": "35.4.1"}, None),
        (
            {"gpu": gpu("Orin", 87, 15656), "board": "Acme Carrier", "jetpack": "jetpack7.2"},
            "jetson-orin-nx-16gb@jetpack7.2",
        ),
        # An Orin Nano and an Orin NX have as much.
        ({"gpu": gpu("Orin", 87, 7620), "board": "Acme Carrier", "jetpack": "jetpack7.2"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_which_target_it_is(facts: dict[str, Any], target: str | None) -> None:
    found = matching_target(replace(BARE_MACHINE, **facts))
    assert (found.name if found else None) == target


def test_a_jetson_whose_jetpack_is_none_of_ours_is_still_that_device() -> None:
    found = replace(BARE_MACHINE, gpu=gpu("Orin", 87, 62841), board=ORIN, l4t="35.4.1")
    device = matching_device(found)
    assert device is not None
    assert device.name == "jetson-orin-agx-64gb"
    assert matching_target(found) is None
