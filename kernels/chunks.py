"""What kernels have in common: tiles and products; decays between rows, of linear attention.

Every width is a multiple of `ALIGNMENT`, which the compiler sees in `n // ALIGNMENT * ALIGNMENT`:
only then it loads vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import triton
import triton.language as tl

from edgeattn.kernels.kernel import ArgumentType, Kernel
from edgeattn.ops.kernel_widths import ALIGNMENT

# Arguments of kernels that are integers, whatever they are called with.
INTEGERS = (
    "T",
    "H",
    "HKV",
    "DK",
    "DV",
    "DG",
    "delta",
    "gate_shift",
    "normalise",
    "L",
    "K",
    "M",
    "TILE",
    "G",
    "S",
    "D",
    "SPLITS",
    "groups",
    "B",
    "TQ",
    "C",
    "HB",
    "N",
    "LEVELS",
    "SEGMENT",
    "SEGMENTS",
    "POINTS",
    "sink",
    "window",
    "causal",
    "row_centre",
)

_ALIGNMENT = tl.constexpr(ALIGNMENT)

# What names of arguments mean in kernels of linear attention; all others are pointers to fp32.
_CONSTANTS = ("CHUNK", "BLOCK", "BLOCK_V", "CHANNELS", "SPAN")
_TYPES: Mapping[str, ArgumentType] = {
    **dict.fromkeys(("q", "k", "v", "y"), "*T"),
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(("scale", "epsilon"), "fp32"),
    "key_padding": "*i32",
}


def describe(operator: str, function: Any, programs: str, num_warps: int) -> Kernel:
    """The description of a kernel of linear attention.

    Args:
        operator: in snake_case.
        function: the `jit` function.
        programs: how many, as in `Kernel.grid`.
        num_warps: per program.
    """
    names = function.arg_names
    return Kernel(
        name=f"{operator}.{function.__name__}",
        function=function,
        arguments={n: _TYPES.get(n, "*fp32") for n in names if n not in _CONSTANTS},
        constants=tuple(n for n in names if n in _CONSTANTS),
        grid=(programs, "1", "1"),
        sizes=("B",),
        num_warps=num_warps,
        num_stages=1,  # where loops are pipelined, they say so
    )


def jit(function: Callable[..., Any]) -> Any:
    """The kernel, compiled for any integers as `aot` does it, not for some of them apart."""
    return triton.jit(function, do_not_specialize=INTEGERS)


@jit
def place_program(count: tl.tensor) -> tl.tensor:
    """Which of `count` parts of a head this program does, and of which head."""
    program = tl.program_id(0)
    return program % count, (program // count).to(tl.int64)


@jit
def aligned(width: tl.tensor) -> tl.tensor:
    """The width, as a number the compiler knows to be a multiple of `ALIGNMENT`."""
    return width // _ALIGNMENT * _ALIGNMENT


@jit
def load(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """Part of a matrix `[height, width]`, with zeros around it."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@jit
def store(
    matrix: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    part: tl.tensor,
) -> None:
    """Writes part of a matrix `[height, width]`, nothing beside it."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    part = part.to(matrix.dtype.element_ty)
    tl.store(matrix + rows[:, None] * width + columns[None, :], part, mask=inside)


@jit
def dot(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Product of matrices, accumulated in fp32.

    Args:
        a: its left operand.
        b: its right operand. Where both have 16 bits they are multiplied as they are.
        PRECISION: else that of `tl.dot`; or "halves": an operand in fp32 is made the sum of two of
            the other's dtype, in whose range its numbers must be.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        product = tl.dot(a, b)
    elif PRECISION == "halves" and a.dtype != tl.float32:
        high = b.to(a.dtype)
        product = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc=tl.dot(a, high))
    elif PRECISION == "halves" and b.dtype != tl.float32:
        high = a.to(b.dtype)
        product = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc=tl.dot(high, b))
    else:
        a, b = operand(a, PRECISION), operand(b, PRECISION)
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@jit
def weigh(weights: tl.tensor, rows: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Sums of rows with weights in fp32.

    For rows of 16 bits weights are rounded to their dtype, once they are divided by the largest of
    their sum so that no weight is out of its range.
    """
    if rows.dtype == tl.float32:
        sums = dot(weights, rows, PRECISION)
    else:
        largest = tl.maximum(tl.max(tl.abs(weights), axis=1), 1e-30)[:, None]
        sums = tl.dot((weights * (1 / largest)).to(rows.dtype), rows) * largest
    return sums


