"""Triton kernels of `FftRopeAttention` that sum over segments of far keys, and what reads the sums.

Of each segment of a key head, over its keys from `sink` on, with k' = k − κ and k'_0 = 1:

    Σ k'_l k'_m v   for every l that is a level and m from 1 to D, then
    Σ k'_l k'_m     likewise, then Σ v

Level 0 serves degree 1, the D others degree 2. κ, the mean of the first keys, is taken off because
a row's scores may lie far from 0, where the terms of a polynomial cancel. `prefix` adds the
segments up, so that a row finds the sums over all before its own, or over all behind, in one place.
"""

from __future__ import annotations

import triton.language as tl

from edgeattn.kernels.chunks import aligned, dot, jit, load, load_row, place_program, store

# Keys of which κ is the mean.
_SAMPLE = tl.constexpr(256)
# Coordinates of queries that are multiplied with sums at once, and segments that are looked at.
_PART, _PEAKS = tl.constexpr(32), tl.constexpr(64)


@jit
def states(
    k: tl.tensor,
    v: tl.tensor,
    key_mean: tl.tensor,
    backend: tl.tensor,
    kv_len: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    shift: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    LEVELS: tl.tensor,
    SEGMENT: tl.tensor,
    SEGMENTS: tl.tensor,
    sink: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One level of one segment of a key head; of some of its query heads the largest L(k − μ)."""
    PRECISION: tl.constexpr = "tf32x3" if k.dtype.element_ty == tl.float32 else "tf32"
    STAGES: tl.constexpr = 2
    D = aligned(D)
    part, head = place_program(LEVELS * SEGMENTS)
    level, segment = part % LEVELS, part // LEVELS
    kv_head, columns = (head % HKV).to(tl.int32), tl.arange(0, BLOCK)
    k, v = k + head * S * D, v + head * S * D
    length = key_count(kv_len, head // HKV, S)
    begin = tl.maximum(segment * SEGMENT, tl.minimum(sink, length))
    end = tl.minimum((segment + 1) * SEGMENT, length)
    end = tl.where(any_polynomial(backend + kv_head * G, G), end, 0)
    centre = sample_mean(k, sink, tl.where(end > 0, length, 0), columns, D, ROWS)
    moment = tl.zeros([BLOCK, BLOCK], tl.float32)
    weight, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        values = load(v, rows, columns, end, D)
        keys = load(k, rows, columns, end, D).to(tl.float32) - centre[None, :]
        keys = tl.where((rows < end)[:, None], keys, 0.0)
        factor = tl.sum(tl.where(columns[None, :] == level - 1, keys, 0.0), axis=1)
        keys *= tl.where(level > 0, factor, 1.0)[:, None]
        moment += dot(tl.trans(keys), values, PRECISION)
        weight += tl.sum(keys, axis=0)
        total += tl.sum(values.to(tl.float32), axis=0)
    sums += (head * SEGMENTS + segment) * record(LEVELS, D)
    store(sums + level * D * D, columns, columns, D, D, moment)
    sums += LEVELS * D * D
    tl.store(sums + level * D + columns, weight, mask=columns < D)
    tl.store(sums + LEVELS * D + columns, total, mask=(columns < D) & (level == 0))
    tl.store(shift + head * D + columns, centre, mask=(columns < D) & (part == 0))
    for member in range(level, G, LEVELS):
        mean = load_row(key_mean, kv_head * G + member, columns, HKV * G, D)
        longest = tl.zeros([ROWS], tl.float32)
        for start in tl.range(begin, end, ROWS, num_stages=STAGES):
            rows = start + tl.arange(0, ROWS)
            keys = load(k, rows, columns, end, D).to(tl.float32) - mean[None, :]
            longest = tl.maximum(longest, tl.where(rows < end, squared_length(keys, D), 0.0))
        tl.store(peaks + (head * G + member) * SEGMENTS + segment, tl.max(longest, axis=0))


@jit
def prefix(
    sums: tl.tensor,
    D: tl.tensor,
    LEVELS: tl.tensor,
    SEGMENTS: tl.tensor,
    NUMBERS: tl.constexpr,
) -> None:
    """Adds to some numbers of every segment those of all segments before."""
    width = record(LEVELS, D)
    part, head = place_program(tl.cdiv(width, NUMBERS))
    place = part * NUMBERS + tl.arange(0, NUMBERS)
    sums += head * SEGMENTS * width + place
    total = tl.zeros([NUMBERS], tl.float32)
    for _ in range(SEGMENTS):
        total += tl.load(sums, mask=place < width, other=0.0)
        tl.store(sums, total, mask=place < width)
        sums += width


@jit
def recall(
    q: tl.tensor,
    sums: tl.tensor,
    coefficients: tl.tensor,
    centre: tl.tensor,
    steps: tl.tensor,
    columns: tl.tensor,
    keys: tl.tensor,
    C: tl.tensor,
    TQ: tl.tensor,
    D: tl.tensor,
    LEVELS: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    SEGMENTS: tl.tensor,
    scale: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Sums over segments of P(scale q·k' − centre), which is a polynomial in scale q·k'.

    A pair of coordinates m < l stands for (l, m) and (m, l).

    Args:
        q: the head's rows.
        sums: of the key head, added up.
        coefficients: of P.
        centre: of each row.
        steps: rows.
        columns: of values.
        keys: of these segments, how many; 0 where they are none.
        C: how many coefficients there are.
        TQ: how many rows.
        D: head dimension.
        LEVELS: as `states` has them.
        left: segments before this one are summed over,
        right: and from this one on.
        SEGMENTS: how many there are.
        scale: of the scores.
        PRECISION: of products.

    Returns:
        Sums with values `[rows, BLOCK]`, and sums of weights `[rows]`.
    """
    a0, a1, a2, _, _ = series(coefficients, C)
    constant, linear = a0 - a1 * centre + a2 * centre * centre, a1 - 2 * a2 * centre
    constant = tl.where(keys > 0, constant, 0.0)  # which may be no number where nobody asks for it
    place = (LEVELS * D + LEVELS) * D + columns
    values = covered(sums, place, columns < D, left, right, SEGMENTS, D, LEVELS)
    found, total = constant[:, None] * values[None, :], constant * keys
    for level in range(0, tl.where(keys > 0, LEVELS, 0)):
        other = tl.load(q + steps * D + level - 1, mask=(steps < TQ) & (level > 0), other=0.0)
        factor = tl.where(level > 0, a2 * other.to(tl.float32) * scale, linear)
        for first in range(0, tl.where(level > 0, level, D), _PART):
            some = first + tl.arange(0, _PART)
            times = tl.where(some < level - 1, 2.0, tl.where(some == level - 1, 1.0, 0.0))
            share = tl.where(level > 0, times, 1.0) * scale
            features = load(q, steps, some, TQ, D).to(tl.float32)
            features *= factor[:, None] * share[None, :]
            inside = (some < D)[:, None] & (columns < D)[None, :]
            pairs = (level * D + some)[:, None] * D + columns[None, :]
            moment = covered(sums, pairs, inside, left, right, SEGMENTS, D, LEVELS)
            found += dot(features, moment, PRECISION)
            ones = (LEVELS * D + level) * D + some
            weight = covered(sums, ones, some < D, left, right, SEGMENTS, D, LEVELS)
            total += tl.sum(features * weight[None, :], axis=1)
    return found, total


@jit
def score_sums(
    queries: tl.tensor,
    sums: tl.tensor,
    shift: tl.tensor,
    columns: tl.tensor,
    sink: tl.tensor,
    length: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    SEGMENT: tl.tensor,
    SEGMENTS: tl.tensor,
    D: tl.tensor,
    LEVELS: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """Of segments: each row's sum of scores, its score with κ, and how many keys there are."""
    keys = tl.maximum(left * SEGMENT - sink, 0)
    behind = tl.maximum(length - tl.maximum(right * SEGMENT, sink), 0)
    keys += tl.where(right < SEGMENTS, behind, 0)
    kappa = tl.load(shift + columns, mask=(columns < D) & (keys > 0), other=0.0)
    place = LEVELS * D * D + columns
    key_sum = covered(sums, place, columns < D, left, right, SEGMENTS, D, LEVELS)
    of_shift = tl.sum(queries * kappa[None, :], axis=1) * scale
    total = tl.sum(queries * key_sum[None, :], axis=1) * scale + of_shift * keys
    return total, of_shift, keys


@jit
def covered(
    sums: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    SEGMENTS: tl.tensor,
    D: tl.tensor,
    LEVELS: tl.tensor,
) -> tl.tensor:
    """Numbers of the segments before `left` and from `right` on together, of sums added up."""
    width = record(LEVELS, D)
    behind = inside & (right < SEGMENTS)
    found = tl.load(sums + (left - 1) * width + place, mask=inside & (left > 0), other=0.0)
    found += tl.load(sums + (SEGMENTS - 1) * width + place, mask=behind, other=0.0)
    before = tl.load(sums + (right - 1) * width + place, mask=behind & (right > 0), other=0.0)
    return found - before


@jit
def longest_covered(
    peaks: tl.tensor, left: tl.tensor, right: tl.tensor, SEGMENTS: tl.tensor
) -> tl.tensor:
    """The largest L(k − μ) of the segments before `left` and from `right` on; 0 of none."""
    longest = tl.zeros([_PEAKS], tl.float32)
    for first in range(0, SEGMENTS, _PEAKS):
        segments = first + tl.arange(0, _PEAKS)
        inside = (segments < left) | ((segments >= right) & (segments < SEGMENTS))
        longest = tl.maximum(longest, tl.load(peaks + segments, mask=inside, other=0.0))
    return tl.max(longest, axis=0)


@jit
def record(LEVELS: tl.tensor, D: tl.tensor) -> tl.tensor:
    """How many numbers a segment has."""
    return ((LEVELS * (D + 1) + 1) * D).to(tl.int64)


@jit
def squared_length(x: tl.tensor, D: tl.tensor) -> tl.tensor:
    """L of the operator's definition, of each row; infinity where that is no number.

    Products are written as fma(a, b, 0), which no compiler fuses with the sum that follows.
    """
    squares = tl.fma(x, x, tl.zeros_like(x))
    largest = tl.max(squares, axis=1)
    twice = tl.zeros_like(largest) + 2.0 * D
    rounder = tl.fma(largest, twice, tl.zeros_like(largest))[:, None]
    length = tl.sum((squares + rounder) - rounder, axis=1)
    return tl.where(length == length, length, float("inf"))


@jit
def sample_mean(
    k: tl.tensor,
    first: tl.tensor,
    length: tl.tensor,
    columns: tl.tensor,
    D: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The mean of some keys from `first` on, `[BLOCK]`; zeros where there are none."""
    first = tl.minimum(first, length)
    end = tl.minimum(first + _SAMPLE, length)
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        total += tl.sum(load(k, rows, columns, end, D).to(tl.float32), axis=0)
    return total / tl.maximum(end - first, 1).to(tl.float32)


@jit
def key_count(kv_len: tl.tensor, batch: tl.tensor, S: tl.tensor) -> tl.tensor:
    """Keys of a sequence, never more than there are."""
    return tl.minimum(tl.maximum(tl.load(kv_len + batch), 0), S)


@jit
def any_polynomial(backend: tl.tensor, G: tl.tensor) -> tl.tensor:
    """Whether any of G query heads is not exact."""
    found = 0
    for member in range(G):
        found |= tl.load(backend + member)
    return found != 0


@jit
def series(coefficients: tl.tensor, C: tl.tensor) -> tl.tensor:
    """Five coefficients, of which there may be fewer."""
    a0, a1 = tl.load(coefficients), tl.load(coefficients + 1, mask=C > 1, other=0.0)
    a2 = tl.load(coefficients + 2, mask=C > 2, other=0.0)
    a3 = tl.load(coefficients + 3, mask=C > 3, other=0.0)
    return a0, a1, a2, a3, tl.load(coefficients + 4, mask=C > 4, other=0.0)
