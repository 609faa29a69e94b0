"""Hadamard matrices by construction, and the orthogonal transforms made of them.

Every matrix here is symmetric, so each transform is its own inverse and it does not matter whether
rows or columns are multiplied. A Hadamard matrix of order n has entries of +-1 and H Hᵀ = n I.
Orders come from R. E. A. C. Paley, "On orthogonal matrices" (1933), and Kronecker products:

- Sylvester: 2.
- Paley I: q + 1 for a prime power q = 3 mod 4.
- Paley II: 2 (q + 1) for a prime power q = 1 mod 4.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeattn.errors import LoweringError


@dataclass(frozen=True, eq=False)
class HadamardFactors:
    """The rotation I ⊗ (left ⊗ right) / sqrt(K M) of vectors of `blocks` K M numbers.

    Attributes:
        left: `[K, K]` of +-1, fp64, a Hadamard matrix; those made here are symmetric.
        right: `[M, M]`, likewise.
        blocks: number of equal parts of the vector that are rotated each on its own.
    """

    left: Tensor
    right: Tensor
    blocks: int = 1

    def __post_init__(self) -> None:
        """Refuses factors that would not rotate.

        Raises:
            LoweringError: one is no Hadamard matrix.
        """
        for name, matrix in (("left", self.left), ("right", self.right)):
            if not _is_hadamard(matrix):
                raise LoweringError(
                    expected=f"a Hadamard matrix as the {name} factor: of 1 and -1, H Hᵀ = n I",
                    came=f"one of shape {list(matrix.shape)} that is none",
                    todo="take the factors of hadamard_factors",
                )

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return self.blocks * len(self.left) * len(self.right)

    @property
    def full(self) -> bool:
        """Whether every output depends on every input."""
        return self.blocks == 1

    @property
    def description(self) -> str:
        """What is rotated together, for reports."""
        how = ", full" if self.full else f" in {self.blocks} blocks, as no full one is known"
        return f"Hadamard of {self.size}{how}"


def _is_hadamard(matrix: Tensor) -> bool:
    if matrix.ndim != 2 or len(matrix) < 1 or len(matrix) != matrix.shape[1]:
        return False
    square = matrix.double() @ matrix.double().T
    n = len(matrix)
    return bool(
        (matrix.abs() == 1).all() and torch.equal(square, n * torch.eye(n, dtype=square.dtype))
    )


def hadamard(n: int) -> Tensor:
    """A symmetric Hadamard matrix, `[n, n]` fp64.

    Raises:
        LoweringError: no construction of this module gives the order.
    """
    orders = _factor(n)
    if orders is None:
        raise LoweringError(
            expected="an order of a Hadamard matrix by Sylvester's and Paley's constructions",
            came=f"{n} is none",
            todo="use hadamard_factors, which falls back to a block diagonal",
        )
    return functools.reduce(torch.kron, map(_primitive, orders), torch.ones(1, 1).double())


def hadamard_factors(n: int) -> HadamardFactors:
    """The rotation of vectors of width `n`: fewest blocks, then the most alike factors, K <= M.

    The matrix of order `n` itself is never formed, and applying the factors costs K + M
    multiplications per number.

    Raises:
        LoweringError: `n` is odd (blocks of one number would rotate nothing) or not positive.
    """
    if n < 1 or n % 2:
        raise LoweringError(
            expected="an even width for a Hadamard rotation",
            came=f"the width is {n}",
            todo="choose a scheme that does not rotate it",
        )
    order = next(d for d in reversed(_divisors(n)) if _factor(d) is not None)
    left = next(
        d
        for d in reversed(_divisors(order))
        if d * d <= order and _factor(d) is not None and _factor(order // d) is not None
    )
    return HadamardFactors(hadamard(left), hadamard(order // left), blocks=n // order)


def transform(x: Tensor, factors: HadamardFactors) -> Tensor:
    """Rotates the last axis: per block, seen as X `[K, M]`, left X rightᵀ / sqrt(K M).

    Args:
        x: `[..., size]`; the result has its dtype.
        factors: of that size.
    """
    k, m = len(factors.left), len(factors.right)
    # Scaled here and not at the end, where fp16 might have overflowed.
    left = (factors.left / math.sqrt(k * m)).to(x)
    blocks = x.reshape(*x.shape[:-1], factors.blocks, k, m)
    return (left @ blocks @ factors.right.T.to(x)).flatten(-3)


def rotation_matrix(n: int, *, seed: int | None = None) -> Tensor:
    """The transform of `hadamard_factors(n)` as an orthogonal matrix, `[n, n]` fp64.

    Args:
        n: even width.
        seed: multiplies the columns by random signs; None leaves them.

    Raises:
        LoweringError: `n` is odd or not positive.
    """
    factors = hadamard_factors(n)  # refuses before memory is asked for
    rotation = transform(torch.eye(n, dtype=torch.float64), factors)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        rotation *= torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return rotation


@functools.cache
def _factor(n: int) -> tuple[int, ...] | None:
    """Orders of primitive constructions whose product is `n`, or None."""
    if n == 1:
        return ()
    for order in _divisors(n):
        rest = _factor(n // order) if order == 2 or _paley_field(order) else None
        if rest is not None:
            return (order, *rest)
    return None


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) from which a Paley matrix of `order` is built, or None."""
    if order % 2:
        return None
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q < 3 or q % 4 != residue:
            continue
        p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
        k = round(math.log(q, p))
        if p**k == q:
            return p, k
    return None


def _primitive(order: int) -> Tensor:
    """The matrix of order 2, Paley I or Paley II.

    Paley's matrices are those of the literature with rows permuted: chi(a + b) instead of
    chi(a - b), so that type I is symmetric too.
    """
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    field = _paley_field(order)
    if field is None:
        return sylvester
    p, k = field
    conference = torch.ones(p**k + 1, p**k + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _quadratic_character(p, k)[_sums(p, k)]
    zeros = (conference == 0).double()
    if order == p**k + 1:
        zeros[0, 0] = -1
        return conference - zeros
    return torch.kron(conference, sylvester) + torch.kron(zeros, -sylvester.flip(0, 1))


def _sums(p: int, k: int) -> Tensor:
    """`[q, q]`: number of the sum of two elements of GF(p^k), numbered by their digits base p."""
    numbers = torch.arange(p**k)
    digits = [numbers // p**i % p for i in range(k)]
    return sum(
        ((digit[:, None] + digit) % p * p**i for i, digit in enumerate(digits)),
        torch.zeros(1, 1, dtype=torch.int64),
    )


def _quadratic_character(p: int, k: int) -> Tensor:
    """`[p^k]` fp64: 1 for squares of GF(p^k), -1 for the others, 0 for zero.

    Elements are polynomials in t over GF(p), coefficients as digits, the constant one lowest. The
    rule t^k = r(t) is searched for which the powers of t are all q - 1 elements but zero: then this
    is a field, and the even powers are the squares.
    """
    q = p**k
    for rule in itertools.product(range(p), repeat=k):
        character = [0.0] * q
        element, sign = (1, *[0] * (k - 1)), 1.0
        for _ in range(q - 1):
            number = sum(digit * p**i for i, digit in enumerate(element))
            if number == 0 or character[number]:
                break
            character[number], sign = sign, -sign
            shifted = (0, *element[:-1])
            element = tuple((s + element[-1] * r) % p for s, r in zip(shifted, rule, strict=True))
        else:
            return torch.tensor(character, dtype=torch.float64)
    raise AssertionError(f"every finite field has a primitive element, GF({p}^{k}) too")
