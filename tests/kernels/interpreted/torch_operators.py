"""Every operator with a kernel x case x dtype: torch's operator computes the same with either.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    all_cases,
    case_id,
    case_inputs,
    check_outputs,
    outputs_of,
    torch_op,
    widened,
)

from edgeattn.ops.spec import Case, OpSpec

# Triton's interpreter computes bf16 wrongly.
CASES = [(spec, case) for spec, case in all_cases() if spec.triton and case.dtype != "bf16"]


@pytest.mark.parametrize(("spec", "case"), CASES, ids=case_id)
def test_the_kernel_is_the_reference(spec: OpSpec, case: Case) -> None:
    operator, inputs = torch_op(spec), case_inputs(spec, case)
    before = [x.clone() for x in inputs]
    found = outputs_of(operator(*inputs, **case.attributes, impl="triton"))
    # A kernel may keep a state in place; torch's operator says that it mutates nothing.
    assert all(map(torch.equal, inputs, before))
    exact = operator(*widened(before), **case.attributes, impl="reference")
    check_outputs(spec, case, found, outputs_of(exact))
