"""The C++ header of an operator says what its dossier says, and compiles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeattn.ops import ALL_OPS
from edgeattn.ops.cpp_header import cpp_header, write_headers
from edgeattn.ops.hadamard_transform import SPEC as HADAMARD
from edgeattn.ops.spec import STANDARD_TOLERANCE, AttributeSpec, Case, OpSpec, Shape, TensorSpec

INPUTS = (
    TensorSpec("x", ("B", "T", "D"), ("fp16", "bf16"), "T"),
    TensorSpec("past", ("B", "D", 4), ("fp32",), "S"),
    TensorSpec("length", ("B",), ("int32",), "I"),
    TensorSpec("mask", ("B", "T"), ("bool",), "M"),
)
OUTPUTS = (
    TensorSpec("y", ("B", "T", "D"), ("fp16", "bf16"), "T"),
    TensorSpec("present", ("B", "D", 4), ("fp32",), "S", updates="past"),
)


def shapes_of_scan(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    return inputs[0], inputs[1]


SPEC = OpSpec(
    name="FastScan2",
    inputs=INPUTS,
    outputs=OUTPUTS,
    infer_shapes=shapes_of_scan,
    reference=lambda *inputs, **attributes: None,
    function_body=lambda opset: None,  # type: ignore[arg-type,return-value]
    cases=(Case("small", {"B": 1, "T": 2, "D": 3}, "fp16", {"heads": 1}),),
    tolerance={dtype: STANDARD_TOLERANCE[dtype] for dtype in ("fp16", "bf16")},
    attributes=(
        AttributeSpec("heads", "int"),
        AttributeSpec("scale", "float", 1e-6),
        AttributeSpec("mode", "string", "fast"),
    ),
)

FACTS = """
#include "header.h"
#include <string_view>

using namespace edgeattn;
using namespace edgeattn::fast_scan2;
using std::string_view;

static_assert(string_view(kINFO.name) == "FastScan2" && string_view(kINFO.version) == "1");
static_assert(string_view(kINFO.pluginNamespace) == "edgeattn");
static_assert(string_view(kINFO.kernels) == "fast_scan2.");
static_assert(kINFO.symbols.size == 3 && string_view(kINFO.symbols[2]) == "D");
static_assert(kINFO.inputs.size == 4 && kINFO.outputs.size == 2);
static_assert(kINPUTS[1].shape[0].symbol == 0 && kINPUTS[1].shape[1].symbol == 2);
static_assert(kINPUTS[1].shape[2].symbol == -1 && kINPUTS[1].shape[2].size == 4);
static_assert(string_view(kINPUTS[1].variable) == "S" && kINPUTS[1].dtypes[0] == Dtype::kFP32);
static_assert(kINPUTS[0].dtypes.size == 2 && kINPUTS[0].dtypes[1] == Dtype::kBF16);
static_assert(kINPUTS[1].updates == -1 && kOUTPUTS[0].updates == -1 && kOUTPUTS[1].updates == 1);

struct Visitor
{
    int required{0};

    void operator()(char const*, int32_t&, bool isRequired) { required += isRequired; }
    void operator()(char const*, float&, bool isRequired) { required += 10 * isRequired; }
    void operator()(char const*, std::string&, bool isRequired) { required += 100 * isRequired; }
};

int main()
{
    Sizes sizes{5, 6, 7};
    Dims const dims = Op::Dims::of(sizes);
    void const* inputs[4] = {};
    void* outputs[2] = {&sizes, &sizes};
    Op::Tensors const tensors = Op::Tensors::of(inputs, outputs);
    int32_t const* length = tensors.length;
    float* present = tensors.present;
    Op::Attributes attributes;
    Visitor visitor;
    Op::Attributes::visit(attributes, visitor);
    bool const areDefaults = attributes.heads == 0 && attributes.scale == 1e-6F;
    bool const isText = attributes.mode == "fast";
    bool const isPlaced = length == nullptr && present == static_cast<void*>(&sizes);
    return !(dims.B == 5 && dims.T == 6 && dims.D == 7 && visitor.required == 1 && areDefaults
        && isText && isPlaced);
}
"""


@pytest.fixture
def compiled(repository: Path, tmp_path: Path) -> Callable[[OpSpec, str], Path]:
    """A function from an operator and C++ code, which finds header.h, to a program."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")

    def compile(spec: OpSpec, code: str) -> Path:
        (tmp_path / "header.h").write_text(cpp_header(spec))
        (tmp_path / "code.cpp").write_text(code)
        flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{repository / 'plugins'}")
        files = (str(tmp_path / "code.cpp"), "-o", str(tmp_path / "program"))
        subprocess.run(["g++", *flags, *files], check=True)
        return tmp_path / "program"

    return compile


def test_it_compiles_and_says_what_the_dossier_says(
    compiled: Callable[[OpSpec, str], Path],
) -> None:
    assert subprocess.run([compiled(SPEC, FACTS)], check=False).returncode == 0


def test_an_operator_without_attributes_compiles_too(
    compiled: Callable[[OpSpec, str], Path],
) -> None:
    bare = replace(SPEC, attributes=(), cases=(replace(SPEC.cases[0], attributes={}),))
    compiled(bare, '#include "header.h"\nint main() {}\n')


def test_files_are_called_after_the_operator(tmp_path: Path) -> None:
    write_headers([SPEC], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["fast_scan2.h"]
    assert "hadamard_transform" in [spec.snake_name for spec in ALL_OPS]


def test_any_number_of_dimensions_is_one_in_a_plugin(
    compiled: Callable[[OpSpec, str], Path],
) -> None:
    code = """#include "header.h"
using namespace edgeattn::hadamard_transform;
static_assert(kSHAPE_x[0].size == edgeattn::kLEADING && kSHAPE_x[1].size == 0);
int main() { return Dims::of({7, 64, 8, 8}).leading == 7 ? 0 : 1; }
"""
    assert subprocess.run([compiled(HADAMARD, code)], check=False).returncode == 0
