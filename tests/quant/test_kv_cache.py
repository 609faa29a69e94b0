"""The int8 format of keys and values: rounding as ONNX has it, a rotation that scores ignore."""

from __future__ import annotations

import math

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
from torch import Tensor

from edgeattn.quant.hadamard import hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache, to_int8

WIDTHS = [8, 40, 64, 128]
SCALES = [1.0, 0.5, 0.1, 3e-3, 1.7, 250.0]
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
seeds = st.integers(0, 2**32 - 1)


def as_stored(scale: float, dtype: torch.dtype = torch.float32) -> float:
    """The scale as a graph in `dtype` holds it."""
    return float(torch.tensor(scale, dtype=dtype))


def brute_force(x: np.ndarray, scale: float) -> np.ndarray:
    """QuantizeLinear by its words: round half to even, then saturate."""
    rounded: np.ndarray = np.clip(np.rint(x / x.dtype.type(scale)), -128, 127)
    return rounded.astype(np.int8)


def quantize_linear(x: Tensor, scale: float) -> np.ndarray:
    """ONNX Runtime's operator, with an int8 zero point of 0."""
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    constants = [
        numpy_tensor.from_array(np.array(scale, x.numpy().dtype), "scale"),
        numpy_tensor.from_array(np.array(0, np.int8), "zero"),
    ]
    infos = [
        helper.make_tensor_value_info(name, kind, list(x.shape))
        for name, kind in (("x", TYPES[x.dtype]), ("y", TensorProto.INT8))
    ]
    graph = helper.make_graph([node], "rounding", infos[:1], infos[1:], constants)
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(["y"], {"x": x.numpy()})[0]
    return found


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    scale=st.floats(2**-20, 2**10, width=32),
)
def test_it_rounds_and_saturates_as_onnx_says(values: list[float], scale: float) -> None:
    x = np.array(values, np.float32)
    found = to_int8(torch.from_numpy(x), scale)
    assert found.dtype == torch.int8
    np.testing.assert_array_equal(found.numpy(), brute_force(x, scale))


@given(halves=st.lists(st.integers(-300, 300), min_size=1), power=st.integers(-10, 10))
def test_ties_go_to_the_even_integer(halves: list[int], power: int) -> None:
    """Steps of powers of two, where a tie is exact."""
    scale = 2.0**power
    x = torch.tensor(halves, dtype=torch.float32) / 2 * scale
    expected = [min(max(round(half / 2), -128), 127) for half in halves]
    assert to_int8(x, scale).tolist() == expected


@given(integers=st.lists(st.integers(-128, 127), min_size=1), scale=st.sampled_from(SCALES))
def test_integers_stay_what_they_are(integers: list[int], scale: float) -> None:
    held = torch.tensor(integers, dtype=torch.int8)
    assert torch.equal(to_int8(held.float() * scale, scale), held)


@given(seed=seeds, scale=st.sampled_from(SCALES))
def test_what_is_not_clipped_errs_half_a_step(seed: int, scale: float) -> None:
    noise = torch.rand(500, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x = noise * 127 * scale
    assert ((to_int8(x, scale) * scale - x).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("scale", SCALES)
def test_onnxruntime_gives_the_same_integers(scale: float) -> None:
    scale = as_stored(scale)
    steps = torch.arange(-140, 141, 0.5) * scale
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30])
    x = torch.cat((torch.randn(40_000) * scale * 60, steps, far))
    expected = quantize_linear(x, scale)
    np.testing.assert_array_equal(to_int8(x, scale).numpy(), expected)
    assert (expected.min(), expected.max()) == (-128, 127)


@pytest.mark.parametrize("scale", SCALES[:-1])
def test_in_fp16_a_rounded_quotient_may_make_a_tie_and_no_more(scale: float) -> None:
    scale = as_stored(scale, torch.float16)
    x = (torch.randn(40_000) * scale * 60).half()
    difference = to_int8(x, scale).numpy().astype(int) - quantize_linear(x, scale)
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.02


def test_what_is_rounded_is_left_alone() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    to_int8(x, 0.1)
    assert torch.equal(x, before)


def test_other_roundings_differ() -> None:
    """Half away from zero, towards zero, and a range that ends at -127."""
    x = torch.cat((torch.randn(1000) * 60, torch.tensor([0.5, 2.5, -130.0])))
    found = to_int8(x, 1.0)
    for wrong in (
        ((x.abs() + 0.5).floor() * x.sign()).clamp(-128, 127),
        x.trunc().clamp(-128, 127),
        x.round().clamp(-127, 127),
    ):
        assert not torch.equal(found, wrong.to(torch.int8))


def heads(width: int, count: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, length, width, dtype=torch.float64, generator=generator)


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Every query with every key of its group."""
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return queries @ keys.transpose(-1, -2)


@given(width=st.sampled_from(WIDTHS), seed=seeds)
def test_scores_are_those_without_rotation(width: int, seed: int) -> None:
    cache = Int8Cache(1.0, 1.0, hadamard_factors(width))
    queries, keys = heads(width, 4, 3, seed), heads(width, 2, 5, seed + 1)
    found = scores(cache.rotate(queries), cache.rotate(keys))
    assert (found - scores(queries, keys)).abs().max() < 1e-12 * width
    assert (scores(queries, cache.rotate(keys)) - scores(queries, keys)).abs().max() > 0.1


@given(width=st.sampled_from(WIDTHS), seed=seeds)
def test_rotating_twice_gives_what_was_there(width: int, seed: int) -> None:
    cache, x = Int8Cache(1.0, 1.0, hadamard_factors(width)), heads(width, 2, 3, seed)
    assert (cache.rotate(cache.rotate(x)) - x).abs().max() < 1e-12
    assert (cache.rotate(x).norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-12


@pytest.mark.parametrize("width", WIDTHS)
def test_a_channel_that_stands_out_is_spread_over_all(width: int) -> None:
    cache, x = Int8Cache(1.0, 1.0, hadamard_factors(width)), torch.zeros(1, 1, 1, width)
    x[..., 3] = 10.0
    expected = torch.full_like(x, 10 / math.sqrt(width))
    torch.testing.assert_close(cache.rotate(x).abs(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_stay(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 40, dtype=dtype)
    found = Int8Cache(1.0, 1.0, hadamard_factors(40)).rotate(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)


def test_without_rotation_keys_are_as_they_are() -> None:
    cache, x = Int8Cache(0.25, 0.5), torch.randn(1, 2, 3, 8)
    assert cache.rotate(x) is x
    assert cache.scales == (0.25, 0.5)
