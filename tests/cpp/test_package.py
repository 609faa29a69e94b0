"""An app outside the tree finds the installed package, links it and runs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeattn
from edgeattn.engine.toolchain import find_cmake, find_compiler

APP_CMAKE = f"""\
cmake_minimum_required(VERSION 3.22)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
project(app CXX)
find_package(edgeattn {edgeattn.__version__} CONFIG REQUIRED)
add_executable(app app.cpp)
target_link_libraries(app PRIVATE edgeattn::edgeattn)
"""
APP = """\
#include <edgeattn/bundle.hpp>
#include <edgeattn/edgeattn.h>
#include <edgeattn/sampling.hpp>
#include <iostream>

int main(int, char** argv)
{
    float const logits[] = {0, 3, 1};
    std::cout << edgeattn_version() << ' ' << edgeattn::Sampling{}.pick(logits, 3, 0) << '\\n';
    try
    {
        edgeattn::Bundle::open(argv[1]);
    }
    catch (edgeattn::Error const& error)
    {
        std::cout << error.what() << '\\n';
    }
}
"""


def app(folder: Path, prefix: Path, arch: str, configure: Callable[..., None]) -> Path:
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(APP_CMAKE)
    (folder / "app.cpp").write_text(APP)
    # A cross compiler's search stays in its own system otherwise.
    configure(
        folder,
        folder / "build",
        arch,
        f"-Dedgeattn_ROOT={prefix}",
        "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=BOTH",
    )
    subprocess.run([find_cmake(), "--build", folder / "build"], check=True, capture_output=True)
    return folder / "build" / "app"


def test_an_app_builds_against_the_package_and_runs(runtime: Any, tmp_path: Path) -> None:
    binary = app(tmp_path / "app", runtime.prefix, platform.machine(), runtime.configure)
    done = subprocess.run([binary, tmp_path], capture_output=True, text=True, check=True)
    version, sentence = done.stdout.splitlines()
    assert version == f"{edgeattn.__version__} 1"
    assert sentence.startswith(f"expected a bundle at {tmp_path}, but there is no manifest.json")


def test_an_app_for_aarch64_builds(
    runtime: Any, installed: Callable[[str], Path], tmp_path: Path
) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("is the native one here")
    prefix = installed("aarch64")
    binary = app(tmp_path / "app", prefix, "aarch64", runtime.configure)
    for file in (binary, next(prefix.glob("lib*/**/libedgeattn.so"))):
        header = file.read_bytes()[:20]
        assert header[:4] == b"\x7fELF"
        assert header[18:20] == b"\xb7\0"  # EM_AARCH64


def test_nothing_but_the_api_is_visible(runtime: Any) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (apt install binutils)")
    done = subprocess.run(
        ["nm", "-DC", "--defined-only", runtime.library], capture_output=True, text=True, check=True
    )
    names = [line.split(" ", 2)[2] for line in done.stdout.splitlines()]
    assert "edgeattn_pick" in names
    assert [name for name in names if "edgeattn" not in name] == []
    assert [name for name in names if "Sha256" in name or "nlohmann" in name] == []


def test_pkg_config_names_the_library(runtime: Any) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config")
    folder = next(runtime.prefix.glob("lib*/**/pkgconfig"))
    environment = {**os.environ, "PKG_CONFIG_PATH": str(folder)}

    def asked(option: str) -> str:
        return subprocess.run(
            ["pkg-config", option, "edgeattn"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    assert asked("--modversion") == edgeattn.__version__
    where, what = asked("--libs").split()
    assert (Path(where.removeprefix("-L")).resolve(), what) == (folder.parent, "-ledgeattn")
    include = asked("--cflags").split()[0].removeprefix("-I")
    assert Path(include).resolve() == runtime.prefix / "include"


def test_a_missing_json_header_is_named(tmp_path: Path) -> None:
    sources = Path(__file__).parents[2] / "plugins" / "runtime"
    done = subprocess.run(
        [find_cmake(), "-S", sources, "-B", tmp_path, f"-DEDGEATTN_JSON_INCLUDE={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "install Debian's nlohmann-json3-dev" in " ".join(done.stderr.split())


def test_another_standard_library_is_refused_when_an_app_is_compiled(
    runtime: Any, tmp_path: Path
) -> None:
    """Strings of two of them have two layouts: it would crash, or worse, when it runs."""
    (tmp_path / "app.cpp").write_text(APP)
    compiler = find_compiler(platform.machine())
    command = [*compiler, "-std=c++17", "-fsyntax-only", f"-I{runtime.prefix / 'include'}"]
    other = int("g++" in compiler[0])
    for with_libcpp in (other, 1 - other):
        done = subprocess.run(
            [*command, f"-DEDGEATTN_WITH_LIBCPP={with_libcpp}", tmp_path / "app.cpp"],
            capture_output=True,
            text=True,
            check=False,
        )
        refused = "C++ library: use its C header" in done.stderr
        assert refused == bool(done.returncode) == (with_libcpp == other), done.stderr
    compiled = next(runtime.prefix.glob("lib*/cmake/edgeattn/edgeattnConfig.cmake")).read_text()
    assert f'INTERFACE_COMPILE_DEFINITIONS "EDGEATTN_WITH_LIBCPP={1 - other}"' in compiled
