"""The kernel of HadamardTransform, interpreted: against the dense product in fp64.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import relative_error
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels.hadamard_transform import hadamard_transform
from edgeattn.ops.hadamard_transform import SPEC
from edgeattn.quant.hadamard import hadamard_factors

# Those that must work in full, and those of heads.
WIDTHS = (
    *(32, 64, 80, 96, 128, 256),
    *(384, 576, 1536, 2048, 4864, 5632, 8960, 9728, 11008, 14336, 18944, 25600, 28672),
)


def dense_rows(left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the matrix of one block, left ⊗ right / sqrt(K M), entry by entry."""
    k, m = len(left), len(right)
    columns = torch.arange(k * m)
    entries = left[rows[:, None] // m, columns // m] * right[rows[:, None] % m, columns % m]
    return entries / math.sqrt(k * m)


@pytest.mark.parametrize("width", WIDTHS)
def test_equal_to_the_dense_product(width: int) -> None:
    factors = hadamard_factors(width)
    left, right = factors.left.float(), factors.right.float()
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, width, generator=generator)
    found = hadamard_transform(x, left, right)
    some = torch.randint(0, width, (24,), generator=generator)
    # y_c = Σ_r x_r H_rc, and H is symmetric: its columns are its rows.
    exact = x.double() @ dense_rows(factors.left, factors.right, some).T
    assert relative_error(found[:, some], exact) < SPEC.tolerance["fp32"].floor


@pytest.mark.parametrize("width", WIDTHS)
def test_twice_is_nothing(width: int) -> None:
    """H Hᵀ = n I, as the matrices are symmetric."""
    factors = hadamard_factors(width)
    left, right = factors.left.float(), factors.right.float()
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    assert relative_error(
        hadamard_transform(hadamard_transform(x, left, right), left, right), x
    ) < (2 * SPEC.tolerance["fp32"].floor)


@settings(deadline=None)
@given(
    k=st.integers(1, 24),
    m=st.integers(1, 140),
    blocks=st.integers(1, 5),
    rows=st.integers(0, 7),
    seed=st.integers(0, 9),
)
def test_any_factors(k: int, m: int, blocks: int, rows: int, seed: int) -> None:
    """Which need be neither symmetric nor Hadamard matrices: blocks are cut where they end."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, n, generator=generator) for n in (k, m))
    x = torch.randn(rows, blocks * k * m, generator=generator)
    exact = (
        x.double().reshape(rows * blocks, k * m) @ torch.kron(left.double(), right.double())
    ) / math.sqrt(k * m)
    found = hadamard_transform(x, left, right).reshape(rows * blocks, k * m)
    assert relative_error(found, exact) < SPEC.tolerance["fp32"].floor or rows == 0


def test_an_outlier_does_not_overflow_fp16() -> None:
    """2,000 times the others, as before layer 11's down projection of SmolLM2."""
    factors = hadamard_factors(1536)
    left, right = factors.left.half(), factors.right.half()
    x = torch.randn(4, 1536, generator=torch.Generator().manual_seed(0))
    x[1, 77] = 60_000.0
    found = hadamard_transform(x.half(), left, right)
    exact = SPEC.reference(x.half().float(), left.float(), right.float())
    assert found.isfinite().all()
    for row in range(4):
        assert relative_error(found[row], exact[row]) < 1e-3


def test_factors_beyond_the_kernel_are_refused() -> None:
    left, right = torch.eye(260), torch.eye(2)
    with pytest.raises(RuntimeInputError, match="a left factor of order 256 at most, but 260 came"):
        hadamard_transform(torch.zeros(1, 520), left, right)
    with pytest.raises(RuntimeInputError, match="a multiple of 8 x 8 numbers"):
        hadamard_transform(torch.zeros(1, 100), torch.eye(8), torch.eye(8))
