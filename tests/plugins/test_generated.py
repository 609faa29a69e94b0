"""Generated headers are those of today's dossiers and kernels; every operator has its sources."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from edgeattn.ops import ALL_OPS
from edgeattn.ops.cpp_header import cpp_header


@pytest.fixture
def plugins(repository: Path) -> Path:
    return repository / "plugins"


def operators(plugins: Path) -> list[str]:
    return sorted(source.stem for source in (plugins / "ops").glob("*.cpp"))


def test_headers_of_operators_are_current(plugins: Path) -> None:
    for name in operators(plugins):
        spec = importlib.import_module(f"edgeattn.ops.{name}").SPEC
        text = (plugins / "generated" / f"{name}.h").read_text()
        assert text == cpp_header(spec), "python -m edgeattn.ops.cpp_header plugins/generated"


def test_headers_of_kernels_are_current(plugins: Path) -> None:
    pytest.importorskip("triton")
    from edgeattn.kernels.cpp_header import cpp_header, operator_of
    from edgeattn.kernels.variants import all_kernels

    kernels = all_kernels().values()
    for name in operators(plugins):
        text = (plugins / "generated" / f"{name}_kernels.h").read_text()
        assert text == cpp_header([k for k in kernels if operator_of(k) == name]), (
            "python -m edgeattn.kernels.cpp_header plugins/generated"
        )


def test_operators_with_a_plugin_have_one(plugins: Path) -> None:
    declared = {spec.snake_name for spec in ALL_OPS if spec.plugin}
    assert declared <= set(operators(plugins))
    headers = {file.stem.removesuffix("_kernels") for file in (plugins / "generated").iterdir()}
    assert headers == set(operators(plugins))
