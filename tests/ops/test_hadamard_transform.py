"""HadamardTransform: definition, reference and function body agree."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import RuntimeInputError
from edgeattn.ops.function import node
from edgeattn.ops.hadamard_transform import SPEC, function_body, reference
from edgeattn.ops.spec import DOMAIN, OP_VERSION, Case
from edgeattn.quant.hadamard import HadamardFactors, hadamard_factors, transform

DTYPES = {
    "fp32": (torch.float32, ir.DataType.FLOAT),
    "fp16": (torch.float16, ir.DataType.FLOAT16),
    "bf16": (torch.bfloat16, ir.DataType.BFLOAT16),
}
WIDTHS = [64, 128, 172, 576, 1536, 4864]


def dense(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (I ⊗ left ⊗ right) / sqrt(K M) as one product in fp64, `[..., N]`."""
    block = torch.kron(left.double(), right.double()) / math.sqrt(len(left) * len(right))
    blocks = x.shape[-1] // len(block)
    return (x.double().reshape(*x.shape[:-1], blocks, -1) @ block).reshape(x.shape)


def error(value: Tensor, exact: Tensor) -> float:
    """Root mean square, relative to the exact value's."""
    difference = (value.double() - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt())


def model(
    factors: tuple[Tensor, Tensor],
    leading: tuple[int | str, ...],
    width: int,
    dtype: str,
    opset: int,
) -> ir.Model:
    """x -> y with the factors as initialisers."""
    torch_dtype, onnx_dtype = DTYPES[dtype]
    kind = ir.TensorType(onnx_dtype)
    x = ir.Value(name="x", type=kind, shape=ir.Shape([*leading, width]))
    initializers = []
    for name, factor in zip(("left", "right"), factors, strict=True):
        tensor = ir.tensor(factor.to(torch_dtype), name=name)
        value = ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor)
        initializers.append(value)
    call = node(SPEC, [x, *initializers])
    call.outputs[0].name, call.outputs[0].type = "y", kind
    graph = ir.Graph(
        [x],
        call.outputs,
        nodes=[call],
        initializers=initializers,
        opset_imports={"": opset, DOMAIN: OP_VERSION},
        name="model",
    )
    return ir.Model(graph, ir_version=10, functions=[function_body(opset)])


def run(proto: onnx.ModelProto, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def factors_of(width: int) -> tuple[HadamardFactors, tuple[Tensor, Tensor]]:
    factors = hadamard_factors(width)
    return factors, (factors.left, factors.right)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_function_body_in_onnxruntime_is_the_dense_product(
    width: int, dtype: str, opset: int
) -> None:
    factors, matrices = factors_of(width)
    proto = ir.to_proto(model(matrices, ("batch", "length"), width, dtype, opset))
    onnx.checker.check_model(proto, full_check=True)
    x = torch.randn(2, 5, width).to(DTYPES[dtype][0])
    y = run(proto, x)
    exact = transform(x.double(), factors)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    plain = error(transform(x, factors), exact)
    assert error(y, exact) <= 2 * plain + SPEC.tolerance[dtype].floor
    if width <= 1536:
        assert torch.allclose(exact, dense(x, *matrices), rtol=0, atol=1e-12)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 5)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    factors, matrices = factors_of(128)
    names = tuple(f"d{i}" for i in range(len(leading)))
    x = torch.randn(*leading, 128)
    y = run(ir.to_proto(model(matrices, names, 128, "fp32", 21)), x)
    assert y.shape == x.shape
    assert error(y, transform(x.double(), factors)) < 1e-6


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    """Any matrices will do: these are not symmetric, so that no transposition goes unnoticed."""
    torch_dtype, _ = DTYPES[case.dtype]
    x, left, right = (torch.randn(shape).to(torch_dtype) for shape in SPEC.input_shapes(case))
    exact = reference(x.float(), left.float(), right.float()).double()
    if x.shape[-1] < 2000:
        assert error(exact, dense(x, left, right)) < 1e-6
    assert reference(x, left, right).dtype == x.dtype
    scaled = left.T / math.sqrt(len(left) * len(right))
    blocks = x.reshape(*x.shape[:-1], -1, len(left), len(right))
    plain = error((scaled @ blocks @ right).reshape(x.shape), exact)
    proto = ir.to_proto(model((left, right), x.shape[:-1], x.shape[-1], case.dtype, 21))
    if case.dtype == "bf16":  # ONNX Runtime has no product of bf16 on a CPU
        feeds = {"x": ir.tensor(x).numpy()}
        y = torch.from_numpy(ReferenceEvaluator(proto).run(None, feeds)[0].astype(np.float32))
    else:
        y = run(proto, x)
    assert error(y, exact) <= 2 * plain + SPEC.tolerance[case.dtype].floor


