"""Fixtures for libedgeattn: built, installed and driven once per session."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cmake_projects import configure, run

from edgeattn.engine.toolchain import find_cmake

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