@jit
def operand(x: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Its fp32 values, for "tf32" rounded: tensor cores would cut the last 13 bits off."""
    if x.dtype != tl.float32:
        x = x.to(tl.float32)
    elif PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + (1 << 12)) >> 13 << 13).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN of all ones would become 0
    return x


@jit
def decay_sums(
    log_decay: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    DG: tl.tensor,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
) -> tl.tensor:
    """Sums of log-decays up to each of the rows before `end`, or from each: `[rows, WIDTH]`."""
    if WIDTH == 1:  # Triton 3.6 cannot sum up a matrix of one column
        g = tl.load(log_decay + rows, mask=rows < end, other=0.0)
        sums = tl.cumsum(g, axis=0, reverse=REVERSE)[:, None]
    else:
        g = load(log_decay, rows, tl.arange(0, WIDTH), end, DG)
        sums = tl.cumsum(g, axis=0, reverse=REVERSE)
    return sums


@jit
def decays_left(
    log_decay: tl.tensor,
    first: tl.tensor,
    T: tl.tensor,
    DG: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """What is left in the last row.

    Returns:
        Of each row, exp D_Cj: `[ROWS, WIDTH]`.
        Of the state before the first, e_C: `[1, WIDTH]`, or one number, which has no layout that
            Triton could choose badly.
    """
    rows = first + tl.arange(0, ROWS)
    sums = decay_sums(log_decay, rows + 1, tl.minimum(first + ROWS, T), DG, WIDTH, REVERSE=True)
    if WIDTH == 1:
        whole = tl.sum(tl.load(log_decay + rows, mask=rows < T, other=0.0))
    else:
        whole = tl.sum(tl.where(rows[:, None] == first, sums, 0.0), axis=0)[None, :]
        whole += load_row(log_decay, first, tl.arange(0, WIDTH), T, DG)[None, :]
    return tl.exp(sums), tl.exp(whole)


@jit
def pair_scores(
    x: tl.tensor,
    k: tl.tensor,
    log_decay: tl.tensor,
    first: tl.tensor,
    T: tl.tensor,
    DK: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Σ_d x_id k_jd exp D_ijd for j ≤ i, else 0: `[CHUNK (i), CHUNK (j)]`.

    Of one decay per channel the segment sums of a column are made from those of the next column:
    D_ij = g_j+1 + D_i,j+1.
    """
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    columns = tl.arange(0, BLOCK)
    if WIDTH == 1:
        rows = first + tl.arange(0, CHUNK)
        g = tl.load(log_decay + rows, mask=rows < T, other=0.0)
        decays = tl.exp(tl.cumsum(tl.where(i > j, g[:, None], 0.0), axis=0))
        keys = load(k, rows, columns, T, DK)
        scores = tl.where(i >= j, dot(x, tl.trans(keys), PRECISION) * decays, 0.0)
    else:
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        between = tl.zeros([CHUNK, BLOCK], tl.float32)
        for later in range(CHUNK):
            row = CHUNK - 1 - later
            g = load_row(log_decay, first + row + 1, columns, T, DK)
            between = tl.where(i > row, between + g[None, :], 0.0)
            key = load_row(k, first + row, columns, T, DK)
            score = tl.sum(x * key[None, :] * tl.exp(between), axis=1)
            scores = tl.where((i >= row) & (j == row), score[:, None], scores)
    return scores


@jit
def recall(
    queries: tl.tensor,
    state: tl.tensor,
    normaliser: tl.tensor,
    columns: tl.tensor,
    DK: tl.tensor,
    normalise: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Products with the state and, with `normalise`, with the normaliser, `[rows, 1]`."""
    weights = tl.zeros([queries.shape[0], 1], tl.float32)
    if normalise:
        weights = tl.sum(
            queries * load_row(normaliser, 0, columns, 1, DK)[None, :], 1, keep_dims=True
        )
    return dot(queries, state, PRECISION), weights


@jit
def load_row(
    matrix: tl.tensor, row: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """One row of a matrix `[height, width]` in fp32, with zeros around it."""
    inside = (columns < width) & (row < height)
    return tl.load(matrix + row * width + columns, mask=inside, other=0.0).to(tl.float32)


@jit
def unit_inverse(a: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """(I + a)⁻¹ for a strict lower triangle a, `[CHUNK, CHUNK]`.

    The inverses x of diagonal blocks become those of blocks twice as large by x − x (a within the
    latter, outside the former) x.
    """
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    x = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -a, 0.0))
    size = 2
    while size < CHUNK:
        corner = (i // (2 * size) == j // (2 * size)) & (i // size != j // size)
        product = tl.dot(x, tl.where(corner, a, 0.0), input_precision="tf32x3")
        x -= tl.dot(product, x, input_precision="tf32x3")
        size *= 2
    return x
