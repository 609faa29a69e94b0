"""Triton kernels of `RecurrentLinearAttention` for many rows, which go in chunks.

`prepare` (delta rules only) applies (I + A)⁻¹ to all that does not depend on the state, `states`
walks the rows and writes down the state before every span of them, `outputs` needs nothing else and
does all chunks at once. What `prepare` leaves, with X = (I + A)⁻¹ Diag(β):

    u = X V,  w = X (K ⊙ e),  so that U = u − w S, which `states` puts in the place of u.

A span is some chunks long, because states are large: one of 64 x 64 numbers, written and read,
moves as many bytes as 64 rows of q, k, v and y in fp16. The chunks of a span before the program's
own are seen through products of decays: of the key to the end of its chunk, of chunks between, and
from the start of the own chunk to the row.

Products are summed in fp32. fp32 inputs are multiplied in "tf32x3", as exact as fp32. With 16-bit
inputs, what is no 16-bit number itself is multiplied in "tf32", as exact as fp16 in fp32's range,
but where 16 bits will do: `dot` in "halves", `weigh`. SM 75 has no TF32: both are fp32 there.
"""

from __future__ import annotations

import triton.language as tl

from edgeattn.kernels.chunks import (
    aligned,
    decay_sums,
    decays_left,
    dot,
    jit,
    load,
    load_row,
    pair_scores,
    place_program,
    recall,
    store,
    unit_inverse,
    weigh,
)


@jit
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
    PRECISION: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "tf32"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    DK, DV, DG = aligned(DK), aligned(DV), aligned(DG) if CHANNELS else 1
    chunk, head = place_program(tl.cdiv(T, CHUNK))
    first = chunk * CHUNK
    k, log_decay = k + head * T * DK, log_decay + head * T * DG
    rows, columns = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    rate = tl.load(beta + head * T + rows, mask=rows < T, other=0.0)
    keys = load(k, rows, columns, T, DK)
    scores = pair_scores(keys, k, log_decay, first, T, DK, CHUNK, BLOCK, WIDTH, PRECISION)
    a = tl.where(i > j, rate[:, None] * scores, 0.0)
    x = unit_inverse(a, CHUNK) * rate[None, :]
    values = load(v + head * T * DV, rows, columns, T, DV)
    store(u + head * T * DV, rows, columns, T, DV, dot(x, values, PRECISION))
    into = tl.exp(decay_sums(log_decay, rows, T, DG, WIDTH, REVERSE=False))
    store(w + head * T * DK, rows, columns, T, DK, dot(x, keys * into, PRECISION))


