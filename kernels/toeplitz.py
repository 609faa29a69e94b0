"""Triton kernels of `FftRopeAttention` that sum over far keys by FFT, and what reads the sums.

Of each head with backend 2, for orders r up to the degree of P and u = [v, 1],

    Y_ir = Σ_f count_f scale^r left_f(q_i) Σ_j T(p_i − j) right_f(k_j − μ) u_j

over the multisets f of r coordinates (`edgeattn.ops.polynomial_sums`). T is exp log_bias where a
key is far, divided by its largest; first keys and those from kv_len on are rows of zeros. As scores
without μ are within score_bound, or the row falls back, the terms of a row's polynomial cannot
cancel more than that allows.

The sums over j are a circular convolution of N points, as offsets are from 1 − Tq to S − 1 in every
sequence. Points lie in lines of `LINE`, n = LINE n_1 + n_2 and m = m_1 + (N / LINE) m_2, so that

    X_m = Σ_n2 ω_LINE^(n_2 m_2) ω_N^(n_2 m_1) Σ_n1 ω_(N / LINE)^(n_1 m_1) x_n,  ω_M = exp(−2πi / M)

is two products of matrices, in fp32, whose powers of ω come from exact integers. T is real: two
columns of u are transformed as the real and imaginary part of one signal.

A program does one such pair of columns for all features, one after the other, in 16 N bytes of its
own: no number of features takes more, and nothing is added up between programs. That is the paper's
algorithm for any T; whether it is ever faster than scores is not measured.
"""

from __future__ import annotations

import triton.language as tl

from edgeattn.kernels.chunks import dot, jit, load, place_program, store
from edgeattn.kernels.polynomial_states import key_count, series
from edgeattn.ops.fft_rope_attention import LOWEST, TOEPLITZ_FFT
from edgeattn.ops.fft_rope_kernels import LINE

_LOWEST, _BACKEND, _LINE = tl.constexpr(LOWEST), tl.constexpr(TOEPLITZ_FFT), tl.constexpr(LINE)
# Lines that are mixed at once, and points of which a signal is made at once.
_LINES, _PLACES = tl.constexpr(32), tl.constexpr(1024)
# Rounding leaves about 1e-7 |T| √keys in every sum of T; smaller sums than this share of |T| √keys
# are not used.
_SHARE = tl.constexpr(1 / 256)
_QUARTER_TURN = tl.constexpr(1.5707963267948966)


@jit
def spectrum(
    log_bias: tl.tensor,
    backend: tl.tensor,
    spectra: tl.tensor,
    norms: tl.tensor,
    signals: tl.tensor,
    TQ: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    HB: tl.tensor,
    N: tl.tensor,
    POINTS: tl.tensor,
    window: tl.tensor,
    causal: tl.tensor,
) -> None:
    """T of one head, transformed and divided by N; its largest logarithm and its norm."""
    head = tl.program_id(0).to(tl.int64)
    points = tl.where(tl.load(backend + head) == _BACKEND, POINTS, 0)
    log_bias += tl.where(HB > 1, head, 0) * N
    spectra, signals = spectra + head * 2 * POINTS, signals + head * (2 * D + 4) * POINTS
    window = tl.minimum(window, S)
    peak = tl.zeros([_PLACES], tl.float32) + _LOWEST
    for start in range(0, points, _PLACES):
        places = start + tl.arange(0, _PLACES)
        peak = tl.maximum(peak, far_bias(log_bias, places, TQ, S, N, POINTS, window, causal))
    largest = tl.max(peak, axis=0)
    squares = tl.zeros([_PLACES], tl.float32)
    for start in range(0, points, _PLACES):
        places = start + tl.arange(0, _PLACES)
        bias = far_bias(log_bias, places, TQ, S, N, POINTS, window, causal)
        kernel = tl.exp(bias - largest)
        kernel = tl.where(bias > _LOWEST, kernel, 0.0)
        squares += kernel * kernel
        tl.store(signals + places, kernel, mask=places < POINTS)
        tl.store(signals + POINTS + places, tl.zeros_like(kernel), mask=places < POINTS)
    tl.debug_barrier()
    lines = points // _LINE
    mix(signals, spectra, -1.0, 0, lines, lines, POINTS)
    tl.debug_barrier()
    for first in range(0, lines, _LINES):
        rows = first + tl.arange(0, _LINES)
        real, imaginary = load_lines(spectra, rows, lines, POINTS)
        real, imaginary = turn(real, imaginary, rows, -1.0, POINTS)
        real, imaginary = mix_within(real, imaginary, -1.0)
        tl.debug_barrier()  # all threads have read what is written now
        store_lines(spectra, rows, lines, POINTS, real / POINTS, imaginary / POINTS)
    tl.store(norms + 2 * head, largest)
    tl.store(norms + 2 * head + 1, tl.sqrt(tl.sum(squares, axis=0)))


