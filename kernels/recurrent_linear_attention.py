"""Triton kernels of `RecurrentLinearAttention`, whose formulas and letters `edgeattn.ops` explains.

A few rows take one kernel, `decode`, which walks them with the state in registers; more take those
of `recurrent_chunks`.

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
import triton.language as tl
from torch import Tensor

from edgeattn.kernels.chunks import (
    aligned,
    describe,
    jit,
    load,
    load_row,
    place_program,
    store,
)
from edgeattn.kernels.kernel import Kernel, cdiv
from edgeattn.kernels.launch import check_call
from edgeattn.kernels.recurrent_chunks import outputs, prepare, states
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


_OPERATOR = SPEC.snake_name
DECODE = describe(_OPERATOR, decode, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=4)
PREPARE = describe(_OPERATOR, prepare, "cdiv(T, CHUNK) * B * HKV", num_warps=4)
STATES = describe(_OPERATOR, states, "cdiv(DV, BLOCK_V) * B * HKV", num_warps=8)
OUTPUTS = describe(_OPERATOR, outputs, "cdiv(DV, BLOCK_V) * cdiv(T, CHUNK) * B * H", num_warps=4)
KERNELS: tuple[Kernel, ...] = (DECODE, PREPARE, STATES, OUTPUTS)


_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# Rows of a chunk and from one state that is written down to the next, by CHANNELS. Of one decay per
# channel, all pairs of rows of a chunk are gone through one by one.
_CHUNKS, _SPANS = (64, 16), (128, 64)


def complete_constants(kernel: Kernel, constants: Mapping[str, int]) -> dict[str, int]:
    """All constants of a kernel, from those that `variants` of the operator gives."""
    channels = constants.get("CHANNELS", 0)
    complete = {
        "BLOCK_V": min(constants["BLOCK"], 64 if kernel is OUTPUTS else 32),
        "CHUNK": _CHUNKS[channels],
        "SPAN": _SPANS[channels],
        **constants,
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
    tensors = check_call(SPEC, inputs, attributes)
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
    dg = tensors["log_decay"].shape[-1]
    dims = {"B": batch, "H": heads, "HKV": kv_heads, "T": length, "DK": dk, "DV": dv, "DG": dg}
    needed = variants({"T": length, "Dk": dk, "Dv": dv, "Dg": dg}, attributes)
    values = {**tensors, **dims, **attributes, "scale": attributes["scale"] or 1 / math.sqrt(dk)}
    if length >= CHUNKED_LENGTH:
        for name, shape in workspaces(dims, attributes["delta"]).items():
            values[name] = tensors["q"].new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(tensors["q"].get_device()):
        for name, constants in needed:
            kernel = _BY_NAME[name]
            kernel.launch(values | complete_constants(kernel, constants))
