"""The tolerance table: how far an implementation may be from the reference.

    error(x) = max over tokens of rms(x - reference) / rms(reference)
    allowed  = 2 * error(plain torch in low precision) + floor of the bundle's dtype

Low precision is the bundle's own dtype, but for schemes that round at run time in fp32 (below).

The reference computes one step above the bundle's dtype (fp32 for fp16 and bf16, fp64 for fp32) on
the same rounded weights. Twice the error of plain torch is the rule of the flash-attention tests: a
different order of summation is as inexact as the plain one, never much more. The floor covers what
the plain run gets exactly right by luck. The worst token counts, so that one wrong place is not
averaged away; within a token the root mean square does, which repeats from run to run where a
single largest element does not. Weight-only schemes are compared with torch on the
dequantised weights, at the same floors but for one row:

- fp32 with quantised weights, 5e-5: ONNX Runtime fuses DequantizeLinear and MatMul to MatMulNBits,
  whose fp32 kernel sums a row in one running accumulator where a blocked product has many. Measured
  on SmolLM2-135M: 2e-5 in single steps, 1e-6 with the fusion switched off.

Schemes that round at run time, to int8 activations or an int8 cache, turn a last bit into a whole
step where a number lies at a boundary. In fp32 so few do that plain torch may meet none where ONNX
Runtime meets one; there the plain run computes in fp16, in which enough of them do. And which
numbers do is chance: there two plain runs are made, with two spellings of attention, and the larger
error counts.

What is rounded otherwise in one layer is amplified by the next ones, and that error is allowed to
any graph. So the layers of these schemes are judged one by one too (`edgeattn.verify.layers`), each
on the graph's own inputs of it, with plain torch in the bundle's dtype and

    error(x) = median over tokens of rms(x - reference) / rms(reference), both of that token

A number that is rounded otherwise spoils few tokens of one layer, a wrong scale spoils all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeattn.planner.lowering import Lowering

if TYPE_CHECKING:
    from edgeattn.models.attention import OperatorForm

FLOORS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
FLOORS_QUANTIZED = {**FLOORS, "fp32": 5e-5}


@dataclass(frozen=True)
class Plain:
    """How plain torch computes.

    Attributes:
        dtype: of activations and weights.
        form: spelling of attention, None for the graph's own.
    """

    dtype: str
    form: OperatorForm | None = None


def plain_runs(lowering: Lowering, dtype: str) -> list[Plain]:
    """The runs whose error is what low precision costs anybody."""
    if not lowering.scheme.rounds_at_run_time:
        return [Plain(dtype)]
    return [Plain(dtype, "standard"), Plain(dtype, "primitive")]


def plain_dtypes(lowering: Lowering) -> tuple[str, ...]:
    """What plain torch computes in: the first in which the model does not overflow."""
    if lowering.dtype == "fp32" and lowering.scheme.rounds_at_run_time:
        return ("fp16", "bf16")
    return (lowering.dtype,)


def relative_error(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Root mean square difference of the worst token, relative to the reference's.

    NaN or infinity anywhere, or another shape, is an infinite error.

    Args:
        value: `[tokens, ...]`.
        reference: of the same shape.
    """
    if (known := _without_measuring(value, reference)) is not None:
        return known
    squares = np.square(value.astype(np.float64) - reference).reshape(len(reference), -1)
    difference = np.sqrt(squares.mean(axis=1).max())
    rms = np.sqrt(np.mean(np.square(reference, dtype=np.float64)))
    return float(difference / rms) if rms > 0 else (0.0 if difference == 0 else float("inf"))


def typical_error(value: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Root mean square difference of the median token, relative to the reference's of that token.

    NaN or infinity anywhere, or another shape, is an infinite error.

    Args:
        value: `[tokens, ...]`.
        reference: of the same shape.
    """
    if (known := _without_measuring(value, reference)) is not None:
        return known
    difference, size = _token_rms(value - reference), _token_rms(reference)
    # A token of zeros is right where zeros are found, else wrong without measure.
    errors = np.where(difference > 0, np.inf, 0.0)
    np.divide(difference, size, out=errors, where=size > 0)
    return float(np.quantile(errors, 0.5, method="higher"))


def _without_measuring(
    value: NDArray[np.floating], reference: NDArray[np.floating]
) -> float | None:
    """The error of what is not comparable or empty, None of everything else."""
    if value.shape != reference.shape or not all(np.isfinite(x).all() for x in (value, reference)):
        return float("inf")
    return 0.0 if reference.size == 0 else None


def _token_rms(tensor: NDArray[np.floating]) -> NDArray[np.float64]:
    squares = np.square(tensor, dtype=np.float64).reshape(len(tensor), -1)
    rms: NDArray[np.float64] = np.sqrt(squares.mean(axis=1))
    return rms


def allowed_error(dtype: str, low_precision_error: float, *, quantized: bool) -> float:
    """The bound on `relative_error`.

    Args:
        dtype: "fp32", "fp16" or "bf16", the dtype of the bundle.
        low_precision_error: of plain torch on the same tensor.
        quantized: whether weights are stored as integers.
    """
    floors = FLOORS_QUANTIZED if quantized else FLOORS
    return 2 * low_precision_error + floors[dtype]
