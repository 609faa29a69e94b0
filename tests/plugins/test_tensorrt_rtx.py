"""A real TensorRT parses and builds a model of one node with the library, and takes its plugin."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("torch")

from op_cases import op_model

from edgeattn.engine import tensorrt_rtx
from edgeattn.engine.tensorrt_rtx import RtxReport, check_build
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.ops.spec import Case

pytestmark = pytest.mark.skipif(
    not tensorrt_rtx.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
CASES = [case for case in SPEC.cases if case.dtype == "fp16"]


def checked(case: Case, model: Path, library: Path | None, *, sm: int = 80) -> RtxReport:
    onnx.save(op_model(SPEC, case, 21, dynamic=("B", "T")), model)

    def shapes(batch: int, rows: int) -> Sequence[tuple[int, ...]]:
        return SPEC.input_shapes(replace(case, dims={**case.dims, "B": batch, "T": rows}))

    names = [tensor.name for tensor in SPEC.inputs]
    bounds = zip(names, shapes(1, 1), shapes(2, 64), shapes(4, 512), strict=True)
    profiles = {name: (low, usual, high) for name, low, usual, high in bounds}
    return check_build(model, sm=sm, profiles=profiles, timeout_s=120, plugin_library=library)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_node_is_one_plugin_layer(case: Case, library: Any, tmp_path: Path) -> None:
    report = checked(case, tmp_path / "model.onnx", library.path)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


@pytest.mark.parametrize("sm", [86, 89, 120])
def test_it_builds_for_all_gpus_with_kernels(sm: int, library: Any, tmp_path: Path) -> None:
    report = checked(CASES[0], tmp_path / "model.onnx", library.path, sm=sm)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


def test_without_the_library_the_body_is_built(tmp_path: Path) -> None:
    report = checked(CASES[0], tmp_path / "model.onnx", None)
    assert (report.status, report.plugin_layers) == ("built", 0)


def test_the_library_moves(library: Any, tmp_path: Path) -> None:
    moved = shutil.copy(library.path, tmp_path / "another name.so")
    report = checked(CASES[0], tmp_path / "model.onnx", Path(moved))
    assert (report.status, report.plugin_layers) == ("built", 1)
