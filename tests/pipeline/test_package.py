"""What `edgeattn package` refuses; tests/cpp builds against the archives it makes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from edgeattn.errors import BundleError, MissingDependencyError, UsageError
from edgeattn.pipeline.package import package_library, package_path

ARCH = platform.machine()


@pytest.fixture
def failing_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cmake that leaves something behind and fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "cmake"
    script.write_text("#!/bin/sh\ntouch $4/half\necho 'CMake Error: it broke' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_failing_build_leaves_nothing(
    failing_cmake: Path, tensorrt_headers: Path, tmp_path: Path
) -> None:
    for name in ("cpack", "other"):  # found beside it, or there is none to find
        (failing_cmake / name).write_text("")
    with pytest.raises((BundleError, MissingDependencyError)) as refusal:
        package_library(ARCH, tmp_path / "dist", tensorrt=[tensorrt_headers])
    assert "it broke" in str(refusal.value) or "was found" in str(refusal.value)
    assert list((tmp_path / "dist").iterdir()) == []


def test_what_is_there_is_not_replaced(tensorrt_headers: Path, tmp_path: Path) -> None:
    package_path(tmp_path, ARCH).write_text("mine")
    with pytest.raises(BundleError, match="but there is one: pass --force"):
        package_library(ARCH, tmp_path, tensorrt=[tensorrt_headers])
    assert package_path(tmp_path, ARCH).read_text() == "mine"


def test_an_unknown_processor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="riscv64"):
        package_library("riscv64", tmp_path)
