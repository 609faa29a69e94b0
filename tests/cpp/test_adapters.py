"""Which adapters are built follows from TensorRT's headers alone."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import pytest
from cmake_projects import configure, cuda_include, run

from edgeattn.engine.toolchain import find_cmake

SOURCES = Path(__file__).resolve().parents[2] / "plugins" / "runtime"
HEADERS_11 = "EDGEATTN_TENSORRT11_INCLUDE"


def build(headers: Path | str, folder: Path) -> set[str]:
    """The adapters that are built from headers."""
    places = {"EDGEATTN_TENSORRT_INCLUDE": headers, "EDGEATTN_CUDA_INCLUDE": cuda_include()}
    given = [f"-D{name}={place}" for name, place in places.items()]
    configure(SOURCES, folder, platform.machine(), *given)
    listed = run([find_cmake(), "--build", folder, "--target", "help"])
    found = set(re.findall(r"\bedgeattn_(trt\d+|rtx)\b", listed))
    targets = [f"edgeattn_{name}" for name in found]
    run([find_cmake(), "--build", folder, "-j2", "--target", *targets])
    return {file.stem.removeprefix("libedgeattn_") for file in folder.glob("libedgeattn_*.so")}


def test_from_headers_of_tensorrt_11(tmp_path: Path) -> None:
    headers = os.environ.get(HEADERS_11)
    if headers is None:
        pytest.skip(f"needs {HEADERS_11}, TensorRT 11's headers, which no package index has")
    assert build(Path(headers), tmp_path) == {"trt11", "rtx"}


def test_from_headers_that_say_they_are_of_rtx(tensorrt_headers: Path, tmp_path: Path) -> None:
    """Its own headers have another macro; with those of 11 beside them, they are taken."""
    headers = shutil.copytree(tensorrt_headers, tmp_path / "headers")
    version = headers / "NvInferVersion.h"
    text = version.read_text().replace("TRT_MAJOR_ENTERPRISE", "TRT_MAJOR_RTX")
    version.write_text(re.sub(r"TRT_MAJOR_RTX (\d+)", "TRT_MAJOR_RTX 1", text))
    major = re.findall(r"TRT_MAJOR_RTX (\d+)", text)[0]
    assert build(headers, tmp_path / "rtx") == {"rtx"}
    both = f"{tensorrt_headers};{headers}"
    assert build(both, tmp_path / "both") == {f"trt{major}", "rtx"}
    with pytest.raises(AssertionError, match="there are two"):
        build(f"{headers};{headers}", tmp_path / "twice")


def test_from_headers_that_say_they_are_of_11(tensorrt_headers: Path, tmp_path: Path) -> None:
    """Those of 10.14 under another number: the choice is tested, not what they declare."""
    headers = shutil.copytree(tensorrt_headers, tmp_path / "headers")
    version = headers / "NvInferVersion.h"
    text = version.read_text().replace("TRT_MAJOR_ENTERPRISE 10", "TRT_MAJOR_ENTERPRISE 11")
    version.write_text(text)
    assert build(headers, tmp_path / "build") == {"trt11", "rtx"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no NvInferVersion.h"),
        ("#define NV_TENSORRT_MAJOR 9\n", "are of another"),
    ],
)
def test_headers_that_cannot_be_used(text: str | None, sentence: str, tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    if text is not None:
        (headers / "NvInferVersion.h").write_text(text)
    with pytest.raises(AssertionError) as refusal:
        build(headers, tmp_path / "build")
    assert sentence in " ".join(str(refusal.value).split())
