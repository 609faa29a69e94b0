"""Every operator x case x implementation that needs no GPU, against the reference in fp32."""

from __future__ import annotations

import onnx
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
)

from edgeattn.engine.tensorrt_rtx import check_build, is_available
from edgeattn.errors import EdgeattnError
from edgeattn.exporters.check import lint
from edgeattn.ops import ALL_OPS
from edgeattn.ops.spec import DOMAIN, Case, OpSpec
from edgeattn.ops.torch_ops import TORCH_OPS, check_inputs, python_name, schema

CASES = list(all_cases())
OPSETS = (21, 23)


def torch_op(spec: OpSpec):
    return getattr(getattr(torch.ops, DOMAIN), python_name(spec)).default


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
    exact = exact_outputs(spec, case, inputs)
    if case.dtype == "bf16":  # ONNX Runtime has few operators in bf16 on a CPU
        feeds = {t.name: _numpy(x) for t, x in zip(spec.inputs, inputs, strict=True)}
        found = [
            torch.from_numpy(y.astype("float32"))
            for y in ReferenceEvaluator(proto).run(None, feeds)
        ]
        found = [y.to(torch.bfloat16) if i == 0 else y for i, y in enumerate(found)]
    else:
        found = run_onnx(proto, inputs)
    check_outputs(spec, case, found, exact)


def _numpy(x: torch.Tensor):
    import onnx_ir as ir

    return ir.tensor(x).numpy()


@pytest.mark.parametrize(("spec", "case"), CASES, ids=case_id)
def test_opcheck(spec: OpSpec, case: Case) -> None:
    results = torch.library.opcheck(
        torch_op(spec), tuple(case_inputs(spec, case)), dict(case.attributes)
    )
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


@pytest.mark.skipif(not is_available(), reason="TensorRT-RTX (extra rtx) is not installed")
@pytest.mark.parametrize("sm", [80, 86, 89, 120])
@pytest.mark.parametrize("spec", ALL_OPS, ids=case_id)
def test_function_body_builds_in_tensorrt_rtx(spec: OpSpec, sm: int, tmp_path) -> None:
    case = next(case for case in spec.cases if case.dtype == "fp16")
    file = tmp_path / "model.onnx"
    onnx.save(op_model(spec, case, 21), file)
    report = check_build(file, sm=sm, profiles={}, timeout_s=300)
    assert report.status == "built", report.reason
    assert report.plugin_layers == 0
