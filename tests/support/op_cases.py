"""Inputs, graphs and errors for the cases of operators, the same for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from edgeattn.ops import ALL_OPS
from edgeattn.ops.function import node
from edgeattn.ops.spec import DOMAIN, OP_VERSION, Case, OpSpec, value_range
from edgeattn.ops.torch_ops import TORCH_OPS
from edgeattn.verify.operators import Sample

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int8": torch.int8,
}
ONNX = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
}
_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "any": lambda x: x,
    "zero": torch.zeros_like,
    "positive": lambda x: 1 + torch.abs(x),
    "non-negative": torch.abs,
    "non-positive": lambda x: -torch.nn.functional.softplus(x),
    "unit": torch.sigmoid,
    "unit-norm": lambda x: torch.nn.functional.normalize(x, dim=-1),
    "truth": lambda x: (x > 0.5).to(x.dtype),
    "series": lambda x: (1 + torch.tanh(x) / 50) / _factorials(x.shape[-1]),
    "large": lambda x: 100 * torch.abs(x),
}


def _factorials(count: int) -> Tensor:
    return torch.tensor([float(math.factorial(r)) for r in range(count)])


def cases_in_all_dtypes(spec: OpSpec) -> list[Case]:
    """Every case of an operator in every dtype that its type variable "T" may have."""
    allowed = next(t.dtypes for t in (*spec.inputs, *spec.outputs) if t.variable == "T")
    return [replace(case, dtype=dtype) for case in spec.cases for dtype in allowed]


def all_cases() -> Iterator[tuple[OpSpec, Case]]:
    """Every case of every operator in every dtype."""
    for spec in ALL_OPS:
        for case in cases_in_all_dtypes(spec):
            yield spec, case


def case_id(value: object) -> str:
    """A readable name of a parametrised test."""
    if isinstance(value, Case):
        return f"{value.name}-{value.dtype}"
    return str(value.name) if isinstance(value, OpSpec) else str(value)


def torch_op(spec: OpSpec) -> Callable[..., Any]:
    """The operator as torch calls it."""
    assert spec.name in TORCH_OPS  # whose import registers it
    operator: Callable[..., Any] = getattr(getattr(torch.ops, DOMAIN), spec.snake_name).default
    return operator


def dtype_of(tensor: Any, case: Case) -> str:
    """The dtype of one input or output in a case."""
    usual = case.dtype if case.dtype in tensor.dtypes else str(tensor.dtypes[0])
    return case.dtypes.get(tensor.variable, usual)


def case_inputs(spec: OpSpec, case: Case, *, seed: int = 0) -> list[Tensor]:
    """Random inputs as the dossier allows them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for tensor, shape in zip(spec.inputs, spec.input_shapes(case), strict=True):
        values, dtype = case.values.get(tensor.name, tensor.values), dtype_of(tensor, case)
        x = _numbers(values, case, torch.randn(shape, generator=generator))
        if dtype == "int8":  # the numbers it has
            x = (40 * x).round().clamp(-128, 127)
        inputs.append(x.to(TORCH[dtype]))
    return inputs


def _numbers(values: str, case: Case, x: Tensor) -> Tensor:
    """Numbers as the dossier names them, out of normal ones."""
    if (found := value_range(values, case)) is None:
        return _VALUES[values](x)
    least, largest = found
    return least + torch.floor(torch.special.ndtr(x) * (largest + 1 - least)).clamp(max=largest)


def case_sample(spec: OpSpec, case: Case, node: str) -> Sample:
    """A node as a bundle keeps it, had its graph computed what the reference does."""
    inputs = case_inputs(spec, case)
    # numpy has no bf16: there the numbers are kept as fp32
    arrays = tuple((x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in inputs)
    expected = tuple(y.numpy() for y in exact_outputs(spec, case, inputs))
    attributes = spec.complete_attributes(case.attributes)
    return Sample(node, spec.name, case.dtype, attributes, arrays, expected, expected)


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """What an implementation gave, always as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def widened(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in fp32, integers as they are."""
    return [x.float() if x.is_floating_point() else x for x in inputs]


def exact_outputs(spec: OpSpec, case: Case, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The reference in fp32, on the very inputs."""
    return outputs_of(spec.reference(*widened(inputs), **case.attributes))


def allowed_error(spec: OpSpec, case: Case, exact: Tensor, index: int) -> float:
    """Twice the error of rounding output `index` once, plus the dossier's floor."""
    rounded = exact.to(TORCH[dtype_of(spec.outputs[index], case)])
    return 2 * relative_error(rounded, exact) + spec.tolerance[case.dtype].floor


def check_outputs(
    spec: OpSpec, case: Case, found: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """Fails where an output is of another dtype or too far from the exact one."""
    for index, (value, right) in enumerate(zip(found, exact, strict=True)):
        assert value.dtype == TORCH[dtype_of(spec.outputs[index], case)]
        error = relative_error(value, right)
        allowed = allowed_error(spec, case, right, index)
        assert error <= allowed, f"{spec.outputs[index].name}: {error:.3g} > {allowed:.3g}"


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, relative to that of `exact`."""
    if value.shape != exact.shape or not value.isfinite().all():
        return math.inf
    difference = (value.double() - exact.double()).square().mean().sqrt()
    size = exact.double().square().mean().sqrt()
    return float(difference / size) if size > 0 else float(difference)


def op_model(
    spec: OpSpec, case: Case, opset: int, *, dynamic: Sequence[str] = ()
) -> onnx.ModelProto:
    """A model of one node; the dimensions named in `dynamic` are symbols."""
    inputs = []
    for tensor, sizes in zip(spec.inputs, spec.input_shapes(case), strict=True):
        symbols = tensor.shape if len(tensor.shape) == len(sizes) else sizes
        shape = [s if s in dynamic else size for s, size in zip(symbols, sizes, strict=True)]
        kind = ir.TensorType(ONNX[dtype_of(tensor, case)])
        inputs.append(ir.Value(name=tensor.name, type=kind, shape=ir.Shape(shape)))
    call = node(spec, inputs, case.attributes)
    for output, tensor in zip(call.outputs, spec.outputs, strict=True):
        output.name, output.type = tensor.name, ir.TensorType(ONNX[dtype_of(tensor, case)])
    graph = ir.Graph(
        inputs,
        call.outputs,
        nodes=[call],
        opset_imports={"": opset, DOMAIN: OP_VERSION},
        name=spec.name,
    )
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[spec.function_body(opset)]))


def run_onnx(proto: onnx.ModelProto, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A model's outputs in ONNX Runtime."""
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def constant_states(model: onnx.ModelProto, *, constant: bool, output: bool) -> None:
    """Makes the states of a model of one node constants, or takes their next values away."""
    for value in [v for v in model.graph.input if constant and v.name.startswith("past_")]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        zeros = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), value.name)
        model.graph.initializer.append(zeros)
        model.graph.input.remove(value)
    for value in [v for v in model.graph.output if not output and v.name.startswith("present_")]:
        model.graph.output.remove(value)
