"""Triton kernels of `HeadSparseAttention`, whose formulas and letters its file explains.

Decoding takes two. `decode` has a program per key head and split of its keys, with those of its
query heads that are active as the rows of one tile; where none is, it ends at once. What it reads
of `head_index` it only compares, so that no index leads anywhere. `reduce` adds the splits up, of
each of which it is given the weighted mean of the values and the logarithm of the weights' sum, and
writes the zeros of heads that are not active. `prefill` does all heads, some rows per program.

How many splits there are is decided before a launch, from the heads that may be active; how long
they are by each sequence's own length. Scores, sums and weights are in fp32; for 16-bit values the
weights, which are at most 1, are rounded to their dtype. A cache in int8 has kernels of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from edgeattn.kernels.chunks import INTEGERS, aligned, dot, jit, load, place_program, store
from edgeattn.kernels.kernel import ArgumentType, Kernel, cdiv
from edgeattn.kernels.launch import check_call
from edgeattn.ops.head_sparse_attention import INT8_SUFFIX, SPEC, variants
from edgeattn.ops.torch_ops import DTYPES

# Of a score that is not seen, and of the logarithm of no weight: what is left of it is 0.
_LOWEST = tl.constexpr(-1e38)
# Slots of head_index that are read at once.
_SLOTS = tl.constexpr(32)
# Splits at most, and how many of them `reduce` adds up at once.
MOST_SPLITS = 64
_MOST_SPLITS, _STEP = tl.constexpr(MOST_SPLITS), tl.constexpr(16)


@jit
def decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    head_index: tl.tensor,
    kv_len: tl.tensor,
    means: tl.tensor,
    weights: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,
    SPLITS: tl.tensor,
    groups: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One split of the keys of one key head, for some of its query heads."""
    PRECISION: tl.constexpr = "tf32x3"  # where numbers have 32 bits
    STAGES: tl.constexpr = 3
    D = aligned(D)
    part, head = place_program(tl.cdiv(G, MEMBERS) * SPLITS)
    split, batch, kv_head = part % SPLITS, head // HKV, (head % HKV).to(tl.int32)
    members, columns = part // SPLITS * MEMBERS + tl.arange(0, MEMBERS), tl.arange(0, BLOCK)
    listed = units(kv_head, members, G, groups)
    active = (times(head_index + batch * K, listed, K) > 0) & (members < G)
    length = clamped(tl.load(kv_len + batch), S)
    # Of whole tiles, but for the last.
    rows_of_split = tl.cdiv(tl.cdiv(length, SPLITS), ROWS) * ROWS
    first = split * rows_of_split
    end = tl.where(tl.max(active.to(tl.int32)) > 0, tl.minimum(first + rows_of_split, length), 0)
    queries = load(q + head * G * D, members, columns, G, D)
    k_cache, v_cache = k_cache + head * S * D, v_cache + head * S * D
    factor = scale * tl.load(k_scale + kv_head)
    found = tl.zeros([MEMBERS, BLOCK], tl.float32)
    total, largest = tl.zeros([MEMBERS], tl.float32), tl.full([MEMBERS], _LOWEST, tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        keys, values = load(k_cache, rows, columns, end, D), load(v_cache, rows, columns, end, D)
        seen = (rows < end)[None, :] & (members < G)[:, None]
        found, total, largest = absorb(
            queries, keys, values, seen, factor, found, total, largest, PRECISION
        )
    any_key = total > 0
    place = (head * G + members) * SPLITS + split
    mean = found * (tl.load(v_scale + kv_head) / tl.where(any_key, total, 1.0))[:, None]
    inside = active[:, None] & (columns < D)[None, :]
    tl.store(means + place[:, None] * D + columns[None, :], mean, mask=inside)
    logarithm = tl.where(any_key, largest + tl.log(tl.where(any_key, total, 1.0)), _LOWEST)
    tl.store(weights + place, logarithm, mask=active)


@jit
def reduce(
    head_index: tl.tensor,
    kv_len: tl.tensor,
    means: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    error_count: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,
    SPLITS: tl.tensor,
    groups: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Some numbers of one query head's row; the first program of a sequence counts its errors."""
    D = aligned(D)
    part, head = place_program(tl.cdiv(D, BLOCK))
    batch, query_head = head // (HKV * G), (head % (HKV * G)).to(tl.int32)
    head_index += batch * K
    columns = part * BLOCK + tl.arange(0, BLOCK)
    listed = units(query_head // G, query_head % G + tl.zeros([1], tl.int32), G, groups)
    # No split of a head that is not active is read.
    splits = tl.where(tl.max(times(head_index, listed, K)) > 0, SPLITS, 0)
    all_splits = tl.arange(0, _MOST_SPLITS)
    means, weights = means + head * SPLITS * D, weights + head * SPLITS
    inside = all_splits < splits
    largest = tl.max(tl.load(weights + all_splits, mask=inside, other=_LOWEST))
    found = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([_STEP], tl.float32)
    for start in range(0, splits, _STEP):
        rows = start + tl.arange(0, _STEP)
        logarithm = tl.load(weights + rows, mask=rows < splits, other=_LOWEST)
        share = tl.where(rows < splits, tl.exp(logarithm - largest), 0.0)
        found += tl.sum(load(means, rows, columns, splits, D) * share[:, None], axis=0)
        total += share
    whole = tl.sum(total)
    row = found * (1 / tl.where(whole > 0, whole, 1.0))
    tl.store(y + head * D + columns, row.to(y.dtype.element_ty), mask=columns < D)
    if (query_head == 0) & (part == 0):
        count = errors(head_index, tl.load(kv_len + batch), HKV, G, S, K, groups)
        tl.store(error_count + batch, count)


@jit
def prefill(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    head_index: tl.tensor,
    kv_len: tl.tensor,
    y: tl.tensor,
    error_count: tl.tensor,
    T: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,
    groups: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Some rows of one query head; the first program of a sequence counts its errors."""
    PRECISION: tl.constexpr = "tf32x3"  # where numbers have 32 bits
    STAGES: tl.constexpr = 2
    D = aligned(D)
    part, head = place_program(tl.cdiv(T, CHUNK))
    batch, query_head = head // (HKV * G), (head % (HKV * G)).to(tl.int32)
    given = tl.load(kv_len + batch)
    length = clamped(given, S)
    first, columns = part * CHUNK, tl.arange(0, BLOCK)
    steps = first + tl.arange(0, CHUNK)
    place = head // G * S * D
    k_cache, v_cache = k_cache + place, v_cache + place
    queries = load(q + head * T * D, steps, columns, T, D)
    factor = scale * tl.load(k_scale + query_head // G)
    found = tl.zeros([CHUNK, BLOCK], tl.float32)
    total, largest = tl.zeros([CHUNK], tl.float32), tl.full([CHUNK], _LOWEST, tl.float32)
    end = length - T + tl.minimum(first + CHUNK, T)
    for start in tl.range(0, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        keys, values = load(k_cache, rows, columns, end, D), load(v_cache, rows, columns, end, D)
        seen = (rows[None, :] <= (length - T + steps)[:, None]) & (rows < end)[None, :]
        found, total, largest = absorb(
            queries, keys, values, seen, factor, found, total, largest, PRECISION
        )
    share = tl.load(v_scale + query_head // G) / tl.where(total > 0, total, 1.0)
    store(y + head * T * D, steps, columns, T, D, found * share[:, None])
    if (query_head == 0) & (part == 0):
        tl.store(error_count + batch, errors(head_index + batch * K, given, HKV, G, S, K, groups))


@jit
def absorb(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    factor: tl.tensor,
    found: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Some more keys, of which each query sees those that are `seen`.

    Returns:
        The weighted sums of values, those of weights, and the largest score, by which all weights
        are divided.
    """
    # Numbers of 8 bits are exact in 16.
    scores = dot(queries, tl.trans(keys.to(queries.dtype)), PRECISION) * factor
    scores = tl.where(seen, scores, _LOWEST)
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    shares = tl.where(seen, tl.exp(scores - larger[:, None]), 0.0)
    kept = tl.exp(largest - larger)
    more = dot(shares.to(queries.dtype), values.to(queries.dtype), PRECISION)
    return found * kept[:, None] + more, total * kept + tl.sum(shares, axis=1), larger


@jit
def units(kv_head: tl.tensor, members: tl.tensor, G: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """What activates some query heads of a key head: its index, or theirs."""
    return tl.where(groups > 0, kv_head, kv_head * G + members)


@jit
def times(head_index: tl.tensor, listed: tl.tensor, K: tl.tensor) -> tl.tensor:
    """How often each of some heads is in the slots of a sequence."""
    found = tl.zeros([listed.shape[0]], tl.int32)
    for first in range(0, K, _SLOTS):
        slots = first + tl.arange(0, _SLOTS)
        index = tl.load(head_index + slots, mask=slots < K, other=-1)
        found += tl.sum((index[None, :] == listed[:, None]).to(tl.int32), axis=1)
    return found


@jit
def clamped(length: tl.tensor, S: tl.tensor) -> tl.tensor:
    """How many keys of the cache there are."""
    return tl.minimum(tl.maximum(length, 0), S)


@jit
def errors(
    head_index: tl.tensor,
    length: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    K: tl.tensor,
    groups: tl.tensor,
) -> tl.tensor:
    """How many indices of a sequence are out of range or came before, and 1 for a wrong length."""
    count = tl.where(groups > 0, HKV, HKV * G)
    wrong = tl.where((length < 0) | (length > S), 1, 0)
    for first in range(0, K, _SLOTS):
        slots = first + tl.arange(0, _SLOTS)
        index = tl.load(head_index + slots, mask=slots < K, other=-1)
        before = tl.zeros([_SLOTS], tl.int32)
        for start in range(0, first + 1, _SLOTS):
            others = start + tl.arange(0, _SLOTS)
            known = tl.load(head_index + others, mask=others < K, other=-1)
            same = (known[None, :] == index[:, None]) & (others[None, :] < slots[:, None])
            before += tl.sum(same.to(tl.int32), axis=1)
        outside = (index < 0) | (index >= count)
        wrong += tl.sum(((index != -1) & (outside | (before > 0))).to(tl.int32))
    return wrong


_CONSTANTS = ("BLOCK", "MEMBERS", "CHUNK", "ROWS")
_TYPES: Mapping[str, ArgumentType] = {
    **dict.fromkeys(("q", "k_cache", "v_cache", "y"), "*T"),
    **dict.fromkeys(("head_index", "kv_len", "error_count"), "*i32"),
    **dict.fromkeys(INTEGERS, "i32"),
    "scale": "fp32",
}
_INT8_CACHE: Mapping[str, ArgumentType] = dict.fromkeys(("k_cache", "v_cache"), "*i8")


def _kernel(function: Any, programs: str, *, suffix: str = "") -> Kernel:
    """The description of a kernel here, where a name tells the type."""
    names = function.arg_names
    types = {**_TYPES, **(_INT8_CACHE if suffix else {})}
    return Kernel(
        name=f"head_sparse_attention.{function.__name__}{suffix}",
        function=function,
        arguments={n: types.get(n, "*fp32") for n in names if n not in _CONSTANTS},
        constants=tuple(n for n in names if n in _CONSTANTS),
        grid=(programs, "1", "1"),
        sizes=("B",),
        num_warps=4,
        num_stages=1,  # where loops are pipelined, they say so
    )


_DECODING, _PREFILL = "cdiv(G, MEMBERS) * SPLITS * B * HKV", "cdiv(T, CHUNK) * B * HKV * G"
KERNELS: tuple[Kernel, ...] = (
    _kernel(decode, _DECODING),
    _kernel(decode, _DECODING, suffix=INT8_SUFFIX),
    _kernel(reduce, "cdiv(D, BLOCK) * B * HKV * G"),
    _kernel(prefill, _PREFILL),
    _kernel(prefill, _PREFILL, suffix=INT8_SUFFIX),
)

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# Query heads of a tile, which a product of matrices has at least; columns of `reduce`; rows of
# queries and of keys.
_MEMBERS, _COLUMNS, _CHUNK, _ROWS = 16, 64, 64, 64
# Programs that keep a large GPU busy, with some waiting for those that end early; and the fewest
# keys that are worth one.
_PROGRAMS, _LEAST_KEYS = 1024, 128


def complete_constants(kernel: Kernel, constants: Mapping[str, int]) -> dict[str, int]:
    """All constants of a kernel, from those that `variants` of the operator gives."""
    complete = {
        "BLOCK": _COLUMNS,
        "MEMBERS": _MEMBERS,
        "CHUNK": _CHUNK,
        "ROWS": _ROWS,
        **constants,
    }
    return {name: complete[name] for name in kernel.constants}


def splits_of(dims: Mapping[str, int]) -> int:
    """Into how many splits the keys of a key head go, from the key heads that may be active.

    At least one; the same on all GPUs.
    """
    active = dims["B"] * max(1, min(dims["K"], dims["HKV"]))
    wanted = cdiv(_PROGRAMS, max(active, 1))  # of no sequences too
    return max(1, min(wanted, cdiv(dims["S"], _LEAST_KEYS), MOST_SPLITS))


def workspaces(dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the splits leave for `reduce`, in fp32."""
    splits = (dims["B"], dims["HKV"], dims["G"], dims["SPLITS"])
    return {"means": (*splits, dims["D"]), "weights": splits}


def head_sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    head_index: Tensor,
    kv_len: Tensor,
    *,
    groups: int = 0,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`edgeattn.ops.head_sparse_attention.reference`, whose arguments these are, on a GPU.

    Raises:
        RuntimeInputError: shapes do not fit, or no kernel is made for such inputs.
    """
    inputs = (q, k_cache, v_cache, k_scale, v_scale, head_index, kv_len)
    attributes = {"groups": groups, "scale": scale}
    tensors = check_call(SPEC, inputs, attributes)
    launch(tensors, attributes)
    return tensors["y"], tensors["error_count"]


def launch(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Runs the kernels on inputs and outputs, by name, that fit the operator and are contiguous.

    Args:
        tensors: all of the operator's.
        attributes: all of the operator's.

    Raises:
        RuntimeInputError: no kernel is made for such a head dimension.
    """
    (batch, heads, length, width), cache = tensors["q"].shape, tensors["k_cache"].shape
    kv_heads, capacity = cache[1:3]
    dtype = DTYPES[tensors["k_cache"].dtype]
    needed = variants({"T": length, "S": capacity, "D": width, "C": dtype}, attributes)
    dims = {"B": batch, "HKV": kv_heads, "G": heads // kv_heads, "T": length, "S": capacity}
    dims |= {"D": width, "K": tensors["head_index"].shape[1]}
    dims["SPLITS"] = splits_of(dims)
    values = {**tensors, **dims, **attributes, "scale": attributes["scale"] or 1 / math.sqrt(width)}
    if length == 1:
        for name, shape in workspaces(dims).items():
            values[name] = tensors["q"].new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(tensors["q"].get_device()):
        for name, constants in needed:
            kernel = _BY_NAME[name]
            kernel.launch(values | complete_constants(kernel, constants))
