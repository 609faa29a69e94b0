"""libedgeattn as an archive that an application unpacks: built and packed by CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from edgeattn import __version__
from edgeattn.engine.toolchain import (
    ARCHITECTURES,
    TENSORRT_VARIABLE,
    compiler_script,
    find_cmake,
    find_compiler,
    find_cuda,
    find_json,
    find_tensorrt,
)
from edgeattn.errors import BundleError, MissingDependencyError, unknown_name
from edgeattn.pipeline.work import require_output

Progress = Callable[[str, int, int], None]
STAGES = ("configuring", "compiling", "packing")


@dataclass(frozen=True)
class LibraryPackage:
    """An archive.

    Attributes:
        path: the file.
        bytes: its size.
        arch: "x86_64" or "aarch64".
        adapters: TensorRTs that its sessions run on, as "trt10".
        standard_library: whose strings cross its C++ API: "libstdc++" (GNU's) or "libc++" (LLVM's).
            An application with the other one uses the C header.
    """

    path: Path
    bytes: int
    arch: str
    adapters: tuple[str, ...]
    standard_library: str


def package_path(folder: Path, arch: str) -> Path:
    """Where the archive for a processor will lie in a folder."""
    return folder / f"edgeattn-{__version__}-linux-{arch}.tar.gz"


def package_library(
    arch: str,
    folder: Path,
    *,
    tensorrt: Sequence[Path] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> LibraryPackage:
    """Builds libedgeattn for a processor, with an adapter for each TensorRT, and packs it.

    Args:
        arch: "x86_64" or "aarch64"; for another than this machine's a cross compiler is needed.
        folder: for the archive, made where it is not there.
        tensorrt: folders of TensorRT's headers; none looks where the system has them.
        force: replace an archive that is there.
        progress: called with a stage, and stages done and in all.

    Raises:
        BundleError: the place is in use, or it does not compile.
        MissingDependencyError: CMake, a compiler or headers are missing.
        UsageError: an unknown processor.
    """
    if arch not in ARCHITECTURES:
        raise unknown_name("processor", arch, ARCHITECTURES)
    folder.mkdir(parents=True, exist_ok=True)
    path = package_path(folder, arch)
    require_output(path, force=force)
    compiler, told = find_compiler(arch), progress or (lambda stage, done, total: None)
    headers = list(tensorrt) or _named_headers() or [find_tensorrt()]
    # The build lies beside the archive: one rename ends it, and nothing is left of a broken one.
    with (
        tempfile.TemporaryDirectory(prefix=".edgeattn-package-", dir=folder) as build,
        as_file(files("edgeattn.plugins")) as plugins,
    ):
        commands = _commands(plugins / "runtime", Path(build), arch, compiler, headers)
        for done, (stage, command) in enumerate(zip(STAGES, commands, strict=True)):
            told(stage, done, len(STAGES))
            _run(command)
        told(STAGES[-1], len(STAGES), len(STAGES))
        (Path(build) / path.name).replace(path)
    adapters = _adapters(path)
    return LibraryPackage(path, path.stat().st_size, arch, adapters, _standard_library(compiler))


def _named_headers() -> list[Path]:
    """Several folders, as CMake takes them."""
    named = os.environ.get(TENSORRT_VARIABLE, "").split(";")
    return [Path(place) for place in named] if len(named) > 1 else []


def _commands(
    sources: Path, build: Path, arch: str, compiler: Sequence[str], headers: Sequence[Path]
) -> list[list[str]]:
    cmake = find_cmake()
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": arch,
        "CMAKE_CXX_COMPILER": compiler_script(compiler, build),
        "EDGEATTN_JSON_INCLUDE": find_json().resolve(),
        "EDGEATTN_TENSORRT_INCLUDE": ";".join(str(place.resolve()) for place in headers),
        "EDGEATTN_CUDA_INCLUDE": find_cuda().resolve(),
        "CPACK_PACKAGE_FILE_NAME": package_path(build, arch).name.removesuffix(".tar.gz"),
    }
    given = [f"-D{name}={value}" for name, value in definitions.items()]
    jobs = str(os.cpu_count() or 1)
    return [
        [cmake, "-S", str(sources), "-B", str(build), *given],
        [cmake, "--build", str(build), "-j", jobs],
        [_cpack(cmake), "--config", str(build / "CPackConfig.cmake"), "-B", str(build)],
    ]


def _cpack(cmake: str) -> str:
    """CPack comes with CMake."""
    beside = Path(cmake).resolve().with_name("cpack")
    found = str(beside) if beside.is_file() else shutil.which("cpack")
    if found is None:
        raise MissingDependencyError(
            expected="CPack beside CMake", came="it is not there", todo="install edgeattn[plugins]"
        )
    return found


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [*done.stderr.splitlines(), *done.stdout.splitlines()]
        wrong = [line.strip() for line in lines if "rror" in line]
        said = " ".join((wrong or lines or ["nothing"])[0].split())
        raise BundleError(
            expected="libedgeattn to be built and packed",
            came=f"{Path(command[0]).name} says: {said}",
            todo="check the compiler and TensorRT's headers",
        )


def _adapters(archive: Path) -> tuple[str, ...]:
    with tarfile.open(archive) as packed:
        names = [Path(name).name for name in packed.getnames()]
    prefix, suffix = "libedgeattn_", ".so"
    found = [n for n in names if n.startswith(prefix) and n.endswith(suffix)]
    return tuple(sorted(n.removeprefix(prefix).removesuffix(suffix) for n in found))


def _standard_library(compiler: Sequence[str]) -> str:
    return "libc++" if "ziglang" in compiler else "libstdc++"
