"""The wheel holds the tree: the one guard against a package that only the editable install sees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Folder in the tree -> folder in the wheel.
MAPPED = {
    "edgeattn": "edgeattn",
    "devices": "edgeattn/devices",
    "exporters": "edgeattn/exporters",
    "kernels": "edgeattn/kernels",
    "plugins": "edgeattn/plugins",
}
DATA_SUFFIXES = {".py", ".toml", ".html", ".j2"}

# tensorrt_cu13_libs can only be built where NVIDIA's own index is reachable; its metadata is known.
UV_CONFIG = '[[dependency-metadata]]\nname = "tensorrt-cu13-libs"\nrequires-dist = []\n'
X86_64 = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
JETPACK6 = ("--python-version", "3.10", "--python-platform", "aarch64-manylinux_2_31")
ALL_BUT_GPU = ["ort", "export", "kernels", "plugins", "rtx", "tensorrt", "hub", "report"]
ALL_BUT_GPU += ["docs", "examples", "dev"]
ALL_BUT_ORT = ["gpu", *ALL_BUT_GPU[1:]]


def _expected(tree: Path) -> dict[str, Path]:
    files = {}
    for folder, target in MAPPED.items():
        for path in sorted((tree / folder).rglob("*")):
            relative = path.relative_to(tree / folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if not path.is_file() or hidden or "__pycache__" in relative.parts:
                continue
            if folder == "plugins" or path.suffix in DATA_SUFFIXES or path.name == "py.typed":
                files[f"{target}/{relative.as_posix()}"] = path
    return files


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }


def test_wheel_holds_every_module_and_data_file(distributions):
    expected, actual = _expected(distributions.tree), _contents(distributions.wheel)
    missing = sorted(set(expected) - set(actual))
    packages = sorted({name.rpartition("/")[0].replace("/", ".") for name in missing})
    assert not missing, f"add to [tool.setuptools] packages or package-data: {packages}: {missing}"
    assert sorted(set(actual) - set(expected)) == []
    assert [n for n, path in expected.items() if path.read_bytes() != actual[n]] == []


def test_sdist_builds_the_wheel_that_the_tree_builds(distributions, build_distribution, tmp_path):
    build_distribution(distributions.tree, tmp_path, "--wheel")
    (direct,) = tmp_path.glob("*.whl")
    assert _contents(direct) == _contents(distributions.wheel)


def test_sdist_holds_what_a_packager_needs(distributions):
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "plugins/README.md"} <= names


def test_wheel_metadata(distributions):
    with zipfile.ZipFile(distributions.wheel) as archive:
        names = archive.namelist()
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(path).decode()
        entry_points = archive.read(path.replace("METADATA", "entry_points.txt")).decode()
    version = re.search(
        r'__version__ = "(.+)"', (distributions.tree / "edgeattn/__init__.py").read_text()
    )
    assert version
    assert f"\nVersion: {version[1]}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "edgeattn = edgeattn.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_base_install_is_light(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert names <= {
        *("click", "jinja2", "numpy", "onnx", "pydantic", "rich"),
        *("safetensors", "tokenizers", "tomli"),
    }


def _resolve(repository: Path, tmp_path: Path, extras: list[str], *options: str) -> str:
    """Resolve against PyPI alone: no local wheels, no configuration of this machine."""
    if shutil.which("uv", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("uv is not installed beside this Python (extra dev)")
    config = tmp_path / "uv.toml"
    config.write_text(UV_CONFIG)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "--config-file", config]
    command += ["--no-header", "--no-annotate", "--python", sys.executable, *options]
    command += [part for extra in extras for part in ("--extra", extra)]
    done = subprocess.run(
        [*command, repository / "pyproject.toml"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "error sending request" in done.stderr or "dns error" in done.stderr:
        pytest.skip(f"PyPI cannot be reached: {done.stderr}")
    return done.stdout if done.returncode == 0 else f"FAILED: {done.stderr}"


@pytest.mark.parametrize(
    ("extras", "platform"),
    [
        pytest.param(ALL_BUT_GPU, X86_64, id="all-with-ort"),
        pytest.param(ALL_BUT_ORT, X86_64, id="all-with-gpu"),
        pytest.param(["ort", "rtx", "tensorrt"], JETPACK6, id="jetpack6"),
    ],
)
def test_extras_resolve_together_on_plain_pypi(repository, tmp_path, extras, platform):
    resolved = _resolve(repository, tmp_path, extras, *platform)
    assert not resolved.startswith("FAILED"), resolved
    if "export" in extras:
        assert "\ntorch==2.13.0\n" in resolved
        assert "\ntriton==3.7.1\n" in resolved
    else:
        assert "torch" not in resolved


def test_a_conflicting_triton_pin_is_detected(repository, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    shutil.copytree(repository / "edgeattn", changed / "edgeattn")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, changed)
    text = (changed / "pyproject.toml").read_text()
    (changed / "pyproject.toml").write_text(text.replace("triton==3.7.1", "triton==3.8.0"))
    resolved = _resolve(changed, tmp_path, ["export", "kernels"], *X86_64)
    assert resolved.startswith("FAILED")
    assert "triton" in resolved
