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

Products are summed in fp32. fp32 inputs are multiplied in "tf32x3", as exact as fp32. With 16-bit
inputs, what is no 16-bit number itself is multiplied in "tf32", as exact as fp16 in fp32's range,
but where 16 bits will do: `dot` in "halves", `weigh`. SM 75 has no TF32: both are fp32 there.

Programs lie along x alone, since a grid's other sides end at 65535. Every width is a multiple of
`ALIGNMENT`, which the compiler sees in `n // ALIGNMENT * ALIGNMENT`: only then it loads vectors.

In place: present_state and present_normaliser may be past_state and past_normaliser. Every program
reads what it will write before it writes, and nobody else reads it. For that, `decode` takes all
values of a head (BLOCK_V = BLOCK) where all of them need the normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels.chunks import (
    INTEGERS,
    aligned,
    decay_sums,
    decays_left,
    dot,
    jit,
    load,
    load_row,
    pair_scores,
    place_program,
    store,
    unit_inverse,
    weigh,
)
from edgeattn.kernels.kernel import ArgumentType, Kernel, cdiv
from edgeattn.ops.recurrent_linear_attention import CHUNKED_LENGTH, SPEC, variants


@jit
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
    DK, DV = aligned(DK), aligned(DV)
    block, head = place_program(tl.cdiv(DV, BLOCK_V))
    group = H // HKV
    keys, values = tl.arange(0, BLOCK), block * BLOCK_V + tl.arange(0, BLOCK_V)
    q, y = q + head * group * T * DK, y + head * group * T * DV
    k, v = k + head * T * DK, v + head * T * DV
    log_decay, beta = log_decay + head * T * DG, beta + head * T
    state = load(past_state + head * DK * DV, keys, values, DK, DV)
    normaliser = load_row(past_normaliser, head, keys, head + 1, DK)
    for row in range(T):
        # One number or one per channel; which one unused channels take does not matter.
        decay = tl.exp(tl.load(log_decay + row * DG + tl.minimum(keys, DG - 1)))
        key, value = load_row(k, row, keys, T, DK), load_row(v, row, values, T, DV)
        state *= decay[:, None]
        if delta:
            value = tl.load(beta + row) * (value - tl.sum(state * key[:, None], axis=0))
        state += key[:, None] * value[None, :]
        if normalise:
            normaliser = decay * normaliser + key
        for member in range(group):
            query = load_row(q + member * T * DK, row, keys, T, DK) * scale
            found = tl.sum(state * query[:, None], axis=0)
            if normalise:
                found /= tl.sum(normaliser * query) + epsilon
            place = y + (member * T + row) * DV + values
            tl.store(place, found.to(y.dtype.element_ty), mask=values < DV)
    tl.debug_barrier()  # threads that hold copies of an element have all read it
    store(present_state + head * DK * DV, keys, values, DK, DV, state)
    tl.store(present_normaliser + head * DK + keys, normaliser, mask=(keys < DK) & (block == 0))


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
        recalled, weights = _recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
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
        recalled, weights = _recall(queries, state, normaliser, columns, DK, normalise, PRECISION)
    else:
        recalled, weights = recalled * decays, weights * decays
    factor = tl.full([CHUNK, 1], 1.0, tl.float32)
    if normalise:
        factor = 1 / (scale * (total[:, None] + weights) + epsilon)
    store(y + head * T * DV, rows, values, T, DV, (found + recalled) * (scale * factor))


@jit
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
        weights = tl.sum(
            queries * load_row(normaliser, 0, columns, 1, DK)[None, :], 1, keep_dims=True
        )
    return dot(queries, state, PRECISION), weights


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


_CONSTANTS = ("CHUNK", "BLOCK", "BLOCK_V", "CHANNELS", "SPAN")
_TYPES: Mapping[str, ArgumentType] = {
    **dict.fromkeys(("q", "k", "v", "y"), "*T"),
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(("scale", "epsilon"), "fp32"),
}


def _kernel(function: Any, programs: str, num_warps: int) -> Kernel:
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
        num_stages=1,  # where loops are pipelined, they say so
    )


DECODE = _kernel(decode, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=4)
PREPARE = _kernel(prepare, "cdiv(T, CHUNK) * B * HKV", num_warps=4)
STATES = _kernel(states, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=8)
OUTPUTS = _kernel(outputs, "cdiv(DV, BLOCK_V) * cdiv(T, CHUNK) * B * H", num_warps=4)
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
