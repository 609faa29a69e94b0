"""Fixtures for libedgeattn: built, installed and driven once per session."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from cmake_projects import configure, cuda_include, json_include, run
from cpp_session import CppSession
from fake_engine import SM
from nvinfer_stubs import write_stubs
from shared_folders import made_once

from edgeattn.engine.toolchain import find_cmake, find_compiler
from edgeattn.errors import MissingDependencyError
from edgeattn.pipeline.package import package_library

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "plugins" / "runtime"
FAKE_NVINFER = REPOSITORY / "tests" / "support" / "fake_nvinfer" / "fake_nvinfer.cpp"
SANITIZE = "-DEDGEATTN_SANITIZE=ON"
VERSIONS = {10: "10.14.0", 11: "11.0.0"}


def tensorrt_major(headers: Path) -> int:
    """The major of TensorRT's headers."""
    text = (headers / "NvInferVersion.h").read_text()
    found = re.search(r"#define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", text)
    assert found, headers
    return int(found[1])


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
def installed(
    tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function from a processor to where the archive for it was unpacked."""

    def unpack(arch: str, folder: Path) -> None:
        try:
            made = package_library(arch, folder, tensorrt=[tensorrt_headers])
        except MissingDependencyError as error:
            pytest.skip(str(error))
        eleven = tensorrt_major(tensorrt_headers) == 11
        assert set(made.adapters) == ({"trt11", "rtx"} if eleven else {"trt10"})
        with tarfile.open(made.path) as archive:
            archive.extractall(folder, filter="data")

    @cache
    def install(arch: str) -> Path:
        folder = made_once(tmp_path_factory, f"package-{arch}", partial(unpack, arch))
        (prefix,) = (path for path in folder.iterdir() if path.is_dir())
        return prefix

    return install


@pytest.fixture(scope="session")
def sanitized(tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with the address, leak and undefined-behaviour sanitizers: drivers and adapter."""
    includes = {"TENSORRT": tensorrt_headers, "CUDA": cuda_include()}
    flags = [f"-DEDGEATTN_{name}_INCLUDE={path}" for name, path in includes.items()]
    adapter = f"edgeattn_trt{tensorrt_major(tensorrt_headers)}"
    targets = ["runtime_driver", "session_driver", adapter]

    def build(folder: Path) -> None:
        configure(SOURCES, folder, platform.machine(), *flags, SANITIZE)
        run([find_cmake(), "--build", folder, "-j2", "--target", *targets])

    return made_once(tmp_path_factory, "sanitized", build)


@pytest.fixture(scope="session")
def runtime(installed: Callable[[str], Path], sanitized: Path) -> Runtime:
    return Runtime(installed(platform.machine()), sanitized / "runtime_driver", configure)


@pytest.fixture(scope="session")
def fake_nvinfer(tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libnvinfer that runs engines of fake_tensorrt, on fake_cuda.

    Its layout is that of the headers that are given, of TensorRT 10 or 11.
    """
    folder = tmp_path_factory.mktemp("nvinfer")
    library = folder / f"libnvinfer.so.{tensorrt_major(tensorrt_headers)}"
    write_stubs(tensorrt_headers, folder / "stubs.h")
    flags = ["-std=c++17", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    includes = [
        f"-I{place}" for place in (folder, tensorrt_headers, cuda_include(), json_include())
    ]
    run([*find_compiler(platform.machine()), *flags, *includes, FAKE_NVINFER, "-o", library])
    return folder


@pytest.fixture(scope="session")
def tensorrt(tensorrt_headers: Path) -> str:
    """The version that the fake TensorRT has."""
    return VERSIONS[tensorrt_major(tensorrt_headers)]


@pytest.fixture
def there(fake_nvinfer: Path, fake_cuda: Path, tensorrt: str) -> dict[str, str]:
    """The environment of a process on a machine with a GPU and TensorRT, both fake."""
    major, minor, patch = map(int, tensorrt.split("."))
    settings = {
        "LD_LIBRARY_PATH": f"{fake_nvinfer}:{fake_cuda}",
        "FAKE_NVINFER_VERSION": str((major * 100 + minor) * 100 + patch),
        "FAKE_NVINFER_PYTHON": sys.executable,
        "FAKE_NVINFER_SERVER": str(FAKE_NVINFER.with_name("engine_server.py")),
        "FAKE_CUDA_SM": str(SM),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    return {**os.environ, **settings}


@pytest.fixture
def cpp(sanitized: Path, there: dict[str, str]) -> Callable[..., CppSession]:
    """A function from settings of the fakes to a process."""
    return lambda **settings: CppSession(sanitized, {**there, **settings})
