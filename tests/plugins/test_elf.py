"""What the library asks of the system it is loaded on, and what of it can be seen there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NEWEST_GLIBC = (2, 35)  # JetPack 6.2
EXPORTS = {"getCreators", "setLoggerFinder", "edgeattnAbiVersion", "edgeattnVariantTable"}
LIBC = re.compile(r"(libc|libm|libdl|libpthread|ld-linux[\w-]*)\.so\.\d+")


@pytest.fixture(params=["library", "aarch64_library"])
def built(request: pytest.FixtureRequest) -> Any:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    return request.getfixturevalue(request.param)


def readelf(file: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", *options, str(file)], check=True, capture_output=True, text=True
    ).stdout


def test_it_needs_the_c_library_alone_and_no_new_one(built: Any) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf(built.path, "--dynamic"))
    assert needed
    assert all(LIBC.fullmatch(name) for name in needed), needed
    versions = re.findall(r"Name: GLIBC_(\d+)\.(\d+)", readelf(built.path, "--version-info"))
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= NEWEST_GLIBC


def test_it_shows_its_four_functions_alone(built: Any) -> None:
    symbols = readelf(built.path, "--dyn-syms").splitlines()
    rows = [row.split() for row in symbols if re.match(r"\s+\d+:", row)]
    shown = [row for row in rows if len(row) > 7 and row[4] != "LOCAL" and row[6] != "UND"]
    visible = {row[7].split("@")[0] for row in shown}
    assert visible == EXPORTS


def test_its_stack_and_text_are_no_concern(built: Any) -> None:
    segments = readelf(built.path, "--segments")
    stack = next(row for row in segments.splitlines() if "GNU_STACK" in row)
    assert "RWE" not in stack
    assert "TEXTREL" not in readelf(built.path, "--dynamic")
