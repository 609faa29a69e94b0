"""Hadamard matrices and transforms against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.errors import LoweringError
from edgeattn.quant.hadamard import (
    HadamardFactors,
    hadamard,
    hadamard_factors,
    rotation_matrix,
    transform,
)

# Orders up to 600 that are multiples of four and that neither construction gives.
MISSING = [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428]
MISSING += [436, 452, 472, 476, 508, 520, 532, 536, 584, 596]
ORDERS = [1, 2, *(n for n in range(4, 601, 4) if n not in MISSING)]

# Widths of published models: hidden and intermediate sizes.
WIDTHS = [384, 576, 1536, 2048, 4864, 5632, 8960, 9728, 11008, 14336, 18944, 25600, 28672]


def is_hadamard(matrix: Tensor) -> bool:
    n = len(matrix)
    signs = bool((matrix.abs() == 1).all())
    return signs and torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


def dense(factors: HadamardFactors) -> Tensor:
    """The rotation by its definition, `[size, size]`."""
    block = torch.kron(factors.left, factors.right) / math.sqrt(
        len(factors.left) * len(factors.right)
    )
    return torch.block_diag(*[block] * factors.blocks)


def legendre(a: int, p: int) -> int:
    if a % p == 0:
        return 0
    return 1 if any(b * b % p == a % p for b in range(1, p)) else -1


@given(st.sampled_from(ORDERS))
def test_rows_are_orthogonal_and_the_matrix_symmetric(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (n, n)
    assert is_hadamard(matrix)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("n", [*MISSING, -4, 0, 3, 6, 18])
def test_an_order_without_construction_is_refused(n: int) -> None:
    with pytest.raises(
        LoweringError, match=rf"^expected .*, but {n} is none: use hadamard_factors"
    ):
        hadamard(n)


def test_paley_one_is_made_of_legendre_symbols() -> None:
    q = 43
    matrix = hadamard(q + 1)
    assert (matrix[0] == 1).all()
    assert (matrix[:, 0] == 1).all()
    for i in range(q):
        for j in range(q):
            assert matrix[1 + i, 1 + j] == (legendre(i + j, q) or -1)


def test_paley_two_is_made_of_legendre_symbols() -> None:
    q = 37
    corners = hadamard(2 * (q + 1))[2::2, 2::2]
    for i in range(q):
        for j in range(q):
            assert corners[i, j] == (legendre(i + j, q) or 1)


def _multiply(a: tuple[int, ...], b: tuple[int, ...], rule: tuple[int, ...]) -> tuple[int, ...]:
    """The product in GF(7)[t] / (t^3 - rule), coefficients from the constant one up."""
    product = [0] * 5
    for i in range(3):
        for j in range(3):
            product[i + j] += a[i] * b[j]
    for high in (4, 3):
        for i in range(3):
            product[high - 3 + i] += product[high] * rule[i]
    return tuple(c % 7 for c in product[:3])


def test_entries_over_the_field_of_343_elements() -> None:
    """Any two fields of 343 elements are isomorphic: one cubic without a root must match."""
    row = hadamard(344)[1, 1:]  # chi(0 + a), with -1 for a = 0
    elements = [(n % 7, n // 7 % 7, n // 49) for n in range(343)]
    squares = {n for n in range(1, 343) if row[n] == 1}
    assert len(squares) == 171
    assert row[0] == -1
    irreducible = [
        rule
        for rule in elements
        if all((x**3 - rule[0] - rule[1] * x - rule[2] * x * x) % 7 for x in range(7))
    ]
    expected = (
        {sum(c * 7**i for i, c in enumerate(_multiply(e, e, rule))) for e in elements[1:]}
        for rule in irreducible
    )
    assert squares in expected


@pytest.mark.parametrize("n", [4, 36, 76, 344])
def test_the_other_formula_would_be_noticed(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paley II over a field meant for Paley I, and the reverse, give no Hadamard matrix."""
    from edgeattn.quant import hadamard as module

    field = module._paley_field(n)
    assert field is not None
    q = field[0] ** field[1]
    other = 2 * (q + 1) if n == q + 1 else q + 1
    monkeypatch.setattr(module, "_paley_field", lambda order: field)
    assert is_hadamard(module._primitive(n))
    assert not is_hadamard(module._primitive(other))


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_models_are_rotated_in_full(n: int) -> None:
    factors = hadamard_factors(n)
    assert factors.full
    assert factors.size == n
    assert is_hadamard(factors.left)
    assert is_hadamard(factors.right)
    x = torch.randn(3, n, dtype=torch.float64)
    rotated = transform(x, factors)
    assert torch.allclose(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-12)
    assert torch.allclose(transform(rotated, factors), x, rtol=0, atol=1e-12)
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1
    assert torch.allclose(transform(spike, factors).abs(), torch.tensor(n**-0.5).double())


