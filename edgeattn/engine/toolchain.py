"""What compiles the plugin library on this machine: CMake, a C++ compiler, headers."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from edgeattn.errors import BundleError, MissingDependencyError

ARCHITECTURES = ("x86_64", "aarch64")
# The C library of JetPack 6 (Ubuntu 22.04): nothing newer may be asked for.
GLIBC = (2, 35)
TENSORRT_VARIABLE = "EDGEATTN_TENSORRT_INCLUDE"
CUDA_VARIABLE = "EDGEATTN_CUDA_INCLUDE"
JSON_VARIABLE = "EDGEATTN_JSON_INCLUDE"

_TENSORRT_HEADER = "NvInferRuntime.h"
_DEBIAN = {"x86_64": "g++-x86-64-linux-gnu", "aarch64": "g++-aarch64-linux-gnu"}
_GLIBC_VERSION = re.compile(rb"\0GLIBC_(\d+)\.(\d+)")


@dataclass(frozen=True)
class Toolchain:
    """What a build needs.

    Attributes:
        arch: of the library.
        compiler: command of the C++ compiler, which also assembles.
        cmake: command.
        tensorrt: folder of NvInferRuntime.h.
        cuda: folder of cuda_runtime_api.h.
    """

    arch: str
    compiler: tuple[str, ...]
    cmake: str
    tensorrt: Path
    cuda: Path

    def to_dict(self) -> dict[str, str]:
        """What a build depends on, JSON-ready."""
        return {
            "arch": self.arch,
            "compiler": shlex.join(self.compiler),
            "cmake": shlex.join([self.cmake, *_generator()]),
            "tensorrt": str(self.tensorrt),
            "cuda": str(self.cuda),
        }


def find_toolchain(arch: str, *, tensorrt: Path | None = None) -> Toolchain:
    """Looks for everything a build needs.

    Args:
        arch: of `ARCHITECTURES`.
        tensorrt: folder of TensorRT's headers, instead of looking.

    Raises:
        MissingDependencyError: something is missing; the sentence says what to install.
    """
    if tensorrt is not None and not (tensorrt / _TENSORRT_HEADER).is_file():
        raise MissingDependencyError(
            expected=f"{_TENSORRT_HEADER} in {tensorrt}",
            came="it is not there",
            todo="name the folder that holds TensorRT's headers",
        )
    return Toolchain(
        arch, find_compiler(arch), find_cmake(), tensorrt or find_tensorrt(), find_cuda()
    )


def build_library(toolchain: Toolchain, sources: Path, embedded: Path, folder: Path) -> Path:
    """Compiles the library; what did not change since the last time is not compiled again.

    Args:
        toolchain: from `find_toolchain`.
        sources: the folder plugins/.
        embedded: what `embed_cubins` wrote.
        folder: for the build, made where it does not exist.

    Returns:
        The library.

    Raises:
        BundleError: it does not compile, or needs a newer C library than JetPack's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = compiler_script(toolchain.compiler, folder)
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": toolchain.arch,
        "CMAKE_CXX_COMPILER": wrapper,
        "CMAKE_ASM_COMPILER": wrapper,
        "EDGEATTN_EMBEDDED": embedded.resolve(),
        "EDGEATTN_TENSORRT_INCLUDE": toolchain.tensorrt.resolve(),
        "EDGEATTN_CUDA_INCLUDE": toolchain.cuda.resolve(),
    }
    given = [f"-D{name}={value}" for name, value in definitions.items()]
    _run([toolchain.cmake, "-S", str(sources), "-B", str(folder), *_generator(), *given])
    jobs = str(os.cpu_count() or 1)
    _run([toolchain.cmake, "--build", str(folder), "-j", jobs, "--target", "edgeattn_plugins"])
    library = folder / "libedgeattn_plugins.so"
    if (newest := _newest_glibc(library)) <= GLIBC:
        return library
    zig = _zig(toolchain.arch)
    if zig and zig != toolchain.compiler:
        return build_library(replace(toolchain, compiler=zig), sources, embedded, folder / "zig")
    raise BundleError(
        expected=f"a plugin library for glibc {GLIBC[0]}.{GLIBC[1]}, that of JetPack 6",
        came=f"the compiler made one for {newest[0]}.{newest[1]}",
        todo="pip install ziglang, which compiles for any",
    )


def _generator() -> list[str]:
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def compiler_script(compiler: Sequence[str], folder: Path) -> Path:
    """The compiler as one file in a folder, which is all that CMake takes."""
    script = folder / "compiler"
    text = f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n'
    if not script.exists() or script.read_text("utf-8") != text:
        script.write_text(text, "utf-8")
        script.chmod(0o755)
    return script.resolve()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    came = _first_error(lines) or (lines[-1] if lines else f"exit code {done.returncode}")
    raise BundleError(
        expected="the plugin library to compile",
        came=f"{Path(command[0]).name} says: {came[:300]}",
        todo="report this with the compiler's and TensorRT's versions",
        details={"log": lines[-200:]},
    )


