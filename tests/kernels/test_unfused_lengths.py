"""The length that decides whether a row of FftRopeAttention falls back is rounded step by step.

A product that a compiler fused with the sum behind it would round otherwise than the reference.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("needs Triton: install edgeattn[kernels]", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from edgeattn.kernels.polynomial_states import squared_length

SIZE = 32


@triton.jit
def plain_length(x, D):
    squares = x * x
    rounder = (tl.max(squares, axis=1) * (2.0 * D))[:, None]
    return tl.sum((squares + rounder) - rounder, axis=1)


@triton.jit
def lengths(x, y, D, PLAIN: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    rows = tl.load(x + i[:, None] * SIZE + i[None, :])
    tl.store(y + i, plain_length(rows, D) if PLAIN else squared_length(rows, D))


def instructions(plain: bool, sm: int) -> Counter[str]:
    """Of a warp, each of whose threads has SIZE numbers: what is computed, by kind."""
    constants = {"PLAIN": plain, "SIZE": SIZE}
    types = {"x": "*fp32", "y": "*fp32", "D": "i32"}
    source = triton.compiler.ASTSource(lengths, types, constexprs=constants)
    target = GPUTarget("cuda", sm, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 1})
    return Counter(re.findall(r"\b(fma|mul|add|sub)\.[.\w]*f32", compiled.asm["ptx"]))


@pytest.mark.parametrize("sm", [75, 87, 120])
def test_no_product_is_fused_with_a_sum(sm: int) -> None:
    found = instructions(False, sm)
    # Squares and what rounds them; each is added to, subtracted from and summed up on its own.
    assert found["fma"] > SIZE
    assert found["mul"] == 0
    assert found["sub"] == SIZE
    assert found["add"] >= 2 * SIZE - 1


def test_a_compiler_would_fuse_them() -> None:
    assert instructions(True, 87)["add"] < instructions(False, 87)["add"]
