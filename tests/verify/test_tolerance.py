"""The tolerance table and the error it bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edgeattn.verify.tolerance import FLOORS, allowed_error, relative_error

finite = st.floats(-1e4, 1e4, width=32)
tensors = arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=5), elements=finite)


def test_the_table() -> None:
    """The figures of the project's rules; a loosened row needs a written reason."""
    assert FLOORS == {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
    assert allowed_error("fp16", 0.001, quantized=False) == pytest.approx(0.004)
    assert allowed_error("fp16", 0.0, quantized=True) == 2e-3
    assert allowed_error("bf16", 0.0, quantized=True) == 1.6e-2
    assert allowed_error("fp32", 0.0, quantized=True) == 5e-5


def test_the_worst_token_counts() -> None:
    reference = np.ones((100, 8), np.float32)
    value = reference.copy()
    value[7] += 0.5
    assert relative_error(value, reference) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_an_infinite_error(bad: float) -> None:
    reference = np.ones((3, 4), np.float32)
    value = reference.copy()
    value[1, 2] = bad
    assert relative_error(value, reference) == np.inf


def test_another_shape_is_an_infinite_error() -> None:
    ones = np.ones((3, 4), np.float32)
    assert relative_error(ones[:2], ones) == np.inf
    assert relative_error(ones[:0], ones) == np.inf


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reference_that_is_no_number_never_passes(dtype: str, bad: float) -> None:
    reference = np.full((2, 2), bad, np.float32)
    error = relative_error(np.ones((2, 2), np.float32), reference)
    assert not error <= allowed_error(dtype, 0.0, quantized=False)


def test_nothing_equals_nothing() -> None:
    empty = np.ones((0, 4), np.float32)
    assert relative_error(empty, empty) == 0.0


def test_a_reference_of_zeros() -> None:
    zeros = np.zeros((2, 2), np.float32)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(zeros + 1e-30, zeros) == np.inf


@given(tensors)
def test_equal_tensors_have_no_error(reference: np.ndarray) -> None:
    assert relative_error(reference.copy(), reference) == 0.0


@given(tensors, st.sampled_from([-1.0, 0.5, 2.0]), st.integers(-10, 10))
def test_scaling_both_changes_nothing(reference: np.ndarray, factor: float, power: int) -> None:
    value = reference * np.float32(factor)
    error = relative_error(value, reference)
    scale = np.float32(2.0) ** power
    with np.errstate(under="ignore"):
        assume(np.array_equal(reference * scale / scale, reference))
        scaled = relative_error(value * scale, reference * scale)
    assert scaled == pytest.approx(error, rel=1e-6)


@given(tensors, st.data())
def test_a_wrong_token_is_never_averaged_away(reference: np.ndarray, data: st.DataObject) -> None:
    """A flipped sign of one token is an error of at least twice its share, however many others."""
    assume(np.abs(reference).max() > 1e-3)
    token = data.draw(st.integers(0, len(reference) - 1))
    value = reference.copy()
    value[token] = -value[token]
    rms = np.sqrt(np.square(reference.astype(np.float64)).mean())
    own = np.sqrt(np.square(reference[token].astype(np.float64)).mean())
    assert relative_error(value, reference) == pytest.approx(2 * own / rms, rel=1e-5)


@given(st.sampled_from(sorted(FLOORS)), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_allowed_grows_with_plain_torchs_error(
    dtype: str, low: float, more: float, quantized: bool
) -> None:
    smaller = allowed_error(dtype, low, quantized=quantized)
    assert FLOORS[dtype] <= smaller <= allowed_error(dtype, low + more, quantized=quantized)
