"""A real TensorRT parses and builds a model of one node with the library, and takes its plugin."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("torch")

from op_cases import (
    case_id,
    case_inputs,
    check_outputs,
    constant_states,
    exact_outputs,
    op_model,
    run_onnx,
)
from plugin_commands import PLUGIN_CASES

from edgeattn.engine import build
from edgeattn.engine.build import BuildReport, check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import LoweringError
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.ops.spec import Case, OpSpec

pytestmark = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
CASES = [case for case in SPEC.cases if case.dtype == "fp16"]


def stored(case: Case, file: Path) -> Path:
    """The model of one node, with the operator's function body inside."""
    onnx.save(op_model(SPEC, case, 21, dynamic=("B", "T")), file)
    return file


def checked(case: Case, model: Path, library: Path | None, *, sm: int = 80) -> BuildReport:
    """A build of `stored` for decoding and prefill."""

    def shapes(batch: int, rows: int) -> Sequence[tuple[int, ...]]:
        return SPEC.input_shapes(replace(case, dims={**case.dims, "B": batch, "T": rows}))

    names = [tensor.name for tensor in SPEC.inputs]
    bounds = zip(names, shapes(1, 1), shapes(2, 64), shapes(4, 512), strict=True)
    profiles = {name: (low, usual, high) for name, low, usual, high in bounds}
    return check_build(model, sm=sm, profiles=profiles, timeout_s=120, plugin_library=library)


@pytest.mark.parametrize(("spec", "case"), PLUGIN_CASES, ids=case_id)
def test_a_node_is_one_plugin_layer(spec: OpSpec, case: Case, library: Any, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(op_model(spec, case, 21), model)
    report = check_build(model, sm=80, profiles={}, timeout_s=120, plugin_library=library.path)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_node_of_any_length_is_one_plugin_layer(case: Case, library: Any, tmp_path: Path) -> None:
    report = checked(case, stored(case, tmp_path / "model.onnx"), library.path)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


def test_one_file_serves_onnx_runtime_and_tensorrt(library: Any, tmp_path: Path) -> None:
    """By its function body where there is no plugin; without either, what is missing is named."""
    case = next(case for case in CASES if case.name == "unequal-widths")
    file = stored(case, tmp_path / "model.onnx")
    content = file.read_bytes()

    inputs = case_inputs(SPEC, case)
    check_outputs(SPEC, case, run_onnx(onnx.load(file), inputs), exact_outputs(SPEC, case, inputs))

    for sm in (80, 86, 89, 120):
        for plugins, layers in ((library.path, 1), (None, 0)):
            report = checked(case, file, plugins, sm=sm)
            assert (report.status, report.reason, report.plugin_layers) == ("built", "", layers)
            assert report.sms == (sm,)
    assert file.read_bytes() == content

    stripped = onnx.load(file)
    del stripped.functions[:]
    onnx.save(stripped, tmp_path / "stripped.onnx")
    with pytest.raises(LoweringError, match=r"the plugin RecurrentLinearAttention.*no plugin lib"):
        checked(case, tmp_path / "stripped.onnx", None)
    report = checked(case, tmp_path / "stripped.onnx", library.path)
    assert (report.status, report.reason, report.plugin_layers) == ("built", "", 1)


@pytest.mark.parametrize(("constant", "output"), [(True, False), (True, True), (False, False)])
def test_which_states_tensorrt_cannot_update_in_place(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: bool, output: bool
) -> None:
    """Should this fail, `require_states` refuses what TensorRT has learned to build."""
    monkeypatch.setattr(build, "require_states", lambda library, model: None)
    model = op_model(SPEC, next(case for case in CASES if case.name == "unequal-widths"), 21)
    constant_states(model, constant=constant, output=output)
    onnx.save(model, tmp_path / "model.onnx")
    report = check_build(
        tmp_path / "model.onnx", sm=80, profiles={}, timeout_s=120, plugin_library=library.path
    )
    assert report.status == ("refused" if constant and not output else "built"), report.reason


def test_the_library_moves(library: Any, tmp_path: Path) -> None:
    moved = shutil.copy(library.path, tmp_path / "another name.so")
    report = checked(CASES[0], stored(CASES[0], tmp_path / "model.onnx"), Path(moved))
    assert (report.status, report.plugin_layers) == ("built", 1)


CREATE = """
import sys

import numpy as np
import tensorrt_rtx as trt


class Logger(trt.ILogger):
    def __init__(self):
        super().__init__()

    def log(self, severity, message):
        if severity == trt.ILogger.ERROR:
            print(message)


logger = Logger()
registry = trt.Runtime(logger).get_plugin_registry()
registry.load_library(sys.argv[1])
creator = registry.get_creator("RecurrentLinearAttention", "1", "edgeattn")
wrong = trt.PluginField("delta", np.array([2], dtype=np.int32), trt.PluginFieldType.INT32)
fields = trt.PluginFieldCollection([wrong])
assert creator.create_plugin("node", fields, trt.TensorRTPhase.BUILD) is None
"""


def test_what_a_plugin_refuses_is_in_tensorrt_s_own_log(library: Any) -> None:
    """Its logger has another layout than TensorRT 10, whose headers the library is built with."""
    done = subprocess.run(
        [sys.executable, "-c", CREATE, library.path], capture_output=True, text=True, check=True
    )
    assert "expected delta and normalise of 0 or 1, but 2 came" in done.stdout
    assert "delta" not in done.stderr
