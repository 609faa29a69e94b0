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

A single token proves nothing there either: one step at a massive activation is most of its token,
and a stream of 20,000 in fp16 has steps of 16. So for these schemes

    error(x) = max over sequences of the median over their tokens of
               rms(x - reference) / rms(reference), both of that token

of all steps of a sequence together. A number that is rounded otherwise spoils few tokens, a wrong
scale spoils all, a wrong mask or position those of a sequence. Of an int8 cache two numbers of a
token may be rounded otherwise in any case: in a narrow model plain torch may meet none.

What is rounded otherwise in one layer is amplified by the next ones, and that error is allowed to
any graph. So the layers are judged one by one too (`edgeattn.verify.layers`), each on the graph's
own inputs of it, with plain torch in the bundle's dtype; there all tokens are one sequence, because
one number of a first token that is rounded otherwise reaches, through the attention, all behind it.
And small errors may not add up: the mean
KL of the next token's distribution is at most twice that of plain torch plus 0.01 nats. That bound
is no fixed 0.01, and none is set on equal most likely tokens, because of checkpoints that such a
scheme leaves fragile: plain torch in fp16 is itself 0.09 nats from its fp32, with the same most
likely token at 78 to 85 % of places (SmolLM2-135M, w8a8 without rotation, measured).

fp32 without any such scheme knows amplification, too, in a model that lost something: of
SmolLM2-135M with one KV head and no training yet, one layer makes 5e-5 of 1e-6 at one token, where
plain torch happens to be lucky. `edgeattn.verify.amplified` says when that is not held against a
graph.
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
    if not lowering.decides_at_run_time:
        return [Plain(dtype)]
    return [Plain(dtype, "standard"), Plain(dtype, "primitive")]


def plain_dtypes(lowering: Lowering) -> tuple[str, ...]:
    """What plain torch computes in: the first in which the model does not overflow."""
    if lowering.dtype == "fp32" and lowering.scheme.rounds_at_run_time:
        return ("fp16", "bf16")
    return (lowering.dtype,)


def relative_error(value: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
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


def typical_error(
    value: NDArray[np.floating],
    reference: NDArray[np.floating],
    sequences: NDArray[np.integer] | None = None,
) -> float:
    """Root mean square difference, relative to the reference's of that token.

    Of the median token of that sequence where it is largest. NaN or infinity anywhere, or another
    shape, is an infinite error.

    Args:
        value: `[tokens, ...]`.
        reference: of the same shape.
        sequences: `[tokens]`, numbers that tell which sequence each token belongs to; None for one.
    """
    if (known := _without_measuring(value, reference)) is not None:
        return known
    difference, size = _token_rms(value - reference), _token_rms(reference)
    # A token of zeros is right where zeros are found, else wrong without measure.
    errors = np.where(difference > 0, np.inf, 0.0)
    np.divide(difference, size, out=errors, where=size > 0)
    if sequences is None:
        sequences = np.zeros(len(errors), np.int64)
    return max(
        float(np.quantile(errors[sequences == sequence], 0.5, method="higher"))
        for sequence in np.unique(sequences)
    )


def rounding_floor(reference: NDArray[np.floating]) -> float:
    """The relative error of a token of an int8 cache two of whose numbers are one step off.

    Args:
        reference: integers, `[tokens, ...]`.
    """
    size = float(np.sqrt(np.square(reference, dtype=np.float64).mean())) if reference.size else 0.0
    numbers = int(np.prod(reference.shape[1:]))
    return float(np.sqrt(2 / numbers) / size) if size > 0 else 0.0


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
