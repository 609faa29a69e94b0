"""Every operator x case x dtype x implementation without a GPU, against the reference in fp32."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from op_cases import (
    all_cases,
    case_id,
    case_inputs,
    check_outputs,
    exact_outputs,
    op_model,
    outputs_of,
    run_onnx,
    torch_op,
)
from torch import Tensor, library

from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import EdgeattnError, RuntimeInputError
from edgeattn.exporters.check import lint
from edgeattn.ops import ALL_OPS
from edgeattn.ops.recurrent_linear_attention import SPEC as RECURRENT
from edgeattn.ops.spec import Case, OpSpec
from edgeattn.ops.torch_ops import TORCH_OPS, check_inputs, schema

CASES = list(all_cases())
# In the dossier's own dtype alone: what opcheck looks at hangs on none.
OWN = [(spec, case) for spec in ALL_OPS for case in spec.cases]
OPSETS = (21, 23)

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]"
)


@pytest.mark.parametrize(("spec", "case"), CASES, ids=case_id)
def test_torch_operator_is_the_reference(spec: OpSpec, case: Case) -> None:
    inputs = case_inputs(spec, case)
    found = outputs_of(torch_op(spec)(*inputs, **case.attributes))
    check_outputs(spec, case, found, exact_outputs(spec, case, inputs))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("spec", "case"), CASES, ids=case_id)
def test_function_body_is_the_reference(spec: OpSpec, case: Case, opset: int) -> None:
    inputs = case_inputs(spec, case)
    proto = op_model(spec, case, opset, dynamic=("B", "T"))
    onnx.checker.check_model(proto, full_check=True)
    assert list(lint(proto)) == []
    # ONNX Runtime has few operators in bf16 on a CPU
    run = run_in_onnx if case.dtype == "bf16" else run_onnx
    check_outputs(spec, case, run(proto, inputs), exact_outputs(spec, case, inputs))


def run_in_onnx(proto: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A model's outputs in onnx's own evaluator, in the dtypes they have there."""
    names = [value.name for value in proto.graph.input]
    feeds = {name: ir.tensor(x).numpy() for name, x in zip(names, inputs, strict=True)}
    found = ReferenceEvaluator(proto).run(None, feeds)
    return [
        torch.from_numpy(y.astype(np.float32)).bfloat16()
        if y.dtype.name == "bfloat16"
        else torch.from_numpy(y)
        for y in found
    ]


@pytest.mark.parametrize(("spec", "case"), OWN, ids=case_id)
def test_opcheck(spec: OpSpec, case: Case) -> None:
    results = library.opcheck(torch_op(spec), tuple(case_inputs(spec, case)), dict(case.attributes))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("spec", ALL_OPS, ids=case_id)
def test_schema_names_inputs_attributes_and_outputs(spec: OpSpec) -> None:
    found = torch_op(spec)._schema
    names = [argument.name for argument in found.arguments]
    assert names == [*(t.name for t in spec.inputs), *(a.name for a in spec.attributes), "impl"]
    assert len(found.returns) == len(spec.outputs)
    assert TORCH_OPS[spec.name] is not None
    assert schema(spec).startswith(f"(Tensor {spec.inputs[0].name}")


@pytest.mark.parametrize("spec", ALL_OPS, ids=case_id)
def test_refusals_of_the_torch_operator(spec: OpSpec) -> None:
    case = spec.cases[0]
    inputs = case_inputs(spec, case)
    with pytest.raises(EdgeattnError, match=f"operator {spec.name}.*float64"):
        check_inputs(spec, [inputs[0].double(), *inputs[1:]], {})
    with pytest.raises(EdgeattnError, match="like"):
        check_inputs(spec, [inputs[0].to(torch.bfloat16), *inputs[1:]], {})
    with pytest.raises(EdgeattnError, match="its shape is"):
        check_inputs(spec, [inputs[0], inputs[1][0], *inputs[2:]], {})
    with pytest.raises(EdgeattnError, match="attributes among"):
        check_inputs(spec, inputs, {"sclae": 1.0})
    with pytest.raises(EdgeattnError, match="implementation"):
        torch_op(spec)(*inputs, impl="cuda", **case.attributes)


@needs_triton
@pytest.mark.parametrize("spec", [spec for spec in ALL_OPS if spec.triton], ids=case_id)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_kernel_is_refused_on_a_cpu(spec: OpSpec, dtype: str) -> None:
    """In a sentence, and the reference is not taken in its place."""
    case = replace(spec.cases[0], dtype=dtype)
    inputs = case_inputs(spec, case)
    operator = torch_op(spec)
    assert operator(*inputs, **case.attributes, impl="reference") is not None
    with pytest.raises(RuntimeInputError, match=r"NVIDIA GPU .*, but they are on cpu.*impl="):
        operator(*inputs, **case.attributes, impl="triton")


@pytest.mark.parametrize("spec", [spec for spec in ALL_OPS if not spec.triton], ids=case_id)
def test_an_operator_without_a_kernel_says_so(spec: OpSpec) -> None:
    case = spec.cases[0]
    with pytest.raises(RuntimeInputError, match=f"a Triton kernel for operator {spec.name}, but"):
        torch_op(spec)(*case_inputs(spec, case), **case.attributes, impl="triton")


def test_no_runtime_has_an_operator_of_its_own_under_our_names() -> None:
    """TensorRT's parser minds no domain, and would take its own."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    taken = {schema.name for schema in get_all_operator_schema()}
    assert "LinearAttention" in taken
    assert taken.isdisjoint(spec.name for spec in ALL_OPS)


@pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="TensorRT-RTX (extra rtx) is not installed"
)
def test_tensorrt_has_no_operator_of_its_own_under_our_names() -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger()
    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    assert parser.supports_operator("Attention")
    assert not [spec.name for spec in ALL_OPS if parser.supports_operator(spec.name)]


@pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="TensorRT-RTX (extra rtx) is not installed"
)
@pytest.mark.parametrize("sm", [80, 86, 89, 120])
@pytest.mark.parametrize("spec", ALL_OPS, ids=case_id)
def test_function_body_builds_in_tensorrt_rtx(spec: OpSpec, sm: int, tmp_path) -> None:
    case = next(case for case in spec.cases if case.dtype == "fp16")
    file = tmp_path / "model.onnx"
    onnx.save(op_model(spec, case, 21), file)
    report = check_build(file, sm=sm, profiles={}, timeout_s=300)
    assert report.status == "built", report.reason
    assert report.plugin_layers == 0


def test_without_triton_its_kernels_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("edgeattn.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    inputs = case_inputs(RECURRENT, RECURRENT.cases[0])
    with pytest.raises(EdgeattnError, match=r"triton is not installed: .*edgeattn\[kernels\]"):
        torch_op(RECURRENT)(*inputs, impl="triton", **RECURRENT.cases[0].attributes)
