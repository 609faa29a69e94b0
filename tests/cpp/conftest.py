"""Fixtures for libedgeattn: built, installed and driven once per session."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeattn.engine.toolchain import find_cmake, find_compiler
from edgeattn.errors import MissingDependencyError

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "plugins" / "runtime"


@dataclass(frozen=True)
class Runtime:
    """The library, as an app finds it, and the driver with sanitizers."""

    prefix: Path
    driver: Path
    configure: Callable[[Path, Path, str], None]

    @property
    def library(self) -> Path:
        return next(self.prefix.glob("lib*/**/libedgeattn.so"))

    def drive(self, command: str, given: bytes) -> bytes:
        done = subprocess.run([self.driver, command], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def configure(sources: Path, build: Path, arch: str, *given: str) -> None:
    """Runs CMake with the compiler for a processor, or skips the test by what is missing."""
    try:
        cmake, compiler = find_cmake(), find_compiler(arch)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if (spec := find_spec("nlohmann_json")) and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "include")
        os.environ.setdefault("EDGEATTN_JSON_INCLUDE", str(folder))
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


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds some targets for a processor, installs the library, returns the build folder."""

    def install(arch: str, *targets: str) -> Path:
        build = tmp_path_factory.mktemp(f"runtime-{arch}")
        configure(SOURCES, build, arch, f"-DCMAKE_INSTALL_PREFIX={build / 'prefix'}")
        run([find_cmake(), "--build", build, "-j2", "--target", "edgeattn", *targets])
        run([find_cmake(), "--install", build])
        return build

    return install


@pytest.fixture(scope="session")
def runtime(installed: Callable[..., Path]) -> Runtime:
    build = installed(platform.machine(), "runtime_driver")
    return Runtime(build / "prefix", build / "runtime_driver", configure)
