"""Sums over keys of a polynomial in the score, in the three forms that mean the same numbers.

    Y_i = Σ_j T(i − j) P_i(q_i·k_j) u_j,   P_i(s) = Σ_r c_ir s^r

for rows i of q, j of k and u = [v, 1], whose last column gives the denominator. `direct` has the
score matrix; `factorised` features that are products of coordinates, one per multiset m of at most
g of them,

    P_i(q·k) = Σ_m c_i|m| |m|! / Π_l m_l! · Π_l q_l^m_l · Π_l k_l^m_l,

so that sums over keys are states; `toeplitz_fft` is the algorithm of arXiv 2505.11892, in which the
score is Σ_s q_l(s) w_s(i − j) k_l'(s) with symbols w_s. Each power of it is again a Toeplitz matrix
between two diagonal ones, multiplied by FFT, and so is any further factor T.

A row's centre goes into its coefficients (`row_coefficients`), never into the features of keys.
All compute in the dtype of their inputs, on [..., T, D], [..., S, D] and [..., S, N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement
from math import comb

import torch
from torch import Tensor

from edgeattn.errors import RuntimeInputError

# Beyond this a state of features is larger than the keys and values of any length in use: degree 3
# at 64 coordinates has 47,905, degree 4 has 814,385.
MOST_FEATURES = 50_000


def row_coefficients(coefficients: Tensor, centre: Tensor) -> Tensor:
    """Those of P(s − centre) as a polynomial in s, by the binomial theorem.

    Args:
        coefficients: of P, `[..., g + 1]`.
        centre: of each row, `[..., T]`.

    Returns:
        `[..., T, g + 1]`.
    """
    count = coefficients.shape[-1]
    columns = [
        sum(
            (
                coefficients[..., t, None] * comb(t, r) * (-centre) ** (t - r)
                for t in range(r, count)
            ),
            torch.zeros_like(centre),
        )
        for r in range(count)
    ]
    return torch.stack(columns, dim=-1)


def horner(coefficients: Tensor, x: Tensor) -> Tensor:
    """P(x).

    Args:
        coefficients: `[..., g + 1]`, without the last axis broadcast to x.
        x: any.

    Returns:
        A new tensor.
    """
    *others, value = coefficients.unbind(-1)
    if not others:
        return value + torch.zeros_like(x)
    for column in reversed(others):
        value = torch.addcmul(column, value, x)
    return value


def toeplitz_matrix(toeplitz: Tensor, keys: int) -> Tensor:
    """T(i − j), `[..., T, S]`, of T at offsets from −(S − 1) to T − 1, `[..., T + S − 1]`."""
    return toeplitz.unfold(-1, keys, 1).flip(-1)


def direct(q: Tensor, k: Tensor, u: Tensor, coefficients: Tensor, toeplitz: Tensor) -> Tensor:
    """The sums on the score matrix.

    Args:
        q: `[..., T, D]`, scaled.
        k: `[..., S, D]`.
        u: `[..., S, N]`.
        coefficients: of each row, or of all, `[..., T or 1, g + 1]`.
        toeplitz: `[..., T + S − 1]`, as `toeplitz_matrix` has it.

    Returns:
        `[..., T, N]`.
    """
    weights = horner(coefficients.unsqueeze(-2), q @ k.mT)
    return (weights * toeplitz_matrix(toeplitz, k.shape[-2])) @ u


def multisets(items: int, degree: int) -> list[tuple[int, ...]]:
    """Every multiset of at most `degree` of the numbers below `items`, C(items + degree, degree).

    Raises:
        RuntimeInputError: there are more than anybody could use.
    """
    if (count := comb(items + degree, degree)) > MOST_FEATURES:
        raise RuntimeInputError(
            expected=f"at most {MOST_FEATURES:,} features",
            came=f"degree {degree} of {items} coordinates has {count:,}",
            todo="take a lower degree, or project queries and keys to fewer coordinates",
        )
    orders = range(degree + 1)
    return [m for r in orders for m in combinations_with_replacement(range(items), r)]


def multinomial(multiset: Sequence[int]) -> int:
    """|m|! / Π_l m_l!, the number of orders in which a multiset can be written."""
    repeats = (math.factorial(multiset.count(item)) for item in set(multiset))
    return math.factorial(len(multiset)) // math.prod(repeats)


def monomials(x: Tensor, degree: int) -> list[Tensor]:
    """Π_l x_l^m_l of the multisets of each order up to a degree, in the order of `multisets`.

    Those of an order are a coordinate times all of the order before whose coordinates are not
    smaller: a stretch of rows, so that each is one product of whole rows.

    Args:
        x: `[..., T, D]`.
        degree: the highest order.

    Returns:
        `[..., F_r, T]` for each order r.
    """
    rows = x.mT
    found = [torch.ones_like(rows[..., :1, :])]
    firsts = [0] * x.shape[-1]  # where those of the order before begin with each coordinate
    for _ in range(degree):
        before = found[-1]
        counts = [before.shape[-2] - first for first in firsts]
        products = rows.new_empty(*rows.shape[:-2], sum(counts), rows.shape[-1])
        firsts = [0, *accumulate(counts[:-1])]
        for item, (first, count) in enumerate(zip(firsts, counts, strict=True)):
            part = products[..., first : first + count, :]
            others = before[..., before.shape[-2] - count :, :]
            torch.mul(rows[..., item : item + 1, :], others, out=part)
        found.append(products)
    return found


@dataclass(frozen=True)
class Features:
    """Products of coordinates, by the number of factors.

    Attributes:
        counts: of each order, in how many orders each can be written, `[F_r, 1]`.
    """

    counts: tuple[Tensor, ...]

    @classmethod
    def of(cls, width: int, degree: int, like: Tensor) -> Features:
        """All up to a degree, their counts on the device and in the dtype of `like`.

        Raises:
            RuntimeInputError: too many features.
        """
        found = multisets(width, degree)
        orders = ([[multinomial(m)] for m in found if len(m) == r] for r in range(degree + 1))
        return cls(tuple(like.new_tensor(counts) for counts in orders))

    @property
    def degree(self) -> int:
        """The highest order."""
        return len(self.counts) - 1

    def sums(self, k: Tensor, u: Tensor) -> list[Tensor]:
        """Σ_j Π_l k_jl^m_l u_j of every multiset, `[..., F_r, N]` for each order r."""
        return [products @ u for products in monomials(k, self.degree)]

    def weighed(self, q: Tensor, coefficients: Tensor, sums: Sequence[Tensor]) -> Tensor:
        """The polynomial of every row of sums, `[..., T, N]`.

        Args:
            q: `[..., T, D]`.
            coefficients: `[..., T or 1, g + 1]`.
            sums: of all orders.
        """
        orders = zip(monomials(q, self.degree), self.counts, sums, strict=True)
        parts = (
            coefficients[..., r, None] * ((counts * of_order).mT @ products).mT
            for r, (products, counts, of_order) in enumerate(orders)
        )
        return sum(parts, torch.zeros_like(q[..., :1]))


def factorised(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    coefficients: Tensor,
    *,
    causal: bool,
    lag: int = 0,
    toeplitz: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """The sums by features: one state, chunks that carry theirs, or one product with T per feature.

    Within a chunk the score matrix is cheaper.

    Args:
        q: `[..., T, D]`, scaled.
        k: `[..., S, D]`.
        u: `[..., S, N]`.
        coefficients: of each row, or of all, `[..., T or 1, g + 1]`; they stay with the query, so
            that they may be negative.
        causal: whether row i sees keys up to i − lag alone; T = S then.
        lag: how many of the last keys it does not see.
        toeplitz: a further factor, `[..., T + S − 1]`, that need not factorise.
        chunk: rows between two states.

    Returns:
        `[..., T, N]`.

    Raises:
        RuntimeInputError: too many features.
    """
    features = Features.of(q.shape[-1], coefficients.shape[-1] - 1, q)
    if toeplitz is not None:
        matrix = toeplitz_matrix(toeplitz, k.shape[-2])
        if causal:
            matrix = matrix.tril(-lag)
        return _by_feature(features, q, k, u, coefficients, matrix)
    if not causal:
        return features.weighed(q, coefficients, features.sums(k, u))
    coefficients = coefficients.expand(*coefficients.shape[:-2], q.shape[-2], -1)
    parts = [torch.split(x, chunk, dim=-2) for x in (q, _behind(k, lag), _behind(u, lag))]
    state, rows = None, []
    for a, b, values, series in zip(*parts, torch.split(coefficients, chunk, dim=-2), strict=True):
        weights = horner(series.unsqueeze(-2), a @ b.mT).tril_()
        found = weights @ values
        rows.append(found if state is None else found + features.weighed(a, series, state))
        if len(rows) < len(parts[0]):
            added = features.sums(b, values)
            state = added if state is None else [x + y for x, y in zip(state, added, strict=True)]
    return torch.cat(rows, dim=-2)


def _by_feature(
    features: Features, q: Tensor, k: Tensor, u: Tensor, coefficients: Tensor, matrix: Tensor
) -> Tensor:
    """The sums with a further factor T, `[..., T, S]`."""
    result = torch.zeros_like(q[..., :1])
    sides = zip(monomials(q, features.degree), monomials(k, features.degree), strict=True)
    for r, (left, right) in enumerate(sides):
        left = (left * features.counts[r]).mT * coefficients[..., r, None]
        for f, column in enumerate(right.unbind(-2)):
            result = result + left[..., f, None] * (matrix @ (column[..., None] * u))
    return result


def _behind(rows: Tensor, lag: int) -> Tensor:
    """`[..., S, N]`, each row `lag` places later, zeros before."""
    kept = max(rows.shape[-2] - lag, 0)
    empty = torch.zeros_like(rows[..., : rows.shape[-2] - kept, :])
    return torch.cat([empty, rows[..., :kept, :]], dim=-2)


@dataclass(frozen=True)
class Symbol:
    """One term of the score: q[query] · values(i − j) · k[key].

    Attributes:
        query: a coordinate.
        key: a coordinate.
        values: at offsets from −(S − 1) to T − 1, `[T + S − 1]`.
    """

    query: int
    key: int
    values: Tensor


def plain_symbols(width: int, offsets: Tensor) -> list[Symbol]:
    """Those of q·k, of any positions."""
    return [Symbol(d, d, torch.ones_like(offsets)) for d in range(width)]


def rope_symbols(frequencies: Tensor, offsets: Tensor) -> list[Symbol]:
    """Those of the scores of q and k before RoPE, which rotates coordinates p and p + D/2.

    Args:
        frequencies: radians per position, `[D / 2]`.
        offsets: i − j, `[T + S − 1]`.
    """
    half, symbols = len(frequencies), []
    for p, frequency in enumerate(frequencies):
        cos, sin = torch.cos(frequency * offsets), torch.sin(frequency * offsets)
        symbols += [Symbol(p, p, cos), Symbol(p + half, p + half, cos)]
        symbols += [Symbol(p, p + half, sin), Symbol(p + half, p, -sin)]
    return symbols


def toeplitz_fft(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    coefficients: Tensor,
    toeplitz: Tensor,
    symbols: Sequence[Symbol],
) -> Tensor:
    """The sums by FFT: one rescaled Toeplitz matrix per multiset of symbols.

    Args:
        q: `[..., T, D]`, scaled.
        k: `[..., S, D]`.
        u: `[..., S, N]`.
        coefficients: of each row, or of all, `[..., T or 1, g + 1]`.
        toeplitz: bias, window, decay and causal mask in one, `[..., T + S − 1]`.
        symbols: of the score.

    Returns:
        `[..., T, N]`.

    Raises:
        RuntimeInputError: too many multisets.
    """
    result = torch.zeros_like(q[..., :1])
    for m in multisets(len(symbols), coefficients.shape[-1] - 1):
        chosen = [symbols[s] for s in m]
        kernel = math.prod((s.values for s in chosen), start=toeplitz)
        left = math.prod((q[..., s.query] for s in chosen), start=torch.ones_like(q[..., 0]))
        right = math.prod((k[..., s.key] for s in chosen), start=torch.ones_like(k[..., 0]))
        left = left * coefficients[..., len(m)] * multinomial(m)
        result = result + left[..., None] * toeplitz_product(kernel, right[..., None] * u)
    return result


def toeplitz_product(toeplitz: Tensor, x: Tensor) -> Tensor:
    """Σ_j T(i − j) x_j, by embedding T in a circulant matrix.

    The error is absolute, about the last place of the largest sums; rows whose own sum is small
    lose that much of theirs.

    Args:
        toeplitz: `[..., T + S − 1]`, as `toeplitz_matrix` has it.
        x: `[..., S, N]`.

    Returns:
        `[..., T, N]`.
    """
    offsets, keys = toeplitz.shape[-1], x.shape[-2]
    size = smooth_length(offsets)  # what is wrapped around ends before row 0
    kernel = torch.fft.rfft(toeplitz, n=size).unsqueeze(-1)
    spectrum = kernel * torch.fft.rfft(x, n=size, dim=-2)
    product: Tensor = torch.fft.irfft(spectrum, n=size, dim=-2)
    return product[..., keys - 1 : offsets, :]


def smooth_length(least: int) -> int:
    """The least number from `least` on whose prime factors are 2, 3 and 5."""
    size = max(least, 1)
    while 30 ** size.bit_length() % size:
        size += 1
    return size
