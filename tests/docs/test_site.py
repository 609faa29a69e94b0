"""The site is built strictly: what links nowhere fails the build."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeattn.devices.registry import device_names


@pytest.fixture(autouse=True)
def _with_mkdocs() -> None:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs is missing: pip install 'edgeattn[docs]'")


def build(repository: Path, tmp_path: Path, *, add: str = "") -> subprocess.CompletedProcess[str]:
    """Builds into tmp_path/site, with a line added to the page of concepts."""
    shutil.copytree(repository / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "concepts.md").open("a") as page:
        page.write(f"\n{add}\n")
    settings = f"INHERIT: {repository}/mkdocs.yml\ndocs_dir: docs\nsite_dir: site\n"
    settings += f"hooks: [{repository}/tools/docs_pages.py]\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_site_is_built(repository: Path, tmp_path: Path) -> None:
    done = build(repository, tmp_path)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    for name in device_names():
        assert (site / "targets" / f"{name}.html").is_file()
        assert f'href="targets/{name}.html"' in (site / "index.html").read_text("utf-8")
    assert (site / "source" / "benchmarks" / "results" / "quantize.json").is_file()
    concepts = html.unescape((site / "concepts.html").read_text("utf-8"))
    assert "generated:" not in concepts
    assert "q_per_kv" in concepts
    # What a browser loads lies in the site.
    loaded = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?:[^"]+)"', concepts)
    assert loaded == []


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[gone](gone.md)", "the target is not found"),
        ("[gone](errors.md#nothingerror)", "does not contain an anchor"),
        ("[gone](source/examples/python/gone.py)", "the target is not found"),
        ("<!-- generated: gone -->", "KeyError: 'gone'"),
    ],
)
def test_a_dead_link_fails_it(repository: Path, tmp_path: Path, link: str, said: str) -> None:
    done = build(repository, tmp_path, add=link)
    assert done.returncode != 0
    assert said in done.stderr
