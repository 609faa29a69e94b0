"""Triton kernels of `FftRopeAttention`, whose formulas and letters its file explains.

`attend` has a program per some rows of a query head. It reads the near keys, what is left of the
far ones between the last whole segment and the window, and, where a row falls back, all keys of its
tile; whole segments it takes from the sums that `states` and `prefix` made (`polynomial_states`).
A first loop finds each row's centre and whether its scores are known to be within the bound, a
second weighs, so that every weight is divided by one number per row. `count` adds up the rows that
fell back, of which nothing is known to the host.

With a table of biases, of heads whose backend is the FFT, it takes the sums over far keys that
`spectrum` and `convolve` made (`toeplitz`), and segments serve the centres alone. Without one, the
mask is all there is of T, and segments do.

Few rows or keys, degrees above 2, more features or keys than `points_of` allows, and other heads
with a table have neither: P is then computed on the scores. So it is for rows whose sums of T are
too small for what an FFT leaves of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from edgeattn.kernels.chunks import INTEGERS, aligned, jit, load, load_row, place_program, store
from edgeattn.kernels.kernel import ArgumentType, Kernel, cdiv
from edgeattn.kernels.launch import check_call
from edgeattn.kernels.polynomial_scores import survey, weigh_keys
from edgeattn.kernels.polynomial_states import (
    key_count,
    longest_covered,
    prefix,
    recall,
    record,
    score_sums,
    squared_length,
    states,
)
from edgeattn.kernels.toeplitz import convolve, recall_convolved, spectrum, sums_are_precise
from edgeattn.ops.fft_rope_attention import LOWEST, SPEC, TOEPLITZ_FFT
from edgeattn.ops.fft_rope_kernels import points_of, segments_of, variants

_LOWEST, _TOEPLITZ_FFT = tl.constexpr(LOWEST), tl.constexpr(TOEPLITZ_FFT)
# Numbers that `count` adds up at once.
_COUNTS = tl.constexpr(256)


@jit
def attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    coefficients: tl.tensor,
    key_mean: tl.tensor,
    log_bias: tl.tensor,
    score_bound: tl.tensor,
    backend: tl.tensor,
    kv_len: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    shift: tl.tensor,
    far_sums: tl.tensor,
    norms: tl.tensor,
    y: tl.tensor,
    fallbacks: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    TQ: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    C: tl.tensor,
    HB: tl.tensor,
    N: tl.tensor,
    LEVELS: tl.tensor,
    SEGMENT: tl.tensor,
    SEGMENTS: tl.tensor,
    POINTS: tl.tensor,
    sink: tl.tensor,
    window: tl.tensor,
    causal: tl.tensor,
    row_centre: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Some rows of one query head."""
    PRECISION: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "tf32"
    D = aligned(D)
    part, head = place_program(tl.cdiv(TQ, CHUNK))
    query_head, kv_head = (head % (HKV * G)).to(tl.int32), head // G
    length = key_count(kv_len, kv_head // HKV, S)
    sink, window = tl.minimum(sink, length), tl.minimum(window, S)
    before = tl.maximum(length - TQ, 0)
    first, last = before + part * CHUNK, tl.minimum(before + part * CHUNK + CHUNK, length) - 1
    end = tl.where(first < length, tl.where(causal > 0, last + 1, length), 0)
    steps, columns = part * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    positions = before + steps
    is_row = (steps < TQ) & (positions < length)
    q, y = q + head * TQ * D, y + head * TQ * D
    k, v = k + kv_head * S * D, v + kv_head * S * D
    sums, shift = sums + kv_head * SEGMENTS * record(LEVELS, D), shift + kv_head * D
    queries = load(q, steps, columns, TQ, D)
    wide = queries.to(tl.float32)
    mean = load_row(key_mean, query_head, columns, HKV * G, D)
    polynomial = tl.load(backend + query_head) != 0
    by_fft = (POINTS > 0) & (tl.load(backend + query_head) == _TOEPLITZ_FFT)
    far_sums, norms = far_sums + head * C * (D + 2) * TQ, norms + 2 * query_head

    # Far of all rows here: segments before `left` and, of later keys, from `right` on.
    summed = polynomial & (SEGMENTS > 0)
    left = tl.where(summed, tl.maximum(tl.minimum(first - window + 1, end), 0) // SEGMENT, 0)
    right = tl.where(summed & (causal == 0), tl.cdiv(last + window, SEGMENT), SEGMENTS)
    right = tl.minimum(right, SEGMENTS)
    # What is read but for the first keys.
    begin = tl.maximum(left * SEGMENT, sink)
    stop = tl.where(right < SEGMENTS, tl.minimum(right * SEGMENT, end), end)

    total, count, longest = survey(
        *(queries, k, mean, positions, columns, begin, tl.where(polynomial, stop, 0)),
        *(window, causal, D, scale, ROWS, PRECISION),
    )
    more, of_shift, keys = score_sums(
        wide, sums, shift, columns, sink, length, left, right, SEGMENT, SEGMENTS, D, LEVELS, scale
    )
    longest = tl.maximum(longest, longest_covered(peaks + head * SEGMENTS, left, right, SEGMENTS))
    own = (total + more) / tl.maximum(count + keys, 1).to(tl.float32)
    of_mean = tl.sum(wide * mean[None, :], axis=1) * scale
    centre = tl.where(polynomial, tl.where(row_centre > 0, own, of_mean), 0.0)
    reach, bound = scale * (1 + row_centre), tl.load(score_bound + query_head)
    within = (squared_length(wide, D) * longest) * (reach * reach) <= bound * bound

    outside = (is_row & polynomial & (within == 0)).to(tl.int32)
    tl.store(fallbacks + head * tl.cdiv(TQ, CHUNK) + part, tl.sum(outside).to(tl.float32))
    fallen = tl.max(outside) > 0
    if fallen | (N > 1):  # rows that fall back need all keys, others may have them; so do tables
        left, right = left * 0, right * 0 + SEGMENTS
        begin, stop, keys = begin * 0 + sink, stop * 0 + end, keys * 0
    by_fft &= fallen == 0
    by_fft &= sums_are_precise(far_sums, norms, steps, is_row & by_fft, length, TQ, D)
    if by_fft:
        begin, stop = tl.maximum(first - window + 1, sink), tl.minimum(last + window, end)

    coefficients += query_head * C
    log_bias += tl.where(HB > 1, query_head, 0).to(tl.int64) * N
    found, total = recall(
        *(q, sums, coefficients, centre - of_shift, steps, columns, keys, C),
        *(TQ, D, LEVELS, left, right, SEGMENTS, scale, PRECISION),
    )
    # Segments are only weighed where the table has one number.
    largest = tl.maximum(tl.load(log_bias), _LOWEST)
    kept = tl.exp(tl.load(log_bias) - largest)
    found, total = found * kept, total * kept
    largest = tl.where(keys > 0, largest, _LOWEST) + tl.zeros([CHUNK], tl.float32)
    if by_fft:
        found, total = recall_convolved(
            far_sums, coefficients, centre - of_mean, steps, columns, is_row, C, TQ, D
        )
        largest = tl.zeros([CHUNK], tl.float32) + tl.load(norms)
    found, total = weigh_keys(
        *(queries, k, v, coefficients, log_bias, positions, columns, centre, within & polynomial),
        *(by_fft, found, total, largest, tl.minimum(sink, end), begin, stop),
        *(sink, window, causal, D, C, N, scale, ROWS, PRECISION),
    )
    # Without a key that has a weight, what was found is 0; what is no number stays none.
    share = 1 / tl.where(total > 0, total, 1.0)
    store(y, steps, columns, TQ, D, tl.where(is_row[:, None], found * share[:, None], 0.0))


@jit
def count(
    fallbacks: tl.tensor,
    fallback_count: tl.tensor,
    B: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    TQ: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Adds up what the programs of one query head, of all sequences, counted."""
    head, tiles = tl.program_id(0), tl.cdiv(TQ, CHUNK)
    total = tl.zeros([_COUNTS], tl.int32)
    fallbacks += head * tiles
    for _ in range(B):
        for first in range(0, tiles, _COUNTS):
            parts = first + tl.arange(0, _COUNTS)
            total += tl.load(fallbacks + parts, mask=parts < tiles, other=0.0).to(tl.int32)
        fallbacks += HKV * G * tiles
    tl.store(fallback_count + head, tl.sum(total))


_CONSTANTS = ("BLOCK", "CHUNK", "ROWS", "NUMBERS")
_TYPES: Mapping[str, ArgumentType] = {
    **dict.fromkeys(("q", "k", "v", "y"), "*T"),
    **dict.fromkeys(("backend", "kv_len", "fallback_count"), "*i32"),
    **dict.fromkeys(INTEGERS, "i32"),
    "scale": "fp32",
}


def _kernel(function: Any, programs: str, num_warps: int = 4) -> Kernel:
    """The description of a kernel here, where a name tells the type."""
    names = function.arg_names
    return Kernel(
        name=f"fft_rope_attention.{function.__name__}",
        function=function,
        arguments={n: _TYPES.get(n, "*fp32") for n in names if n not in _CONSTANTS},
        constants=tuple(n for n in names if n in _CONSTANTS),
        grid=(programs, "1", "1"),
        sizes=tuple(n for n in ("B", "HKV", "G") if n not in names),
        num_warps=num_warps,
        num_stages=1,  # where loops are pipelined, they say so
    )


KERNELS: tuple[Kernel, ...] = (
    _kernel(states, "LEVELS * SEGMENTS * B * HKV", num_warps=8),
    _kernel(prefix, "cdiv((LEVELS * (D + 1) + 1) * D, NUMBERS) * B * HKV"),
    _kernel(spectrum, "HKV * G", num_warps=8),
    _kernel(convolve, "cdiv(D + 2, 2) * B * HKV * G", num_warps=8),
    _kernel(attend, "cdiv(TQ, CHUNK) * B * HKV * G", num_warps=8),
    _kernel(count, "HKV * G"),
)

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}

# Rows of queries and, of either kernel, of keys; numbers that `prefix` adds up at once.
_CHUNK, _ROWS, _ROWS_OF_STATES, _NUMBERS = 64, 64, 32, 256


def complete_constants(kernel: Kernel, constants: Mapping[str, int]) -> dict[str, int]:
    """All constants of a kernel, from those that `variants` of the operator gives."""
    rows = _ROWS_OF_STATES if kernel.function is states else _ROWS
    complete = {"CHUNK": _CHUNK, "ROWS": rows, "NUMBERS": _NUMBERS, **constants}
    return {name: complete[name] for name in kernel.constants}


def workspaces(dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the kernels leave each other, in fp32."""
    batch, kv_heads, group, width = (dims[name] for name in ("B", "HKV", "G", "D"))
    segments, levels, points = dims["SEGMENTS"], dims["LEVELS"], dims["POINTS"]
    return {
        "sums": (batch, kv_heads, segments, (levels * (width + 1) + 1) * width),
        "peaks": (batch, kv_heads, group, segments),
        "shift": (batch, kv_heads, width if segments else 0),
        "spectra": (kv_heads, group, 2 * points),
        "norms": (kv_heads, group, 2 if points else 0),
        # `spectrum` works there before it is a sequence's.
        "signals": (max(batch, 1), kv_heads, group, width // 2 + 1, 4 * points),
        "far_sums": (batch, kv_heads, group, dims["C"], width + 2, dims["TQ"] if points else 0),
        "fallbacks": (batch, kv_heads, group, cdiv(dims["TQ"], _CHUNK)),
    }


def fft_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    key_mean: Tensor,
    log_bias: Tensor,
    score_bound: Tensor,
    backend: Tensor,
    kv_len: Tensor,
    *,
    degree: int = 2,
    sink: int = 0,
    window: int = 0,
    causal: int = 1,
    row_centre: int = 1,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`edgeattn.ops.fft_rope_attention.reference`, whose arguments these are, on a GPU.

    Raises:
        RuntimeInputError: shapes do not fit, or no kernel is made for such inputs.
    """
    inputs = (q, k, v, coefficients, key_mean, log_bias, score_bound, backend, kv_len)
    keys = {"sink": sink, "window": window, "causal": causal}
    attributes = {"degree": degree, **keys, "row_centre": row_centre, "scale": scale}
    tensors = check_call(SPEC, inputs, attributes)
    launch(tensors, attributes)
    return tensors["y"], tensors["fallback_count"]


def launch(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Runs the kernels on inputs and outputs, by name, that fit the operator and are contiguous.

    Args:
        tensors: all of the operator's.
        attributes: all of the operator's.

    Raises:
        RuntimeInputError: no kernel is made for such a head dimension, or for so many rows.
    """
    (batch, heads, rows, width), (_, kv_heads, capacity, _) = tensors["q"].shape, tensors["k"].shape
    biases, offsets = tensors["log_bias"].shape
    needed = variants({"Tq": rows, "S": capacity, "D": width, "N": offsets}, attributes)
    dims = {"B": batch, "HKV": kv_heads, "G": heads // kv_heads, "TQ": rows, "S": capacity}
    dims |= {"D": width, "C": tensors["coefficients"].shape[1], "HB": biases, "N": offsets}
    segments = segments_of(rows, capacity, width, attributes["degree"], offsets)
    dims |= {"SEGMENT": segments.length, "SEGMENTS": segments.number, "LEVELS": segments.levels}
    dims["POINTS"] = points_of(rows, capacity, width, attributes["degree"], offsets)
    # As the function body rounds it: whether a row falls back depends on all its bits.
    usual = torch.tensor(float(width)).sqrt().reciprocal().item()
    values: dict[str, Any] = {**tensors, **dims, **attributes}
    values["scale"] = attributes["scale"] or usual
    for name, shape in workspaces(dims).items():
        values[name] = tensors["q"].new_empty(shape, dtype=torch.float32)
    with torch.cuda.device(tensors["q"].get_device()):
        for name, constants in needed:
            kernel = _BY_NAME[name]
            kernel.launch(values | complete_constants(kernel, constants))