def _first_error(lines: Sequence[str]) -> str:
    """What a compiler or CMake found wrong, empty where neither says so."""
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):  # what is wrong follows, up to the call stack
            behind = lines[i + 1 : i + 4]
            return " ".join(itertools.takewhile(lambda text: "Call Stack" not in text, behind))
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return line
    return ""


def _newest_glibc(library: Path) -> tuple[int, int]:
    """The newest version of the C library that a library asks for."""
    versions = _GLIBC_VERSION.findall(library.read_bytes())
    return max(((int(a), int(b)) for a, b in versions), default=(0, 0))


def find_compiler(arch: str) -> tuple[str, ...]:
    """The command of a C++ compiler for an architecture: the system's, or else ziglang's.

    Raises:
        MissingDependencyError: there is none.
    """
    names = ["g++"] if arch == platform.machine() else []
    for name in (*names, f"{arch}-linux-gnu-g++"):
        if found := shutil.which(name):
            return (found,)
    if zig := _zig(arch):
        return zig
    raise MissingDependencyError(
        expected=f"a C++ compiler for {arch}",
        came=f"there is no {names[0] if names else _DEBIAN[arch]} and no ziglang",
        todo=f"pip install ziglang, or install Debian's {names[0] if names else _DEBIAN[arch]}",
    )


def _zig(arch: str) -> tuple[str, ...]:
    if find_spec("ziglang") is None:
        return ()
    target = f"{arch}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    return (sys.executable, "-m", "ziglang", "c++", "-target", target)


def find_cmake() -> str:
    """The command of CMake: the system's, or else the wheel's.

    Raises:
        MissingDependencyError: there is none.
    """
    if found := shutil.which("cmake"):
        return found
    spec = find_spec("cmake")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (binary := Path(folder, "data", "bin", "cmake")).is_file():
            return str(binary)
    raise MissingDependencyError(
        expected="CMake", came="it is not installed", todo="install edgeattn[plugins]"
    )


def find_tensorrt() -> Path:
    """The folder of TensorRT's headers.

    Raises:
        MissingDependencyError: there are none.
    """
    places = [Path(f"/usr/include/{machine}-linux-gnu") for machine in ARCHITECTURES]
    return _find_header(
        _TENSORRT_HEADER,
        TENSORRT_VARIABLE,
        [*places, Path("/usr/include")],
        f"TensorRT's headers 10.3 or later: install libnvinfer-headers-dev, or unpack NVIDIA's "
        f"archive and name its include folder in {TENSORRT_VARIABLE}",
    )


def find_cuda() -> Path:
    """The folder of CUDA's headers.

    Raises:
        MissingDependencyError: there are none.
    """
    wheels: list[Path] = []
    for package in ("nvidia.cuda_runtime", "nvidia.cu13"):
        spec = _find_nested(package)
        wheels += [Path(place, "include") for place in spec]
    return _find_header(
        "cuda_runtime_api.h",
        CUDA_VARIABLE,
        [Path("/usr/local/cuda/include"), *wheels, Path("/usr/include")],
        f"CUDA's headers: pip install nvidia-cuda-runtime nvidia-cuda-crt, or name their folder in "
        f"{CUDA_VARIABLE}",
        beside=("cuda.h", "crt/host_defines.h"),
    )


def find_json() -> Path:
    """The folder of nlohmann/json.hpp.

    Raises:
        MissingDependencyError: there is none.
    """
    wheel = [Path(place, "include") for place in _find_nested("nlohmann_json")]
    return _find_header(
        "nlohmann/json.hpp",
        JSON_VARIABLE,
        [*wheel, Path("/usr/include")],
        f"nlohmann's JSON: pip install nlohmann-json, or name its folder in {JSON_VARIABLE}",
    )


def _find_nested(package: str) -> Iterable[str]:
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:
        return []
    return (spec.submodule_search_locations or []) if spec else []


def _find_header(
    name: str,
    variable: str,
    places: Sequence[Path],
    what: str,
    beside: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Path:
    if given := environment.get(variable):
        if not Path(given, name).is_file():
            raise MissingDependencyError(
                expected=f"{name} in {given}, which {variable} names",
                came="it is not there",
                todo=f"set {variable} to the folder that holds it",
            )
        return Path(given)
    for place in places:
        if all((place / one).is_file() for one in (name, *beside)):
            return place
    title, _, todo = what.partition(": ")
    raise MissingDependencyError(expected=title, came=f"no {name} was found", todo=todo)
