"""CMake projects of tests, for this machine's processor or another."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeattn.engine.toolchain import find_cmake, find_compiler, find_cuda
from edgeattn.errors import MissingDependencyError


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def json_include() -> Path:
    """Where nlohmann/json.hpp is, or a place of the system."""
    if (spec := find_spec("nlohmann_json")) and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0], "include")
    return Path("/usr/include")


def cuda_include() -> Path:
    """CUDA's headers, or skips the test by what is missing."""
    try:
        return find_cuda()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def emulator(arch: str) -> tuple[str, ...]:
    """What starts programs for a processor, nothing for this machine's; or skips the test."""
    if arch == platform.machine():
        return ()
    sysroot = os.environ.get("QEMU_LD_PREFIX", f"/usr/{arch}-linux-gnu")
    if shutil.which(f"qemu-{arch}") is None:
        pytest.skip(f"needs qemu-{arch} (apt install qemu-user)")
    if not Path(sysroot, "lib", "libc.so.6").is_file():
        pytest.skip(f"needs a C library for {arch} (apt install libc6-arm64-cross)")
    return (f"qemu-{arch}", "-L", sysroot)


def configure(sources: Path, build: Path, arch: str, *given: str) -> None:
    """Runs CMake with the compiler for a processor, or skips the test by what is missing."""
    try:
        cmake, compiler = find_cmake(), find_compiler(arch)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    os.environ.setdefault("EDGEATTN_JSON_INCLUDE", str(json_include()))
    system = [] if arch == platform.machine() else ["-DCMAKE_SYSTEM_NAME=Linux"]
    chosen = [
        f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}",
        f"-DCMAKE_SYSTEM_PROCESSOR={arch}",
    ]
    done = subprocess.run(
        [cmake, "-S", sources, "-B", build, *system, *given, *chosen],
        capture_output=True,
        text=True,
        check=False,
    )
    if "nlohmann/json.hpp, but it was not found" in " ".join(done.stderr.split()):
        pytest.skip("needs nlohmann/json.hpp: pip install nlohmann-json")
    assert done.returncode == 0, done.stderr