@jit
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
    PRECISION: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "tf32"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    HALVES: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "halves"
    # Rows of a step without `delta`, and loads ahead: what registers and 99 KiB hold.
    ROWS: tl.constexpr = CHUNK if CHANNELS or BLOCK == 128 else 2 * CHUNK
    STAGES: tl.constexpr = 2 if k.dtype.element_ty == tl.float32 else 3
    tl.static_assert(SPAN % ROWS == 0, "a span must begin where a step does")
    DK, DV, DG = aligned(DK), aligned(DV), aligned(DG) if CHANNELS else 1
    block, head = place_program(tl.cdiv(DV, BLOCK_V))
    columns, values = tl.arange(0, BLOCK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    k, w = k + head * T * DK, w + head * T * DK
    v, u = v + head * T * DV, u + head * T * DV
    log_decay += head * T * DG
    states += head * tl.cdiv(T, SPAN) * DK * DV
    normalisers += head * tl.cdiv(T, SPAN) * DK
    state = load(past_state + head * DK * DV, columns, values, DK, DV)
    normaliser = load_row(past_normaliser, head, columns, head + 1, DK)
    if delta:
        for first in tl.range(0, T, CHUNK, num_stages=STAGES - 1):
            if first % SPAN == 0:
                store(states + first // SPAN * DK * DV, values, columns, DV, DK, tl.trans(state))
            rows = first + tl.arange(0, CHUNK)
            known = dot(load(w, rows, columns, T, DK), state, PRECISION)
            update = load(u, rows, values, T, DV) - known
            store(u, rows, values, T, DV, update)
            of_rows, of_state = decays_left(log_decay, first, T, DG, CHUNK, WIDTH)
            keys = load(k, rows, columns, T, DK) * of_rows
            kept = state * (tl.trans(of_state) if CHANNELS else of_state)
            state = kept + dot(tl.trans(keys), update, PRECISION)
    else:
        for first in tl.range(0, T, ROWS, num_stages=STAGES):
            if first % SPAN == 0:
                store(states + first // SPAN * DK * DV, values, columns, DV, DK, tl.trans(state))
                place = normalisers + first // SPAN * DK + columns
                tl.store(place, normaliser, mask=(columns < DK) & (block == 0))
            rows = first + tl.arange(0, ROWS)
            of_rows, of_state = decays_left(log_decay, first, T, DG, ROWS, WIDTH)
            keys, update = load(k, rows, columns, T, DK), load(v, rows, values, T, DV)
            if normalise:
                normaliser = tl.sum(normaliser[None, :] * of_state, axis=0)
                normaliser += tl.sum(keys * of_rows, axis=0)
            if CHANNELS:
                added = dot(tl.trans(keys * of_rows), update, HALVES)
            else:
                added = dot(tl.trans(keys), update * of_rows, HALVES)
            state = state * (tl.trans(of_state) if CHANNELS else of_state) + added
    tl.debug_barrier()  # threads that hold copies of an element have all read it
    store(present_state + head * DK * DV, columns, values, DK, DV, state)
    place = present_normaliser + head * DK + columns
    tl.store(place, normaliser, mask=(columns < DK) & (block == 0))


@jit
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
    PRECISION: tl.constexpr = "tf32x3" if q.dtype.element_ty == tl.float32 else "tf32"
    WIDTH: tl.constexpr = BLOCK if CHANNELS else 1
    DK, DV, DG = aligned(DK), aligned(DV), aligned(DG) if CHANNELS else 1
    blocks = tl.cdiv(DV, BLOCK_V)
    part, head = place_program(blocks * tl.cdiv(T, CHUNK))
    first = part // blocks * CHUNK
    kv_head = head // (H // HKV)
    span = kv_head * tl.cdiv(T, SPAN) + first // SPAN
    k, log_decay = k + kv_head * T * DK, log_decay + kv_head * T * DG
    v, u = v + kv_head * T * DV, u + kv_head * T * DV
    rows, columns = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    values = part % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    queries = load(q + head * T * DK, rows, columns, T, DK)
    state = tl.trans(load(states + span * DK * DV, values, columns, DV, DK))
    normaliser = normalisers + span * DK
    decays = tl.exp(decay_sums(log_decay, rows, T, DG, WIDTH, REVERSE=False))
    if not CHANNELS:  # now, since that frees registers
        recalled, weights = recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
    scores = pair_scores(queries, k, log_decay, first, T, DK, CHUNK, BLOCK, WIDTH, PRECISION)
    found = _updated(scores, u, v, rows, values, T, DV, delta, PRECISION)
    total = tl.sum(scores, axis=1)
    for behind in tl.range(CHUNK, first % SPAN + 1, CHUNK, num_stages=1):
        of_rows, of_state = decays_left(log_decay, first - behind, T, DG, CHUNK, WIDTH)
        keys = load(k, rows - behind, columns, T, DK)
        if CHANNELS:
            scores = dot(queries * decays, tl.trans(keys * of_rows), PRECISION)
        else:
            scores = dot(queries, tl.trans(keys), PRECISION) * decays * tl.trans(of_rows)
        found += _updated(scores, u, v, rows - behind, values, T, DV, delta, PRECISION)
        total += tl.sum(scores, axis=1)
        decays *= of_state
    if CHANNELS:
        queries = queries * decays
        recalled, weights = recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
    else:
        recalled, weights = recalled * decays, weights * decays
    factor = tl.full([CHUNK, 1], 1.0, tl.float32)
    if normalise:
        factor = 1 / (scale * (total[:, None] + weights) + epsilon)
    store(y + head * T * DV, rows, values, T, DV, (found + recalled) * (scale * factor))


@jit
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
        sums = dot(scores, load(u, rows, columns, height, width), PRECISION)
    else:
        sums = weigh(scores, load(v, rows, columns, height, width), PRECISION)
    return sums
