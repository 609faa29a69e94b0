"""The generator of pages, which is a tool and no part of the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def generator(repository: Path) -> Iterator[ModuleType]:
    """tools/docs_pages.py, loaded as mkdocs loads it: what stands beside it can be imported."""
    sys.path.insert(0, str(repository / "tools"))
    try:
        yield importlib.import_module("docs_pages")
    finally:
        sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def pages(generator: ModuleType) -> dict[str, str]:
    """Every generated page."""
    return generator.pages()
