"""What a linear layer does to its input, against ONNX Runtime's operators."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnxruntime
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx import numpy_helper as numpy_tensor

from edgeattn.quant.activation import AS_IT_IS, INT8_HIGH, INT8_LOW, LinearInput, round_to_int8
from edgeattn.quant.hadamard import hadamard_factors, transform

TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
SCALES = [1.0, 0.5, 0.1, 3e-3, 1.7, 250.0]
seeds = st.integers(0, 2**32 - 1)


def quantize_dequantize(x: np.ndarray, scale: float) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime, int8 with zero point 0."""
    kind = TYPES[x.dtype]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    constants = [
        numpy_tensor.from_array(np.array(scale, x.dtype), "scale"),
        numpy_tensor.from_array(np.array(0, np.int8), "zero"),
    ]
    x_info, y_info = (helper.make_tensor_value_info(n, kind, list(x.shape)) for n in "xy")
    graph = helper.make_graph(nodes, "rounding", [x_info], [y_info], constants)
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(["y"], {"x": x})[0]
    return found


def as_stored(scale: float, dtype: torch.dtype = torch.float32) -> float:
    """The scale as a graph in `dtype` holds it."""
    return float(torch.tensor(scale, dtype=dtype))


@pytest.mark.parametrize("scale", SCALES)
def test_rounding_is_that_of_onnx(scale: float) -> None:
    scale = as_stored(scale)
    x = torch.randn(40_000) * scale * 60
    expected = quantize_dequantize(x.numpy(), scale)
    np.testing.assert_array_equal(round_to_int8(x, scale).numpy(), expected)
    assert abs(expected).max() > 126 * scale, "the range is used"


@pytest.mark.parametrize("scale", SCALES)
def test_ties_ends_and_what_lies_beyond_them(scale: float) -> None:
    scale = as_stored(scale)
    steps = np.arange(-140, 141, 0.5, dtype=np.float32)
    x = np.concatenate([steps * np.float32(scale), [0.0, -0.0, 1e30, -1e30, 1e-30]])
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)]).astype(np.float32)
    found = round_to_int8(torch.from_numpy(x), scale).numpy()
    np.testing.assert_array_equal(found, quantize_dequantize(x, scale))
    assert found.max() == np.float32(scale) * INT8_HIGH
    assert found.min() == np.float32(scale) * INT8_LOW


def test_ties_go_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -128.5])
    expected = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 127.0, -128.0])
    assert torch.equal(round_to_int8(x, 1.0), expected)


@given(seed=seeds, scale=st.floats(2**-20, 2**10, width=32))
def test_rounding_errs_at_most_half_a_step(seed: int, scale: float) -> None:
    noise = torch.rand(500, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x = noise * (127 * scale)
    found = round_to_int8(x, scale)
    assert ((found - x).abs() <= scale * 0.5001).all()
    assert torch.equal(round_to_int8(found, scale), found), "what is rounded stays"


@pytest.mark.parametrize("scale", SCALES[:-1])
def test_in_fp16_rounding_is_that_of_onnx_but_for_near_ties(scale: float) -> None:
    """The quotient is rounded to fp16 here and not there: that may make a tie, never more.

    A step is then as uneven as the fp16 products of scale and integer are.
    """
    scale = as_stored(scale, torch.float16)
    x = (torch.randn(40_000) * scale * 60).half()
    found = round_to_int8(x, scale)
    assert found.dtype == torch.float16
    difference = found.numpy().astype(float) - quantize_dequantize(x.numpy(), scale).astype(float)
    assert abs(difference).max() <= scale * (1 + 128 * 2**-10)
    assert (difference != 0).mean() < 0.02


def test_the_argument_is_left_alone() -> None:
    x = torch.randn(32)
    before = x.clone()
    for read in (LinearInput(scale=0.1), LinearInput(hadamard_factors(32), 0.1), AS_IT_IS):
        read(x)
    assert torch.equal(x, before)


def test_by_default_the_input_is_read_as_it_is() -> None:
    x = torch.randn(3, 32)
    assert AS_IT_IS(x) is x
    assert LinearInput()(x) is x


@pytest.mark.parametrize("width", [32, 48, 172])
def test_the_rotation_comes_before_the_rounding(width: int) -> None:
    factors, x = hadamard_factors(width), torch.randn(5, 3, width)
    found = LinearInput(factors, 0.05)(x)
    assert torch.equal(found, round_to_int8(transform(x, factors), 0.05))
    other_way_round = transform(round_to_int8(x, 0.05), factors)
    assert (found - other_way_round).abs().max() > 0.01
    integers = found / 0.05
    torch.testing.assert_close(integers, integers.round())
    assert torch.equal(LinearInput(factors)(x), transform(x, factors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_stay(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 48, dtype=dtype)
    found = LinearInput(hadamard_factors(48), 0.05)(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
