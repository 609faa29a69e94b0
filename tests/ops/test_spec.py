"""The dossier of an operator: what it refuses, and what all registered ones must hold."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

import edgeattn.ops
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.ops import ALL_OPS, find_op
from edgeattn.ops.spec import (
    DOMAIN,
    STANDARD_TOLERANCE,
    AttributeSpec,
    Case,
    OpSpec,
    Shape,
    TensorSpec,
    Tolerance,
    bind,
    value_range,
)
from edgeattn.verify.tolerance import FLOORS

INPUTS = (
    TensorSpec("x", ("B", "T", "D")),
    TensorSpec("past_state", ("B", "D", 4), ("fp32",), "S"),
    TensorSpec("length", ("B",), ("int32",), "I"),
)


def shapes_of_scan(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    dims = bind(INPUTS, inputs)
    return (dims["B"], dims["T"], attributes["heads"]), (dims["B"], dims["D"], 4)


SCAN = OpSpec(
    name="Scan2Way",
    inputs=INPUTS,
    outputs=(
        TensorSpec("y", ("B", "T", "H")),
        TensorSpec("present_state", ("B", "D", 4), ("fp32",), "S", updates="past_state"),
    ),
    attributes=(
        AttributeSpec("heads", "int"),
        AttributeSpec("scale", "float", 1.0),
        AttributeSpec("rule", "string", "linear"),
    ),
    infer_shapes=shapes_of_scan,
    reference=lambda *inputs, **attributes: None,
    function_body=lambda opset: pytest.fail("a body is built when it is asked for"),
    triton="os.path:join",
    plugin=True,
    variants=lambda dims, attributes: (),
    cases=(Case("tiny", {"B": 1, "T": 3, "D": 5}, "fp16", {"heads": 2}),),
    tolerance=STANDARD_TOLERANCE,
)
X, STATE, LENGTH = INPUTS
Y, PRESENT = SCAN.outputs
TINY = SCAN.cases[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "scan_2"}, "PascalCase"),
        ({"inputs": ()}, "needs inputs"),
        ({"cases": ()}, "needs inputs, outputs and cases"),
        ({"inputs": (X, X, STATE)}, "the name x is there twice"),
        ({"outputs": (replace(Y, name="x"),)}, "the name x is there twice"),
        ({"attributes": (AttributeSpec("y", "int", 1),)}, "the name y is there twice"),
        ({"attributes": (AttributeSpec("plugin_version", "int", 1),)}, "plugin_version is there"),
        ({"outputs": (replace(Y, name="y 1"),)}, "'y 1' does not match"),
        ({"outputs": (replace(Y, dtypes=("fp64",)),)}, "y has dtypes"),
        ({"outputs": (replace(Y, dtypes=()),)}, "y has dtypes"),
        ({"outputs": (replace(Y, dtypes=("fp32",)),)}, "other dtypes than type variable T"),
        ({"outputs": (replace(Y, shape=("B", "...")),)}, "behind other dimensions"),
        (
            {"inputs": (TensorSpec("x", ("...", "D")), TensorSpec("z", ("...", "D")))},
            "more than one input has ...",
        ),
        ({"outputs": (Y, replace(PRESENT, updates="state"))}, "present_state updates state"),
        ({"outputs": (Y, replace(PRESENT, updates="x"))}, "present_state updates x"),
        ({"inputs": (replace(X, updates="x"), STATE, LENGTH)}, "x is an input and updates"),
        ({"attributes": (AttributeSpec("heads", "int", 2.0),)}, "heads is no int by default"),
        ({"attributes": (AttributeSpec("heads", "int", True),)}, "heads is no int by default"),
        ({"cases": (TINY, TINY)}, "the name tiny is there twice"),
        ({"cases": (replace(TINY, dims={"B": 1}),)}, r"case tiny sizes \['B'\] instead of"),
        ({"cases": (replace(TINY, dtype="int8"),)}, "case tiny has dtype int8"),
        ({"cases": (replace(TINY, attributes={}),)}, "case tiny: .*int as its attribute heads"),
        ({"cases": (replace(TINY, attributes={"head": 1}),)}, "case tiny: .*'head' was given"),
        ({"triton": "os.path.join"}, "not 'module:function'"),
        ({"triton": None}, "variants of a kernel, and no kernel"),
        ({"variants": None}, "a plugin, and no variants"),
        ({"inputs": (replace(X, values="even"), STATE, LENGTH)}, "x has values 'even'"),
        ({"cases": (replace(TINY, values={"z": "unit"}),)}, "case tiny has values"),
        ({"cases": (replace(TINY, values={"x": "even"}),)}, "case tiny has values"),
        ({"inputs": (X, STATE, replace(LENGTH, values="1..S"))}, "length has values '1..S'"),
        ({"cases": (replace(TINY, values={"length": "1.."}),)}, "case tiny has values"),
        ({"cases": (replace(TINY, dtypes={"T": "fp32"}),)}, "case tiny has x in fp32"),
        (
            {"inputs": (X, STATE, replace(LENGTH, dtypes=("int32", "int8"), variable="B"))},
            "B is a size and a type variable with a choice",
        ),
        ({"tolerance": {"fp32": Tolerance(1e-5, "sums")}}, "tolerances are given for"),
        (
            {"tolerance": {**STANDARD_TOLERANCE, "fp16": Tolerance(2.0, "generous")}},
            "fp16 needs a floor",
        ),
        ({"tolerance": {**STANDARD_TOLERANCE, "fp16": Tolerance(1e-3, " ")}}, "and a reason"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^operator .*{words}"):
        replace(SCAN, **changes)


def test_attributes_are_completed_and_checked() -> None:
    assert SCAN.complete_attributes({"heads": 3}) == {"heads": 3, "scale": 1.0, "rule": "linear"}
    with pytest.raises(RuntimeInputError, match="int as its attribute heads, but None"):
        SCAN.complete_attributes({})
    with pytest.raises(RuntimeInputError, match="float as its attribute scale, but 'x'"):
        SCAN.complete_attributes({"heads": 3, "scale": "x"})
    with pytest.raises(RuntimeInputError, match=r"among .*'heads'.*'speed' was given"):
        SCAN.complete_attributes({"heads": 3, "speed": 1})


def test_shapes_follow_from_symbols() -> None:
    assert SCAN.input_shapes(TINY) == ((1, 3, 5), (1, 5, 4), (1,))
    assert SCAN.output_shapes((1, 3, 5), (1, 5, 4), (1,), heads=2) == ((1, 3, 2), (1, 5, 4))
    shapes = SCAN.output_shapes(("batch", "T", 5), (2, "D", 4), ("n",), heads=2)
    assert shapes == ((2, "T", 2), (2, 5, 4))  # a number is preferred to a name
    with pytest.raises(RuntimeInputError, match=r"past_state \[B, D, 4\] with D = 5, but .*6, 4"):
        SCAN.output_shapes((1, 3, 5), (1, 6, 4), (1,), heads=2)
    with pytest.raises(RuntimeInputError, match=r"with 4 = 4, but its shape is \[1, 5, 3\]"):
        SCAN.output_shapes((1, 3, 5), (1, 5, 3), (1,), heads=2)


def test_leading_dimensions_are_one_tuple() -> None:
    inputs = (TensorSpec("x", ("...", "N")), TensorSpec("g", ("N",)))
    assert bind(inputs, [(2, "T", 8), (8,)]) == {"...": (2, "T"), "N": 8}
    assert bind(inputs, [(8,), (8,)]) == {"...": (), "N": 8}
    with pytest.raises(RuntimeInputError, match=r"expected x \[\.\.\., N\], but its shape is \[\]"):
        bind(inputs, [(), (8,)])


def test_integers_between_two() -> None:
    spec = replace(SCAN, inputs=(X, STATE, replace(LENGTH, values="1..T")))
    assert value_range(spec.inputs[2].values, TINY) == (1, 3)
    assert value_range("2..2", TINY) == (2, 2)
    assert value_range("unit", TINY) is None
    leading = replace(TINY, dims={"T": (2, 3)})
    with pytest.raises(ValueError, match=r"case tiny: 1\.\.T are no integers"):
        value_range("1..T", leading)


def test_a_kernel_is_imported_when_it_is_asked_for() -> None:
    kernel = SCAN.kernel()
    assert kernel is not None
    assert kernel("a", "b") == "a/b"
    assert replace(SCAN, triton=None, variants=None, plugin=False).kernel() is None


def test_operators_are_found_by_name() -> None:
    for spec in ALL_OPS:
        assert find_op(spec.name) is spec
    with pytest.raises(UsageError, match="did you mean HadamardTransform"):
        find_op("HadamardTransfrom")


def test_every_file_of_an_operator_is_registered() -> None:
    modules = [m.name for m in pkgutil.iter_modules(edgeattn.ops.__path__)]
    found = [getattr(import_module(f"edgeattn.ops.{name}"), "SPEC", None) for name in modules]
    assert [s.name for s in found if s is not None] == sorted(s.name for s in ALL_OPS)
    assert len({s.name for s in ALL_OPS}) == len(ALL_OPS)


@pytest.mark.parametrize("spec", ALL_OPS, ids=lambda spec: spec.name)
def test_no_operator_is_called_like_a_built_in(spec: OpSpec) -> None:
    """TensorRT's parser and ONNX Runtime would take the built-in."""
    schemas = [*onnx.defs.get_all_schemas(), *get_all_operator_schema()]
    assert spec.name not in {s.name for s in schemas if s.domain != DOMAIN}


@pytest.mark.parametrize("spec", ALL_OPS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("opset", [20, 21, 23])
def test_function_bodies_follow_the_dossier(spec: OpSpec, opset: int) -> None:
    function = spec.function_body(opset)
    assert [v.name for v in function.inputs] == [t.name for t in spec.inputs]
    assert [v.name for v in function.outputs] == [t.name for t in spec.outputs]
    assert function.opset_imports[""] == opset


def test_the_standard_tolerance_is_the_one_of_verification() -> None:
    assert {d: t.floor for d, t in STANDARD_TOLERANCE.items()} == FLOORS


def test_dossiers_load_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, edgeattn.ops.spec, edgeattn.ops\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'numpy', 'triton'}\n"
        "assert edgeattn.ops.ALL_OPS\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
