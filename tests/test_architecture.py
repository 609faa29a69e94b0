"""What the house promises about itself: light imports, small files, links that resolve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLAT_ROOMS = ("kernels", "exporters", "devices")
LONGEST_FILE = 400
HEAVY = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx", "onnxscript", "onnx_ir")


def _loaded_by(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}\nimport sys; print(*sys.modules, sep='\\n')"]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-I", "-c", f"{program}\nimport sys; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["edgeattn", "edgeattn.errors", "edgeattn.cli"])
def test_import_is_light(module):
    heavy = {*HEAVY, "numpy", "transformers", "tokenizers", "pydantic", "jinja2", "matplotlib"}
    assert _loaded_by(f"import {module}") & heavy == set()


@pytest.mark.parametrize("module", ["bundle", "runtime", "verify", "planner", "devices", "recipe"])
def test_light_half_imports_no_heavy_module(module):
    assert _loaded_by(f"import edgeattn.{module}") & {"torch", *HEAVY[2:4], "onnxscript"} == set()


def test_version_of_the_package_is_the_distributions():
    from importlib.metadata import version

    import edgeattn

    assert version("edgeattn") == edgeattn.__version__


@pytest.mark.parametrize("room", FLAT_ROOMS)
def test_flat_rooms_stay_flat_and_small(room):
    folders = [p.name for p in (REPOSITORY / room).iterdir() if p.is_dir()]
    assert [name for name in folders if name != "__pycache__"] == []
    long = {
        path.name: lines
        for path in (REPOSITORY / room).glob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_tests_are_no_package():
    """With tests/__init__.py pytest puts the root on sys.path, where kernels/ shadows others."""
    assert [str(p) for p in (REPOSITORY / "tests").rglob("__init__.py")] == []
    assert not (REPOSITORY / "conftest.py").exists()


def test_no_folder_is_imported_by_its_bare_name():
    bare = re.compile(rf"^\s*(?:from|import)\s+({'|'.join(FLAT_ROOMS)})\b", re.MULTILINE)
    rooms = ("edgeattn", "tests", "benchmarks", "examples", *FLAT_ROOMS)
    guilty = [
        str(path.relative_to(REPOSITORY))
        for room in rooms
        for path in (REPOSITORY / room).rglob("*.py")
        if bare.search(path.read_text())
    ]
    assert guilty == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "plugins/README.md"]
)
def test_local_links_resolve(page):
    path = REPOSITORY / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    anchors = {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        if file and not (path.parent / file).exists():
            broken.append(link)
        if not file and anchor not in anchors:
            broken.append(link)
    assert broken == []


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