@jit
def convolve(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key_mean: tl.tensor,
    backend: tl.tensor,
    kv_len: tl.tensor,
    spectra: tl.tensor,
    signals: tl.tensor,
    far_sums: tl.tensor,
    HKV: tl.tensor,
    G: tl.tensor,
    TQ: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    C: tl.tensor,
    POINTS: tl.tensor,
    sink: tl.tensor,
    scale: tl.tensor,
) -> None:
    """Y of two columns of one query head; a multiset is a ≥ b, of coordinates from 1 on or none."""
    pair, head = place_program(D // 2 + 1)
    query_head, kv_head = head % (HKV * G), head // G
    length = key_count(kv_len, kv_head // HKV, S)
    before = tl.maximum(length - TQ, 0)
    lines, key_lines = POINTS // _LINE, tl.cdiv(length, _LINE)
    first, last = before // _LINE, tl.cdiv(tl.minimum(before + TQ, length), _LINE)
    q, k, v = q + head * TQ * D, k + kv_head * S * D, v + kv_head * S * D
    key_mean, spectra = key_mean + query_head * D, spectra + query_head * 2 * POINTS
    signals += (head * (D // 2 + 1) + pair) * 4 * POINTS
    mixed = signals + 2 * POINTS
    far_sums += (head * C * (D + 2) + 2 * pair) * TQ
    by_fft = tl.load(backend + query_head) == _BACKEND
    for a in range(0, tl.where(by_fft, tl.where(C > 1, D + 1, 1), 0)):
        for b in range(0, tl.where(C > 2, a + 1, 1)):
            write_signal(signals, k, v, key_mean, a, b, pair, sink, length, D, POINTS)
            tl.debug_barrier()
            mix(signals, mixed, -1.0, 0, lines, key_lines, POINTS)
            tl.debug_barrier()
            filter_lines(mixed, spectra, lines, POINTS)
            tl.debug_barrier()
            mix(mixed, signals, 1.0, first, last, lines, POINTS)
            tl.debug_barrier()
            add_signal(far_sums, signals, q, a, b, before, length, TQ, D, POINTS, scale)
            tl.debug_barrier()


@jit
def far_bias(
    log_bias: tl.tensor,
    places: tl.tensor,
    TQ: tl.tensor,
    S: tl.tensor,
    N: tl.tensor,
    POINTS: tl.tensor,
    window: tl.tensor,
    causal: tl.tensor,
) -> tl.tensor:
    """Log T at places of the circle, at least `_LOWEST`, which is that of keys that are not far."""
    offset = tl.where(places < S, places, places - POINTS)
    distance = tl.where(causal > 0, offset, tl.abs(offset))
    far = (places < POINTS) & (offset > -tl.minimum(TQ, S)) & (distance >= window)
    column = tl.minimum(tl.maximum(offset + N // 2, 0), N - 1)
    return tl.maximum(tl.load(log_bias + column, mask=far, other=_LOWEST), _LOWEST)


@jit
def write_signal(
    signal: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key_mean: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    pair: tl.tensor,
    sink: tl.tensor,
    length: tl.tensor,
    D: tl.tensor,
    POINTS: tl.tensor,
) -> None:
    """Two columns of u times a feature of the keys, up to the end of the last line of keys."""
    end = tl.cdiv(length, _LINE) * _LINE
    for start in range(0, end, _PLACES):
        keys = start + tl.arange(0, _PLACES)
        inside = (keys < length) & (keys >= sink)
        feature = coordinate(k, keys, a, inside, D, 1.0) - coordinate(key_mean, 0, a, a > 0, D, 0.0)
        other = coordinate(k, keys, b, inside, D, 1.0) - coordinate(key_mean, 0, b, b > 0, D, 0.0)
        feature = tl.where(inside, feature * other, 0.0)
        values = v + keys * D + 2 * pair
        held = inside & (2 * pair < D)  # the last pair is the column of ones
        even = tl.load(values, mask=held, other=1.0).to(tl.float32)
        odd = tl.load(values + 1, mask=held, other=0.0).to(tl.float32)
        tl.store(signal + keys, feature * even, mask=keys < end)
        tl.store(signal + POINTS + keys, feature * odd, mask=keys < end)


@jit
def add_signal(
    far_sums: tl.tensor,
    signal: tl.tensor,
    q: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    before: tl.tensor,
    length: tl.tensor,
    TQ: tl.tensor,
    D: tl.tensor,
    POINTS: tl.tensor,
    scale: tl.tensor,
) -> None:
    """Adds two columns times a feature of the rows; the first multiset of an order has a ≤ 1."""
    order = tl.where(a > 0, 1, 0) + tl.where(b > 0, 1, 0)
    factor = tl.where(order > 0, scale, 1.0) * tl.where(order > 1, scale, 1.0)
    factor *= tl.where((b > 0) & (a != b), 2.0, 1.0)
    far_sums += order * (D + 2) * TQ
    for start in range(0, TQ, _PLACES):
        steps = start + tl.arange(0, _PLACES)
        inside = (steps < TQ) & (before + steps < length)
        feature = coordinate(q, steps, a, inside, D, 1.0) * coordinate(q, steps, b, inside, D, 1.0)
        for part in range(2):
            sums, found = far_sums + part * TQ + steps, signal + part * POINTS + before + steps
            sofar = tl.load(sums, mask=inside & (a > 1), other=0.0)
            more = feature * factor * tl.load(found, mask=inside, other=0.0)
            tl.store(sums, sofar + more, mask=inside)


@jit
def coordinate(
    matrix: tl.tensor,
    rows: tl.tensor,
    number: tl.tensor,
    inside: tl.tensor,
    D: tl.tensor,
    other: tl.constexpr,
) -> tl.tensor:
    """Coordinate `number` of rows, counted from 1; `other` for number 0."""
    place = matrix + rows * D + number - 1
    return tl.load(place, mask=inside & (number > 0), other=other).to(tl.float32)


@jit
def mix(
    source: tl.tensor,
    target: tl.tensor,
    sign: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    height: tl.tensor,
    POINTS: tl.tensor,
) -> None:
    """The transform over lines: those from `first` to `last`, of a signal that has `height`."""
    lines = POINTS // _LINE
    for begin in range(first, last, _LINES):
        rows = begin + tl.arange(0, _LINES)
        real = tl.zeros([_LINES, _LINE], tl.float32)
        imaginary = tl.zeros([_LINES, _LINE], tl.float32)
        for start in range(0, height, _LINES):
            others = start + tl.arange(0, _LINES)
            power = (rows[:, None] * others[None, :]) % lines
            cosine, sine = root(power, lines)
            x, y = load_lines(source, others, height, POINTS)
            more, turned = product(cosine, sign * sine, x, y)
            real, imaginary = real + more, imaginary + turned
        store_lines(target, rows, last, POINTS, real, imaginary)


@jit
def filter_lines(
    signal: tl.tensor, spectra: tl.tensor, lines: tl.tensor, POINTS: tl.tensor
) -> None:
    """The transform within lines, times T's, and back; in place."""
    for first in range(0, lines, _LINES):
        rows = first + tl.arange(0, _LINES)
        real, imaginary = load_lines(signal, rows, lines, POINTS)
        real, imaginary = turn(real, imaginary, rows, -1.0, POINTS)
        real, imaginary = mix_within(real, imaginary, -1.0)
        x, y = load_lines(spectra, rows, lines, POINTS)
        real, imaginary = real * x - imaginary * y, real * y + imaginary * x
        real, imaginary = mix_within(real, imaginary, 1.0)
        real, imaginary = turn(real, imaginary, rows, 1.0, POINTS)
        tl.debug_barrier()  # all threads have read what is written now
        store_lines(signal, rows, lines, POINTS, real, imaginary)


@jit
def mix_within(real: tl.tensor, imaginary: tl.tensor, sign: tl.constexpr) -> tl.tensor:
    """The transform of each line."""
    points = tl.arange(0, _LINE)
    cosine, sine = root((points[:, None] * points[None, :]) % _LINE, _LINE)
    return product(real, imaginary, cosine, sign * sine)


@jit
def turn(
    real: tl.tensor,
    imaginary: tl.tensor,
    rows: tl.tensor,
    sign: tl.constexpr,
    POINTS: tl.tensor,
) -> tl.tensor:
    """Lines times the powers of ω_N between both transforms; lines behind the last are zeros."""
    power = (rows[:, None] * tl.arange(0, _LINE)[None, :]) % POINTS
    cosine, sine = root(power, POINTS)
    sine *= sign
    return real * cosine - imaginary * sine, real * sine + imaginary * cosine


@jit
def root(power: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Cosine and sine of 2π power / size, of integers with 0 ≤ power < size.

    The angle is what is left beside whole quarter turns, up to π/4, where Taylor's series to x⁹
    err by less than rounding; hardware's own functions err by more.
    """
    quarter = (8 * power + size) // (2 * size)
    x = (4 * power - quarter * size).to(tl.float32) * (_QUARTER_TURN / size)
    z = x * x
    sine = x * (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    cosine = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    is_odd = quarter % 2 == 1
    cosine, sine = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine, tl.where((quarter == 2) | (quarter == 3), -sine, sine)


@jit
def product(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """(a + ib)(c + id), of matrices."""
    real = dot(a, c, "ieee") - dot(b, d, "ieee")
    return real, dot(a, d, "ieee") + dot(b, c, "ieee")


@jit
def load_lines(
    signal: tl.tensor, rows: tl.tensor, height: tl.tensor, POINTS: tl.tensor
) -> tl.tensor:
    """Real and imaginary part of lines, zeros from `height` on."""
    points = tl.arange(0, _LINE)
    real = load(signal, rows, points, height, _LINE)
    return real, load(signal + POINTS, rows, points, height, _LINE)


@jit
def store_lines(
    signal: tl.tensor,
    rows: tl.tensor,
    height: tl.tensor,
    POINTS: tl.tensor,
    real: tl.tensor,
    imaginary: tl.tensor,
) -> None:
    """Writes lines before `height`."""
    points = tl.arange(0, _LINE)
    store(signal, rows, points, height, _LINE, real)
    store(signal + POINTS, rows, points, height, _LINE, imaginary)


@jit
def sums_are_precise(
    far_sums: tl.tensor,
    norms: tl.tensor,
    steps: tl.tensor,
    is_row: tl.tensor,
    length: tl.tensor,
    TQ: tl.tensor,
    D: tl.tensor,
) -> tl.tensor:
    """Whether the sums of T of all rows are large against what rounding leaves in each.

    Of keys of about one size: a much longer one, seen or not, leaves more.
    """
    weights = tl.load(far_sums + D * TQ + steps, mask=is_row, other=0.0)
    norm = tl.load(norms + 1 + steps * 0, mask=is_row, other=0.0)
    least = _SHARE * norm * tl.sqrt(length.to(tl.float32))
    return tl.min(tl.where(is_row & ((weights >= least) == 0), 0, 1), axis=0) > 0


@jit
def recall_convolved(
    far_sums: tl.tensor,
    coefficients: tl.tensor,
    centre: tl.tensor,
    steps: tl.tensor,
    columns: tl.tensor,
    is_row: tl.tensor,
    C: tl.tensor,
    TQ: tl.tensor,
    D: tl.tensor,
) -> tl.tensor:
    """Sums over far keys of P(scale q·(k − μ) − centre), a polynomial in scale q·(k − μ).

    Returns:
        Sums with values `[rows, BLOCK]`, and sums of weights `[rows]`.
    """
    a0, a1, a2, _, _ = series(coefficients, C)
    found = tl.zeros([steps.shape[0], columns.shape[0]], tl.float32)
    total = tl.zeros([steps.shape[0]], tl.float32)
    inside = is_row[:, None] & (columns < D)[None, :]
    for order in range(C):
        factor = tl.where(order > 0, a1 - 2 * a2 * centre, a0 - centre * (a1 - a2 * centre))
        factor = tl.where(order > 1, a2, factor)
        place = far_sums + order * (D + 2) * TQ + steps
        values = tl.load(place[:, None] + columns[None, :] * TQ, mask=inside, other=0.0)
        found += factor[:, None] * values
        total += factor * tl.load(place + D * TQ, mask=is_row, other=0.0)
    return found, total
