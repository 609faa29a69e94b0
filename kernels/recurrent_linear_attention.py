"""Triton kernels of `RecurrentLinearAttention`, whose formulas and letters `edgeattn.ops` explains.

A few rows take one kernel, `decode`, which walks them with the state in registers. More go in
chunks: `prepare` (delta rules only) applies (I + A)⁻¹ to all that does not depend on the state,
`states` walks the rows and writes down the state before every span of them, `outputs` needs nothing
else and does all chunks at once. What `prepare` leaves, with X = (I + A)⁻¹ Diag(β):

    u = X V,  w = X (K ⊙ e),  so that U = u − w S, which `states` puts in the place of u.

A span is some chunks long, because states are large: one of 64 x 64 numbers, written and read,
moves as many bytes as 64 rows of q, k, v and y in fp16. The chunks of a span before the program's
own are seen through products of decays: of the key to the end of its chunk, of chunks between, and
from the start of the own chunk to the row.

Products are summed in fp32. With inputs in fp32 all is computed in fp32. With 16-bit inputs what
is no 16-bit number itself is multiplied in TF32, as exact as fp16 and of fp32's range (SM 75 has no
TF32 and multiplies in fp32), but where 16 bits will do: `_dot` in "halves", `_weigh`.

Programs lie along x alone, since a grid's other sides end at 65535. Every width is a multiple of
`ALIGNMENT`, which the compiler sees in `n // ALIGNMENT * ALIGNMENT`: only then it loads vectors.

In place: present_state and present_normaliser may be past_state and past_normaliser. Every program
reads what it will write before it writes, and nobody else reads it. For that, `decode` takes all
values of a head (BLOCK_V = BLOCK) where all of them need the normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels.kernel import ArgumentType, Kernel, cdiv
from edgeattn.ops.recurrent_linear_attention import ALIGNMENT, CHUNKED_LENGTH, SPEC, variants

_ALIGNMENT = tl.constexpr(ALIGNMENT)
_INTEGERS = ("T", "H", "HKV", "DK", "DV", "DG", "delta", "normalise")


def _jit(function: Callable[..., Any]) -> Any:
    """The kernel, compiled for any integers as `aot` does it, not for some of them apart."""
    return triton.jit(function, do_not_specialize=_INTEGERS)


@_jit
def _place(count: tl.tensor) -> tl.tensor:
    """Which of `count` parts of a head this program does, and of which head."""
    program = tl.program_id(0)
    return program % count, (program // count).to(tl.int64)


@_jit
def _aligned(width: tl.tensor) -> tl.tensor:
    return width // _ALIGNMENT * _ALIGNMENT


@_jit
def _load(
    matrix: tl.tensor, rows: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """Part of a matrix `[height, width]`, with zeros around it."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@_jit
def _store(
    matrix: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    part: tl.tensor,
) -> None:
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    part = part.to(matrix.dtype.element_ty)
    tl.store(matrix + rows[:, None] * width + columns[None, :], part, mask=inside)


@_jit
def _dot(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Product of matrices, accumulated in fp32.

    Args:
        a: its left operand.
        b: its right operand. Where both have 16 bits they are multiplied as they are.
        PRECISION: else that of `tl.dot`; or "halves" for an operand in fp32 as sum of two of the
            other's dtype, no number of which may be out of that dtype's range.
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
        a, b = _operand(a, PRECISION), _operand(b, PRECISION)
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@_jit
def _weigh(weights: tl.tensor, rows: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Sums of rows with weights in fp32.

    For rows of 16 bits weights are rounded to their dtype, once they are divided by the largest of
    their sum so that no weight is out of its range.
    """
    if rows.dtype == tl.float32:
        sums = _dot(weights, rows, PRECISION)
    else:
        largest = tl.maximum(tl.max(tl.abs(weights), axis=1), 1e-30)[:, None]
        sums = tl.dot((weights * (1 / largest)).to(rows.dtype), rows) * largest
    return sums


@_jit
def _operand(x: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Its fp32 values, for "tf32" rounded: tensor cores would cut the last 13 bits off."""
    if x.dtype != tl.float32:
        x = x.to(tl.float32)
    elif PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + (1 << 12)) >> 13 << 13).to(tl.float32, bitcast=True)
    return x


