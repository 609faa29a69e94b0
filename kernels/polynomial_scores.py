"""What `attend` of `FftRopeAttention` does with tiles of scores."""

from __future__ import annotations

import triton.language as tl

from edgeattn.kernels.chunks import dot, jit, load, weigh
from edgeattn.kernels.polynomial_states import series, squared_length
from edgeattn.ops.fft_rope_attention import LOWEST

_LOWEST = tl.constexpr(LOWEST)


@jit
def survey(
    queries: tl.tensor,
    k: tl.tensor,
    mean: tl.tensor,
    positions: tl.tensor,
    columns: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    window: tl.tensor,
    causal: tl.tensor,
    D: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Sum and number of each row's scores with far keys from `begin` on, and their largest L."""
    STAGES: tl.constexpr = 2
    total = tl.zeros([positions.shape[0]], tl.float32)
    longest = tl.zeros([positions.shape[0]], tl.float32)
    count = tl.zeros([positions.shape[0]], tl.int32)
    for start in tl.range(begin, stop, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        keys = load(k, rows, columns, stop, D)
        scores = dot(queries, tl.trans(keys), PRECISION) * scale
        far = (distance_of(positions, rows, causal) >= window) & (rows < stop)[None, :]
        total += tl.sum(tl.where(far, scores, 0.0), axis=1)
        count += tl.sum(far.to(tl.int32), axis=1)
        lengths = squared_length(keys.to(tl.float32) - mean[None, :], D)
        longest = tl.maximum(longest, tl.max(tl.where(far, lengths[None, :], 0.0), axis=1))
    return total, count, longest


@jit
def weigh_keys(
    queries: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    coefficients: tl.tensor,
    log_bias: tl.tensor,
    positions: tl.tensor,
    columns: tl.tensor,
    centre: tl.tensor,
    approximated: tl.tensor,
    is_summed: tl.tensor,
    found: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    first_keys: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    sink: tl.tensor,
    window: tl.tensor,
    causal: tl.tensor,
    D: tl.tensor,
    C: tl.tensor,
    N: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Adds the keys below `first_keys` and those from `begin` to `stop`.

    Args:
        queries: of the rows.
        k: of the key head, likewise v.
        v: values.
        coefficients: of P.
        log_bias: of the query head.
        positions: of the rows.
        columns: of keys and values.
        centre: of each row.
        approximated: whether a row's far keys are weighed by the polynomial.
        is_summed: whether far keys are among the sums already.
        found: sums of values with weights so far, `[rows, BLOCK]`.
        total: sums of these weights.
        largest: exponents, by whose exponentials both are divided.
        first_keys: how many of the first keys.
        begin: of the others.
        stop: their end.
        sink: keys below it are near,
        window: and so are those at smaller offsets.
        causal: whether a row sees no later keys.
        D: head dimension.
        C: how many coefficients there are.
        N: how many biases.
        scale: of the scores.
        ROWS: keys of a tile.
        PRECISION: of products.

    Returns:
        found and total with these keys, divided by one number per row.
    """
    STAGES: tl.constexpr = 2
    a0, a1, a2, a3, a4 = series(coefficients, C)
    first_tiles = tl.cdiv(first_keys, ROWS)
    for tile in tl.range(
        0, first_tiles + tl.cdiv(tl.maximum(stop - begin, 0), ROWS), num_stages=STAGES
    ):
        is_first = tile < first_tiles
        start = tl.where(is_first, tile * ROWS, begin + (tile - first_tiles) * ROWS)
        height = tl.where(is_first, first_keys, stop)
        rows = start + tl.arange(0, ROWS)
        keys, values = load(k, rows, columns, height, D), load(v, rows, columns, height, D)
        x = dot(queries, tl.trans(keys), PRECISION) * scale - centre[:, None]
        distance = distance_of(positions, rows, causal)
        seen = (distance >= 0) & (rows < height)[None, :]
        far = (distance >= window) & (rows >= sink)[None, :] & approximated[:, None]
        seen &= (far & is_summed) == 0
        exponent = tl.where(far, 0.0, x) + bias_of(log_bias, positions, rows, N)
        exponent = tl.where(seen, exponent, _LOWEST)
        larger = tl.maximum(largest, tl.max(exponent, axis=1))
        weights = tl.where(far, (((a4 * x + a3) * x + a2) * x + a1) * x + a0, 1.0)
        weights = tl.where(seen, weights * tl.exp(exponent - larger[:, None]), 0.0)
        kept = tl.exp(largest - larger)
        found = found * kept[:, None] + weigh(weights, values, PRECISION)
        total, largest = total * kept + tl.sum(weights, axis=1), larger
    return found, total


@jit
def distance_of(positions: tl.tensor, rows: tl.tensor, causal: tl.tensor) -> tl.tensor:
    """How far each key is from each row; less than 0 where it is later and not seen."""
    offset = positions[:, None] - rows[None, :]
    return tl.where(causal > 0, offset, tl.abs(offset))


@jit
def bias_of(log_bias: tl.tensor, positions: tl.tensor, rows: tl.tensor, N: tl.tensor) -> tl.tensor:
    """Log T of each row and key, never read outside the table."""
    column = positions[:, None] - rows[None, :] + N // 2
    return tl.load(log_bias + tl.minimum(tl.maximum(column, 0), N - 1))