@pytest.mark.parametrize("n", [2, 6, 64, 92, 172, 384, 576, 1536])
def test_transform_is_the_kronecker_product(n: int) -> None:
    factors = hadamard_factors(n)
    x = torch.randn(2, 5, n, dtype=torch.float64)
    assert torch.allclose(transform(x, factors), x @ dense(factors).T, rtol=0, atol=1e-12)
    assert torch.allclose(rotation_matrix(n), dense(factors), rtol=0, atol=1e-12)


def test_factors_need_not_be_symmetric() -> None:
    left, right = hadamard(4)[[1, 0, 3, 2]], hadamard(12).roll(1, dims=0)
    factors = HadamardFactors(left, right, blocks=3)
    x = torch.randn(7, 144, dtype=torch.float64)
    assert torch.allclose(transform(x, factors), x @ dense(factors).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (2, (1, 1, 2)),
        (4, (1, 2, 2)),
        (12, (1, 1, 12)),
        (64, (1, 8, 8)),
        (4864, (1, 64, 76)),
        (11008, (1, 32, 344)),
        (14336, (1, 112, 128)),
        (28672, (1, 128, 224)),
        (172, (43, 2, 2)),
        (92, (23, 2, 2)),
        (13696, (107, 8, 16)),
        (6, (3, 1, 2)),
    ],
)
def test_fewest_blocks_then_the_most_balanced_factors(
    n: int, expected: tuple[int, int, int]
) -> None:
    factors = hadamard_factors(n)
    assert (factors.blocks, len(factors.left), len(factors.right)) == expected
    assert factors.size == n
    assert factors.full == (expected[0] == 1)


@pytest.mark.parametrize("n", [-2, 0, 1, 575])
def test_an_odd_width_is_refused(n: int) -> None:
    with pytest.raises(LoweringError, match=rf"^expected an even width .* is {n}: choose"):
        hadamard_factors(n)
    with pytest.raises(LoweringError):
        rotation_matrix(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transform_keeps_the_dtype(dtype: torch.dtype) -> None:
    factors = hadamard_factors(4864)
    x = torch.randn(4, 4864, dtype=torch.float64)
    x[:, 100] = 3e4  # alone, and half of what fp16 holds
    rotated = transform(x.to(dtype), factors)
    assert rotated.dtype == dtype
    exact = transform(x.to(dtype).double(), factors)
    error = (rotated.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= 2 * torch.finfo(dtype).eps


def test_small_numbers_survive_in_fp16() -> None:
    factors = hadamard_factors(28672)
    x = (torch.randn(2, 28672) * 1e-3).half()
    exact = transform(x.double(), factors)
    error = (transform(x, factors).double() - exact).square().mean().sqrt()
    assert error <= 2e-3 * exact.square().mean().sqrt()


def test_signs_follow_the_seed() -> None:
    plain, first = rotation_matrix(96), rotation_matrix(96, seed=1)
    eye = torch.eye(96, dtype=torch.float64)
    assert torch.equal(first, rotation_matrix(96, seed=1))
    assert not torch.equal(first, rotation_matrix(96, seed=2))
    assert torch.allclose(first @ first.T, eye, rtol=0, atol=1e-14)
    ratio = (first / plain).round()
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))  # one sign per column
    assert set(ratio[0].tolist()) == {-1.0, 1.0}


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    rotation_matrix(8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[:, :-1],  # not square
        lambda h: torch.ones_like(h),  # not orthogonal
        lambda h: 2 * h,
        lambda h: torch.eye(len(h)).double(),
        lambda h: h * torch.nan,
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_that_are_no_hadamard_matrices_are_refused(
    change: Callable[[Tensor], Tensor], side: str
) -> None:
    factors = hadamard_factors(96)
    assert replace(factors, blocks=2).size == 192
    with pytest.raises(LoweringError, match=f"a Hadamard matrix as the {side} factor"):
        replace(factors, **{side: change(getattr(factors, side))})
