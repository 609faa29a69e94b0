"""Triton kernels of `BidirectionalLinearAttention`, whose formulas and letters its file explains.

`states` walks the rows of a head twice at once, in programs of their own: forward, where it writes
down the state S before every span of rows, and backward, where it writes down the state R behind
it. `outputs` needs nothing else and does all chunks at once: a chunk's rows with the keys of its
span, of which the chunk is a part, and with both states.

A span has 128 rows, because states are large: two of 64 x 64 numbers, written and read, move as
many bytes as 128 rows of q, k, v and y in fp16. How products are summed and rounded is that of
`recurrent_chunks`; programs lie along x alone, since a grid's other sides end at 65535.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from edgeattn.kernels.chunks import (
    aligned,
    describe,
    dot,
    jit,
    load,
    place_program,
    recall,
    store,
    weigh,
)
from edgeattn.kernels.kernel import Kernel, cdiv
from edgeattn.kernels.launch import check_call
from edgeattn.ops.bidirectional_linear_attention import SPEC, variants


@jit
def states(
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    key_padding: tl.tensor,
    states: tl.tensor,
    normalisers: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    gate_shift: tl.tensor,
    normalise: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """Some values of one head's states before all spans, or behind them."""
    PRECISION: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "halves"
    # What registers and 99 KiB hold: rows of a step, and loads ahead, where those of keys wait for
    # that of their padding.
    ROWS: tl.constexpr = SPAN // 2 if BLOCK == 128 else SPAN
    STAGES: tl.constexpr = 3 if k.dtype.element_ty == tl.float32 else 5
    DK, DV = aligned(DK), aligned(DV)
    blocks, spans = tl.cdiv(DV, BLOCK_V), tl.cdiv(T, SPAN)
    part, head = place_program(2 * blocks)
    forward = part < blocks
    columns, values = tl.arange(0, BLOCK), part % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    k, v, log_decay = k + head * T * DK, v + head * T * DV, log_decay + head * T
    key_padding += head // H * T
    way = 2 * head + part // blocks
    states, normalisers = states + way * spans * DK * DV, normalisers + way * spans * DK
    state = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    normaliser = tl.zeros([BLOCK], tl.float32)
    steps = spans * (SPAN // ROWS)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = tl.where(forward, step, steps - 1 - step) * ROWS
        if step % (SPAN // ROWS) == 0:
            span = first // SPAN
            store(states + span * DK * DV, values, columns, DV, DK, tl.trans(state))
            place = normalisers + span * DK + columns
            tl.store(place, normaliser, mask=(columns < DK) & (part % blocks == 0))
        rows, of_rows, of_state = walk(log_decay, key_padding, first, T, gate_shift, forward, ROWS)
        keys, update = load(k, rows, columns, T, DK), load(v, rows, values, T, DV)
        if normalise:
            normaliser = normaliser * of_state + tl.sum(keys * of_rows[:, None], axis=0)
        state = state * of_state + dot(tl.trans(keys), update * of_rows[:, None], PRECISION)


@jit
def outputs(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    log_decay: tl.tensor,
    key_padding: tl.tensor,
    states: tl.tensor,
    normalisers: tl.tensor,
    y: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    DK: tl.tensor,
    DV: tl.tensor,
    gate_shift: tl.tensor,
    normalise: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPAN: tl.constexpr,
) -> None:
    """Some values of y of one chunk of one head."""
    PRECISION: tl.constexpr = "tf32x3" if q.dtype.element_ty == tl.float32 else "tf32"
    tl.static_assert(SPAN == 2 * CHUNK, "a span must be two chunks")
    DK, DV = aligned(DK), aligned(DV)
    blocks, spans = tl.cdiv(DV, BLOCK_V), tl.cdiv(T, SPAN)
    part, head = place_program(blocks * tl.cdiv(T, CHUNK))
    first = part // blocks * CHUNK
    rows, columns = first + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    values = part % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    k, v, log_decay = k + head * T * DK, v + head * T * DV, log_decay + head * T
    key_padding += head // H * T
    queries = load(q + head * T * DK, rows, columns, T, DK)
    # What each row sees of all before the chunk and of all behind it.
    entered, passed = entering(log_decay, key_padding, rows, gate_shift, first + CHUNK, T)
    into, out = tl.exp(tl.cumsum(entered, axis=0)), tl.exp(tl.cumsum(passed, axis=0, reverse=True))

    # The span's other chunk stands between this one and one of both states.
    is_second = first % SPAN > 0
    other = tl.where(is_second, first - CHUNK, first + CHUNK)
    others, of_rows, of_state = walk(log_decay, key_padding, other, T, gate_shift, is_second, CHUNK)
    found, total = tl.zeros([CHUNK, BLOCK_V], tl.float32), tl.zeros([CHUNK, 1], tl.float32)
    for backward in tl.range(0, 2, num_stages=1):
        place = (2 * head + backward) * spans + first // SPAN
        state = tl.trans(load(states + place * DK * DV, values, columns, DV, DK))
        place = normalisers + place * DK
        recalled, weights = recall(queries, state, place, columns, DK, normalise, PRECISION)
        decays = tl.where(backward > 0, out, into)
        decays *= tl.where(is_second == (backward > 0), 1.0, of_state)
        found, total = found + recalled * decays[:, None], total + weights * decays[:, None]

    keys = load(k, others, columns, T, DK)
    decays = tl.where(is_second, into, out)[:, None] * of_rows[None, :]
    scores = dot(queries, tl.trans(keys), PRECISION) * decays
    found += weigh(scores, load(v, others, values, T, DV), PRECISION)
    total += tl.sum(scores, axis=1, keep_dims=True)

    # D_ij: to either side of the diagonal one of the sums is 0.
    i, j = rows[:, None], rows[None, :]
    between = tl.cumsum(tl.where(i > j, entered[:, None], 0.0), axis=0)
    between += tl.cumsum(tl.where(i < j, passed[:, None], 0.0), axis=0, reverse=True)
    rows_of_keys = keys_of(key_padding, rows, T)
    keys = load(k, rows_of_keys, columns, T, DK)
    scores = dot(queries, tl.trans(keys), PRECISION) * tl.exp(between)
    found += weigh(scores, load(v, rows_of_keys, values, T, DV), PRECISION)
    total += tl.sum(scores, axis=1, keep_dims=True)
    factor = tl.full([CHUNK, 1], 1.0, tl.float32)
    if normalise:
        factor = 1 / (scale * total + epsilon)
    store(y + head * T * DV, rows, values, T, DV, found * (scale * factor))


@jit
def entering(
    log_decay: tl.tensor,
    key_padding: tl.tensor,
    rows: tl.tensor,
    gate_shift: tl.tensor,
    end: tl.tensor,
    T: tl.tensor,
) -> tl.tensor:
    """The gates f that enter rows from before, and those that do from behind, but for the last."""
    behind = tl.where(rows + 1 < end, gates(log_decay, key_padding, rows + 1, T), 0.0)
    return gates(log_decay, key_padding, rows - gate_shift, T), behind


@jit
def walk(
    log_decay: tl.tensor,
    key_padding: tl.tensor,
    first: tl.tensor,
    T: tl.tensor,
    gate_shift: tl.tensor,
    forward: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """What a walk over some rows, forward or backward, leaves of them and of a state.

    Returns:
        The rows, from the one that is walked over last, T in the place of those that are no keys.
        Of each of them, exp(f_{j+1} + …) or exp(… + g_j): `[ROWS]`.
        Of the state that comes to them, exp of all f or g: one number.
    """
    away = tl.arange(0, ROWS)
    rows = tl.where(forward, first + ROWS - 1 - away, first + away)
    passed = gates(log_decay, key_padding, rows + tl.where(forward, 1 - gate_shift, 0), T)
    passed = tl.where(forward & (away == 0), 0.0, passed)
    entered = gates(log_decay, key_padding, rows - tl.where(forward, gate_shift, 0), T)
    of_state = tl.exp(tl.sum(entered, axis=0))
    return keys_of(key_padding, rows, T), tl.exp(tl.cumsum(passed, axis=0)), of_state


@jit
def keys_of(key_padding: tl.tensor, rows: tl.tensor, T: tl.tensor) -> tl.tensor:
    """The rows, T in the place of those that are no keys."""
    inside = (rows >= 0) & (rows < T)
    return tl.where(tl.load(key_padding + rows, mask=inside, other=1) == 0, rows, T)


@jit
def gates(log_decay: tl.tensor, key_padding: tl.tensor, rows: tl.tensor, T: tl.tensor) -> tl.tensor:
    """Log-decays of some rows, 0 of those that are no keys."""
    return tl.load(log_decay + rows, mask=keys_of(key_padding, rows, T) < T, other=0.0)


_OPERATOR = SPEC.snake_name
STATES = describe(_OPERATOR, states, "2 * cdiv(DV, BLOCK_V) * B * H", num_warps=8)
OUTPUTS = describe(_OPERATOR, outputs, "cdiv(DV, BLOCK_V) * cdiv(T, CHUNK) * B * H", num_warps=4)
KERNELS: tuple[Kernel, ...] = (STATES, OUTPUTS)

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# Rows of a chunk, and from one state that is written down to the next.
_CHUNK, _SPAN = 64, 128


def complete_constants(kernel: Kernel, constants: Mapping[str, int]) -> dict[str, int]:
    """All constants of a kernel, from those that `variants` of the operator gives."""
    complete = {
        "BLOCK_V": min(constants["BLOCK"], 64 if kernel is OUTPUTS else 32),
        "CHUNK": _CHUNK,
        "SPAN": _SPAN,
        **constants,
    }
    return {name: complete[name] for name in kernel.constants}


def workspaces(dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the kernels leave each other, in fp32: before and behind every span."""
    spans = (dims["B"], dims["H"], 2, cdiv(dims["T"], _SPAN))
    return {"states": (*spans, dims["DV"], dims["DK"]), "normalisers": (*spans, dims["DK"])}


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    key_padding: Tensor,
    *,
    gate_shift: int = 1,
    normalise: int = 1,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """`edgeattn.ops.bidirectional_linear_attention.reference`, whose arguments these are, on a GPU.

    Raises:
        RuntimeInputError: shapes do not fit, or no kernel is made for such inputs.
    """
    inputs = (q, k, v, log_decay, key_padding)
    attributes = {
        **{"gate_shift": gate_shift, "normalise": normalise},
        **{"scale": scale, "epsilon": epsilon},
    }
    tensors = check_call(SPEC, inputs, attributes)
    launch(tensors, attributes)
    return tensors["y"]


def launch(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Runs the kernels on inputs and output, by name, that fit the operator and are contiguous.

    Args:
        tensors: all of the operator's.
        attributes: all of the operator's.

    Raises:
        RuntimeInputError: no kernel is made for such head dimensions.
    """
    (batch, heads, length, dk), dv = tensors["q"].shape, tensors["v"].shape[-1]
    dims = {"B": batch, "H": heads, "T": length, "DK": dk, "DV": dv}
    needed = variants({"T": length, "Dk": dk, "Dv": dv}, attributes)
    values = {**tensors, **dims, **attributes, "scale": attributes["scale"] or 1 / math.sqrt(dk)}
    for name, shape in workspaces(dims).items():
        values[name] = tensors["q"].new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(tensors["q"].get_device()):
        for name, constants in needed:
            kernel = _BY_NAME[name]
            kernel.launch(values | complete_constants(kernel, constants))
