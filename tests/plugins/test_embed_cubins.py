"""Compiled kernels become sources, which do not compile with plugins of another version."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeattn.engine.embed_cubins import ASSEMBLY, REGISTRY, embed_cubins, operator_name
from edgeattn.errors import BundleError


def test_sources_change_with_a_cubin_alone(
    write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "cubins", [(87, "fp16", 64)])
    embed_cubins(manifest, tmp_path / "out")
    files = [tmp_path / "out" / name for name in (ASSEMBLY, REGISTRY)]
    before = [file.stat().st_mtime_ns for file in files]
    embed_cubins(manifest, tmp_path / "out")
    assert [file.stat().st_mtime_ns for file in files] == before
    content = json.loads(manifest.read_text())
    content["cubins"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    embed_cubins(manifest, tmp_path / "out")
    assert files[0].stat().st_mtime_ns != before[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "it cannot be read (No such file or directory)"),
        ("{", "it is no JSON"),
        ("[]", "its version is None, not 1"),
        ('{"version": 2}', "its version is 2, not 1"),
    ],
)
def test_a_bad_manifest_is_refused(text: str | None, problem: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(BundleError, match=problem.replace("(", r"\(").replace(")", r"\)")):
        embed_cubins(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_cubin_is_refused(write_manifest: Callable[..., Path], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [(87, "fp16", 64)])
    missing = next(tmp_path.glob("*.cubin"))
    missing.unlink()
    with pytest.raises(BundleError, match=re.escape(f"{missing.name} is missing")):
        embed_cubins(manifest, tmp_path / "out")


@pytest.mark.parametrize("changed", [False, True])
def test_kernels_of_another_signature_do_not_compile(
    changed: bool,
    write_manifest: Callable[..., Path],
    repository: Path,
    tensorrt_headers: Path,
    tmp_path: Path,
) -> None:
    def change(cubin: dict[str, Any]) -> dict[str, Any]:
        return {**cubin, "arguments": [["extra", "i32"], *cubin["arguments"]]}

    manifest = write_manifest(tmp_path, [(87, "fp16", 64)])
    content = json.loads(manifest.read_text())
    content["cubins"][0]["constants"]["PRECISION"] = "tf32"  # words are for the table alone
    if changed:
        content["cubins"] = [change(cubin) for cubin in content["cubins"]]
    manifest.write_text(json.dumps(content))
    embed_cubins(manifest, tmp_path / "out")
    plugins = repository / "plugins"
    folders = (plugins, plugins / "include", tensorrt_headers)
    done = subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        + [f"-I{folder}" for folder in folders]
        + [str(tmp_path / "out" / REGISTRY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) is changed, done.stderr
    assert ("compiled from another version: compile the kernels again" in done.stderr) is changed


def test_operators_are_named_after_their_kernels() -> None:
    name = operator_name("recurrent_linear_attention.decode")
    assert name == "RecurrentLinearAttention"