@pytest.mark.parametrize("width", WIDTHS)
def test_reference_is_the_transform(width: int) -> None:
    factors, matrices = factors_of(width)
    x = torch.randn(2, 3, width)
    assert error(reference(x, *matrices), transform(x.double(), factors)) < 1e-6
    twice = reference(reference(x, *matrices), *matrices)
    assert torch.allclose(twice, x, atol=1e-5)  # the factors are symmetric and orthogonal


def test_another_order_of_the_factors_is_another_operator() -> None:
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    x = torch.randn(4, 64)
    exact = dense(x, left, right)
    assert error(reference(x, left, right), exact) < 1e-6
    for wrong in ((right, left), (left.T, right), (left, right.T), (left.T, right.T)):
        assert error(reference(x, *wrong), exact) > 0.5
        assert error(run(ir.to_proto(model(wrong, (4,), 64, "fp32", 21)), x), exact) > 0.5


def test_fp16_overflows_no_sooner_than_its_result() -> None:
    _, matrices = factors_of(4864)
    x = torch.full((1, 4864), 500.0).half()
    y = run(ir.to_proto(model(matrices, (1,), 4864, "fp16", 21)), x)
    exact = reference(x.float(), *matrices).double()
    assert exact.abs().max() > 30000
    assert error(y, exact) < SPEC.tolerance["fp16"].floor


def test_the_function_has_nothing_tensorrt_stumbles_over() -> None:
    function = function_body(23)
    assert (function.domain, function.name) == (DOMAIN, SPEC.name)
    assert function.opset_imports == {"": 23}
    assert not function.graph.initializers
    assert list(ir.to_proto(function).attribute) == ["plugin_namespace", "plugin_version"]
    _, matrices = factors_of(64)
    proto = ir.to_proto(model(matrices, ("rows",), 64, "fp32", 23))
    attributes = {a.name: a.s for a in proto.graph.node[0].attribute}
    assert attributes == {"plugin_namespace": b"edgeattn", "plugin_version": b"1"}


def test_onnxruntime_folds_all_but_the_products(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    _, matrices = factors_of(576)
    proto = ir.to_proto(model(matrices, ("batch", "length"), 576, "fp32", 21))
    onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    assert sorted(kinds) == ["MatMul", "MatMul", "Reshape", "Reshape", "Shape"]


@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="TensorRT-RTX is not installed")
def test_tensorrt_runs_the_body_without_the_plugin(tmp_path: Path) -> None:
    _, matrices = factors_of(576)
    file = tmp_path / "model.onnx"
    ir.save(model(matrices, ("batch", "length"), 576, "fp16", 21), file)
    sizes = ((1, 1, 576), (1, 16, 576), (2, 128, 576))
    report = check_build(file, sm=86, profiles={"x": sizes}, timeout_s=120)
    assert report.status == "built", report.reason
    assert report.plugin_layers == 0


def test_shapes() -> None:
    assert SPEC.output_shapes((2, 7, 1536), (32, 32), (48, 48)) == ((2, 7, 1536),)
    assert SPEC.output_shapes((1, 9, 4, 64), (8, 8), (8, 8)) == ((1, 9, 4, 64),)
    symbolic = ("B", "T", 576)
    assert SPEC.output_shapes(symbolic, (24, 24), (24, 24)) == (symbolic,)
    assert SPEC.output_shapes(("T", "N"), ("K", "K"), (8, 8)) == (("T", "N"),)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 576), (24, 24), (16, 16)), r"a multiple of 24 x 16 numbers.*they have 576"),
        (((2, 576), (24, 12), (24, 24)), r"left \[K, K\] with K = 24.*is \[24, 12\]"),
        (((2, 576), (24, 24), (24,)), r"right \[M, M\].*is \[24\]"),
        (((), (24, 24), (24, 24)), r"x \[\.\.\., N\].*is \[\]"),
        (((2, 576), (24, 24)), r"3 inputs.*2 were given"),
        (((2, 0), (24, 24), (24, 24)), "they have 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple, words: str) -> None:
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*shapes)


def test_a_node_checks_the_shapes_it_knows() -> None:
    known = [ir.Value(name="x", shape=ir.Shape(["T", 576]))]
    known += [ir.Value(name=name, shape=ir.Shape([24, 24])) for name in ("left", "right")]
    assert node(SPEC, known).outputs[0].shape == ir.Shape(["T", 576])
    with pytest.raises(RuntimeInputError, match="they have 100"):
        node(SPEC, [ir.Value(name="x", shape=ir.Shape(["T", 100])), *known[1:]])
    assert node(SPEC, [ir.Value(name="x"), *known[1:]]).outputs[0].shape is None
    with pytest.raises(RuntimeInputError, match="'axis' was given"):
        node(SPEC, known, {"axis": 1})
