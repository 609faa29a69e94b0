"""The C++ library, installed, and an application that finds it with CMake."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeattn.engine.toolchain import compiler_script, find_cmake, find_compiler
from edgeattn.errors import MissingDependencyError

_CONSUMER = Path(__file__).with_name("consumer")
_SYSROOT = os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Application:
    """What was built against the installed package.

    Attributes:
        installed: the package's prefix.
        folder: of the programs.
        runner: command before a program of another architecture.
    """

    installed: Path
    folder: Path
    runner: tuple[str, ...] = ()

    def run(self, program: str, *words: str, lines: Sequence[str] = ()) -> list[str]:
        """The lines a program answers with."""
        done = subprocess.run(
            [*self.runner, str(self.folder / program), *words],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout.splitlines()


@pytest.fixture(scope="session")
def build_application(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Application]:
    """A function from an architecture and compiler flags to the application."""

    def build(arch: str, *flags: str, runner: Sequence[str] = ()) -> Application:
        folder = tmp_path_factory.mktemp(f"cpp-{arch}")
        try:
            cmake, compiler = find_cmake(), find_compiler(arch)
        except MissingDependencyError as error:
            pytest.skip(str(error))
        script = compiler_script([*compiler, *flags], folder)
        if "-fsanitize" in str(flags) and not _compiles(script, folder):
            pytest.skip("needs the compiler's sanitizers (apt install libasan8 libubsan1)")
        (folder / "c").mkdir()
        of_c = [re.sub(r"g\+\+$", "gcc", "cc" if word == "c++" else word) for word in compiler]
        given = [f"-DCMAKE_C_COMPILER={compiler_script([*of_c, *flags], folder / 'c')}"]
        given += [f"-DCMAKE_CXX_COMPILER={script}"]
        given += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={arch}"]
        library, installed, programs = folder / "library", folder / "installed", folder / "programs"
        run([cmake, "-S", repository / "plugins" / "runtime", "-B", library, *given])
        run([cmake, "--build", library])
        run([cmake, "--install", library, "--prefix", installed])
        sources = shutil.copytree(_CONSUMER, folder / "consumer")
        shutil.rmtree(library)  # the package must not look into the tree it came from
        run([cmake, "-S", sources, "-B", programs, f"-Dedgeattn_ROOT={installed}", *given])
        run([cmake, "--build", programs])
        return Application(installed, programs, tuple(runner))

    return build


def run(command: Sequence[str | Path]) -> str:
    """What a command prints; its words are the assertion's where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compiles(script: Path, folder: Path) -> bool:
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [str(script), str(source), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def application(build_application: Callable[..., Application]) -> Application:
    """For this machine."""
    return build_application(platform.machine())


@pytest.fixture(scope="session")
def sanitized(build_application: Callable[..., Application]) -> Application:
    """Under the sanitizers for addresses and undefined behaviour, which end the program."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    return build_application(platform.machine(), *flags)


@pytest.fixture(scope="session")
def emulated(build_application: Callable[..., Application]) -> Application:
    """For Jetson, in qemu."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (apt install qemu-user)")
    if not Path(_SYSROOT, "lib", "libc.so.6").is_file():
        pytest.skip("needs an aarch64 C library (apt install libc6-arm64-cross)")
    return build_application("aarch64", runner=("qemu-aarch64", "-L", _SYSROOT))