@_jit
def _decay_sums(
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
        g = _load(log_decay, rows, tl.arange(0, WIDTH), end, DG)
        sums = tl.cumsum(g, axis=0, reverse=REVERSE)
    return sums


@_jit
def _left(
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
    sums = _decay_sums(log_decay, rows + 1, tl.minimum(first + ROWS, T), DG, WIDTH, REVERSE=True)
    if WIDTH == 1:
        whole = tl.sum(tl.load(log_decay + rows, mask=rows < T, other=0.0))
    else:
        whole = tl.sum(tl.where(rows[:, None] == first, sums, 0.0), axis=0)[None, :]
        whole += _row(log_decay, first, tl.arange(0, WIDTH), T, DG)[None, :]
    return tl.exp(sums), tl.exp(whole)


@_jit
def _scores(
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
        keys = _load(k, rows, columns, T, DK)
        scores = tl.where(i >= j, _dot(x, tl.trans(keys), PRECISION) * decays, 0.0)
    else:
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        between = tl.zeros([CHUNK, BLOCK], tl.float32)
        for later in range(CHUNK):
            row = CHUNK - 1 - later
            g = _row(log_decay, first + row + 1, columns, T, DK)
            between = tl.where(i > row, between + g[None, :], 0.0)
            key = _row(k, first + row, columns, T, DK)
            score = tl.sum(x * key[None, :] * tl.exp(between), axis=1)
            scores = tl.where((i >= row) & (j == row), score[:, None], scores)
    return scores


@_jit
def _row(
    matrix: tl.tensor, row: tl.tensor, columns: tl.tensor, height: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """One row of a matrix `[height, width]` in fp32, with zeros around it."""
    inside = (columns < width) & (row < height)
    return tl.load(matrix + row * width + columns, mask=inside, other=0.0).to(tl.float32)


@_jit
def _inverse(a: tl.tensor, CHUNK: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
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
        product = tl.dot(x, tl.where(corner, a, 0.0), input_precision=PRECISION)
        x -= tl.dot(product, x, input_precision=PRECISION)
        size *= 2
    return x


@_jit
def decode(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    beta: tl.tensor,
    past_state: tl.tensor,
    past_normaliser: tl.tensor,
    y: tl.tensor,
    present_state: tl.tensor,
    present_normaliser: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    HKV: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    DG: tl.tensor,
    delta: tl.tensor,
    normalise: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """All rows of one key head, one after the other."""
    DK, DV = _aligned(DK), _aligned(DV)
    block, head = _place(tl.cdiv(DV, BLOCK_V))
    group = H // HKV
    keys, values = tl.arange(0, BLOCK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    q, y = q + head * group * T * DK, y + head * group * T * DV
    k, v = k + head * T * DK, v + head * T * DV
    log_decay, beta = log_decay + head * T * DG, beta + head * T
    state = _load(past_state + head * DK * DV, keys, values, DK, DV)
    normaliser = _row(past_normaliser, head, keys, head + 1, DK)
    for row in range(T):
        # One number or one per channel; which one unused channels take does not matter.
        decay = tl.exp(tl.load(log_decay + row * DG + tl.minimum(keys, DG - 1)))
        key, value = _row(k, row, keys, T, DK), _row(v, row, values, T, DV)
        state *= decay[:, None]
        if delta:
            value = tl.load(beta + row) * (value - tl.sum(state * key[:, None], axis=0))
        state += key[:, None] * value[None, :]
        if normalise:
            normaliser = decay * normaliser + key
        for member in range(group):
            query = _row(q + member * T * DK, row, keys, T, DK) * scale
            found = tl.sum(state * query[:, None], axis=0)
            if normalise:
                found /= tl.sum(normaliser * query) + epsilon
            place = y + (member * T + row) * DV + values
            tl.store(place, found.to(y.dtype.element_ty), mask=values < DV)
    tl.debug_barrier()  # threads that hold copies of an element have all read it
    _store(present_state + head * DK * DV, keys, values, DK, DV, state)
    tl.store(present_normaliser + head * DK + keys, normaliser, mask=(keys < DK) & (block == 0))


@_jit
def prepare(
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    beta: tl.tensor,
    u: tl.tensor,
    w: tl.tensor,
    T: tl.tensor,
    HKV: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    DG: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """X V and X (K ⊙ e) of one chunk of one key head."""
    PRECISION: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32"
    INVERSE: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32x3"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    DK, DV, DG = _aligned(DK), _aligned(DV), _aligned(DG) if CHANNELS else 1
    chunk, head = _place(tl.cdiv(T, CHUNK))
    first = chunk * CHUNK
    k, log_decay = k + head * T * DK, log_decay + head * T * DG
    rows, columns = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    rate = tl.load(beta + head * T + rows, mask=rows < T, other=0.0)
    keys = _load(k, rows, columns, T, DK)
    scores = _scores(keys, k, log_decay, first, T, DK, CHUNK, BLOCK, WIDTH, PRECISION)
    a = tl.where(i > j, rate[:, None] * scores, 0.0)
    x = _inverse(a, CHUNK, INVERSE) * rate[None, :]
    values = _load(v + head * T * DV, rows, columns, T, DV)
    _store(u + head * T * DV, rows, columns, T, DV, _dot(x, values, PRECISION))
    into = tl.exp(_decay_sums(log_decay, rows, T, DG, WIDTH, REVERSE=False))
    _store(w + head * T * DK, rows, columns, T, DK, _dot(x, keys * into, PRECISION))


@_jit
def states(
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    u: tl.tensor,
    w: tl.tensor,
    past_state: tl.tensor,
    past_normaliser: tl.tensor,
    states: tl.tensor,
    normalisers: tl.tensor,
    present_state: tl.tensor,
    present_normaliser: tl.tensor,
    T: tl.tensor,
    HKV: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    DG: tl.tensor,
    delta: tl.tensor,
    normalise: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """Some values of one key head's state, chunk after chunk; with `delta`, U too."""
    PRECISION: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "tf32"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    HALVES: tl.constexpr = "ieee" if k.dtype.element_ty == tl.float32 else "halves"
    # Rows of a step without `delta`, as many as registers hold.
    ROWS: tl.constexpr = CHUNK if CHANNELS or BLOCK == 128 else 2 * CHUNK
    DK, DV, DG = _aligned(DK), _aligned(DV), _aligned(DG) if CHANNELS else 1
    block, head = _place(tl.cdiv(DV, BLOCK_V))
    columns, values = tl.arange(0, BLOCK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    k, w = k + head * T * DK, w + head * T * DK
    v, u = v + head * T * DV, u + head * T * DV
    log_decay += head * T * DG
    states += head * tl.cdiv(T, SPAN) * DK * DV
    normalisers += head * tl.cdiv(T, SPAN) * DK
    state = _load(past_state + head * DK * DV, columns, values, DK, DV)
    normaliser = _row(past_normaliser, head, columns, head + 1, DK)
    if delta:
        for first in range(0, T, CHUNK):
            if first % SPAN == 0:
                _store(states + first // SPAN * DK * DV, values, columns, DV, DK, tl.trans(state))
            rows = first + tl.arange(0, CHUNK)
            known = _dot(_load(w, rows, columns, T, DK), state, PRECISION)
            update = _load(u, rows, values, T, DV) - known
            _store(u, rows, values, T, DV, update)
            of_rows, of_state = _left(log_decay, first, T, DG, CHUNK, WIDTH)
            keys = _load(k, rows, columns, T, DK) * of_rows
            kept = state * (tl.trans(of_state) if CHANNELS else of_state)
            state = kept + _dot(tl.trans(keys), update, PRECISION)
    else:
        for first in tl.range(0, T, ROWS, num_stages=3):
            if first % SPAN == 0:
                _store(states + first // SPAN * DK * DV, values, columns, DV, DK, tl.trans(state))
                place = normalisers + first // SPAN * DK + columns
                tl.store(place, normaliser, mask=(columns < DK) & (block == 0))
            rows = first + tl.arange(0, ROWS)
            of_rows, of_state = _left(log_decay, first, T, DG, ROWS, WIDTH)
            keys, update = _load(k, rows, columns, T, DK), _load(v, rows, values, T, DV)
            if normalise:
                normaliser = tl.sum(normaliser[None, :] * of_state, axis=0)
                normaliser += tl.sum(keys * of_rows, axis=0)
            if CHANNELS:
                added = _dot(tl.trans(keys * of_rows), update, HALVES)
            else:
                added = _dot(tl.trans(keys), update * of_rows, HALVES)
            state = state * (tl.trans(of_state) if CHANNELS else of_state) + added
    tl.debug_barrier()  # threads that hold copies of an element have all read it
    _store(present_state + head * DK * DV, columns, values, DK, DV, state)
    place = present_normaliser + head * DK + columns
    tl.store(place, normaliser, mask=(columns < DK) & (block == 0))


@_jit
def outputs(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    u: tl.tensor,
    states: tl.tensor,
    normalisers: tl.tensor,
    y: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    HKV: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    DG: tl.tensor,
    delta: tl.tensor,
    normalise: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """Some values of y of one chunk of one query head, from the state before its span of rows."""
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    DK, DV, DG = _aligned(DK), _aligned(DV), _aligned(DG) if CHANNELS else 1
    blocks = tl.cdiv(DV, BLOCK_V)
    part, head = _place(blocks * tl.cdiv(T, CHUNK))
    first = part // blocks * CHUNK
    kv_head = head // (H // HKV)
    span = kv_head * tl.cdiv(T, SPAN) + first // SPAN
    k, log_decay = k + kv_head * T * DK, log_decay + kv_head * T * DG
    v, u = v + kv_head * T * DV, u + kv_head * T * DV
    rows, columns = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    values = part % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    queries = _load(q + head * T * DK, rows, columns, T, DK)
    state = tl.trans(_load(states + span * DK * DV, values, columns, DV, DK))
    normaliser = normalisers + span * DK
    decays = tl.exp(_decay_sums(log_decay, rows, T, DG, WIDTH, REVERSE=False))
    if not CHANNELS:  # now, since that frees registers
        recalled, weights = _recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
    scores = _scores(queries, k, log_decay, first, T, DK, CHUNK, BLOCK, WIDTH, PRECISION)
    found = _updated(scores, u, v, rows, values, T, DV, delta, PRECISION)
    total = tl.sum(scores, axis=1)
    for behind in tl.range(CHUNK, first % SPAN + 1, CHUNK, num_stages=1):
        of_rows, of_state = _left(log_decay, first - behind, T, DG, CHUNK, WIDTH)
        keys = _load(k, rows - behind, columns, T, DK)
        if CHANNELS:
            scores = _dot(queries * decays, tl.trans(keys * of_rows), PRECISION)
        else:
            scores = _dot(queries, tl.trans(keys), PRECISION) * decays * tl.trans(of_rows)
        found += _updated(scores, u, v, rows - behind, values, T, DV, delta, PRECISION)
        total += tl.sum(scores, axis=1)
        decays *= of_state
    if CHANNELS:
        queries = queries * decays
        recalled, weights = _recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
    else:
        recalled, weights = recalled * decays, weights * decays
    factor = tl.full([CHUNK, 1], 1.0, tl.float32)
    if normalise:
        factor = 1 / (scale * (total[:, None] + weights) + epsilon)
    _store(y + head * T * DV, rows, values, T, DV, (found + recalled) * (scale * factor))


@_jit
def _recall(
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
        weights = tl.sum(queries * _row(normaliser, 0, columns, 1, DK)[None, :], 1, keep_dims=True)
    return _dot(queries, state, PRECISION), weights


@_jit
def _updated(
    scores: tl.tensor,
    u: tl.tensor,
    v: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    delta: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Products of scores with some rows and columns of U."""
    if delta:
        sums = _dot(scores, _load(u, rows, columns, height, width), PRECISION)
    else:
        sums = _weigh(scores, _load(v, rows, columns, height, width), PRECISION)
    return sums


_CONSTANTS = ("CHUNK", "BLOCK", "BLOCK_V", "CHANNELS", "SPAN")
_TYPES: Mapping[str, ArgumentType] = {
    **dict.fromkeys(("q", "k", "v", "y"), "*T"),
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(("scale", "epsilon"), "fp32"),
}


def _kernel(function: Any, programs: str, num_warps: int, num_stages: int) -> Kernel:
    """The description of a kernel here, where a name tells the type."""
    names = function.arg_names
    return Kernel(
        name=f"recurrent_linear_attention.{function.__name__}",
        function=function,
        arguments={n: _TYPES.get(n, "*fp32") for n in names if n not in _CONSTANTS},
        constants=tuple(n for n in names if n in _CONSTANTS),
        grid=(programs, "1", "1"),
        sizes=("B",),
        num_warps=num_warps,
        num_stages=num_stages,
    )


DECODE = _kernel(decode, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=4, num_stages=1)
PREPARE = _kernel(prepare, "cdiv(T, CHUNK) * B * HKV", num_warps=4, num_stages=1)
STATES = _kernel(states, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=8, num_stages=2)
OUTPUTS = _kernel(outputs, "cdiv(DV, BLOCK_V) * cdiv(T, CHUNK) * B * H", num_warps=4, num_stages=1)
KERNELS: tuple[Kernel, ...] = (DECODE, PREPARE, STATES, OUTPUTS)


_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# Rows of a chunk and from one state that is written down to the next, by CHANNELS. Of one decay per
# channel, all pairs of rows of a chunk are gone through one by one.
_CHUNKS, _SPANS = (64, 16), (128, 64)


def complete_constants(
    kernel: Kernel, constants: Mapping[str, int], normalise: int
) -> dict[str, int]:
    """All constants of a kernel, from those that `variants` of the operator gives."""
    block, channels = constants["BLOCK"], constants.get("CHANNELS", 0)
    whole = kernel is DECODE and normalise
    values = 64 if kernel is OUTPUTS else 32
    complete = {
        **constants,
        "BLOCK_V": block if whole else min(block, values),
        "CHUNK": _CHUNKS[channels],
        "SPAN": _SPANS[channels],
    }
    return {name: complete[name] for name in kernel.constants}


def workspaces(dims: Mapping[str, int], delta: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the kernels for chunks leave each other, in fp32."""
    heads, length, dk, dv = (dims["B"], dims["HKV"]), dims["T"], dims["DK"], dims["DV"]
    spans = cdiv(length, _SPANS[int(dims["DG"] > 1)])
    return {
        "u": (*heads, length, dv) if delta else (0,),
        "w": (*heads, length, dk) if delta else (0,),
        "states": (*heads, spans, dv, dk),
        "normalisers": (*heads, spans, dk),
    }


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    past_state: Tensor,
    past_normaliser: Tensor,
    *,
    delta: int = 0,
    normalise: int = 0,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`edgeattn.ops.recurrent_linear_attention.reference`, whose arguments these are, on a GPU.

    Raises:
        RuntimeInputError: shapes do not fit, or no kernel is made for such inputs.
    """
    inputs = (q, k, v, log_decay, beta, past_state, past_normaliser)
    attributes = {"delta": delta, "normalise": normalise, "scale": scale, "epsilon": epsilon}
    shapes = SPEC.output_shapes(*(x.shape for x in inputs), **attributes)
    names = [tensor.name for tensor in SPEC.inputs]
    tensors = dict(zip(names, (x.contiguous() for x in inputs), strict=True))
    _check(tensors)
    for output, shape in zip(SPEC.outputs, shapes, strict=True):
        dtype = q.dtype if output.name == "y" else torch.float32
        tensors[output.name] = q.new_empty(shape, dtype=dtype)
    launch(tensors, attributes)
    return tensors["y"], tensors["present_state"], tensors["present_normaliser"]


def launch(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Runs the kernels on inputs and outputs, by name, that fit the operator and are contiguous.

    Args:
        tensors: present_state may be past_state, and present_normaliser past_normaliser.
        attributes: all of the operator's.

    Raises:
        RuntimeInputError: no kernel is made for such head dimensions.
    """
    (batch, heads, length, dk), (_, kv_heads, _, dv) = tensors["q"].shape, tensors["v"].shape
    dg, normalise = tensors["log_decay"].shape[-1], attributes["normalise"]
    dims = {"B": batch, "H": heads, "HKV": kv_heads, "T": length, "DK": dk, "DV": dv, "DG": dg}
    needed = variants({"T": length, "Dk": dk, "Dv": dv, "Dg": dg}, attributes)
    values = {**tensors, **dims, **attributes, "scale": attributes["scale"] or 1 / math.sqrt(dk)}
    if length >= CHUNKED_LENGTH:
        for name, shape in workspaces(dims, attributes["delta"]).items():
            values[name] = tensors["q"].new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(tensors["q"].get_device()):
        for name, constants in needed:
            kernel = _BY_NAME[name]
            kernel.launch(values | complete_constants(kernel, constants, normalise))


def _check(tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors of other dtypes or on other devices than the kernels are made for."""
    q = tensors["q"]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise _refused("q in fp16, bf16 or fp32", f"it is {q.dtype}")
    for name, tensor in tensors.items():
        dtype = q.dtype if name in ("q", "k", "v") else torch.float32
        if tensor.dtype != dtype:
            raise _refused(f"{name} in {dtype}", f"it is {tensor.dtype}")
        if tensor.device != q.device:
            raise _refused(f"{name} on {q.device}, as q is", f"it is on {tensor.device}")
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise _refused("tensors on an NVIDIA GPU", f"they are on {q.device}")


def _refused(expected: str, came: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=f"for the kernels of RecurrentLinearAttention {expected}",
        came=came,
        todo='give such tensors, or call the operator with impl="reference"',
    )
