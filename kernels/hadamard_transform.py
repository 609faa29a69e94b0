"""Triton kernel of `HadamardTransform`: two small products per tile, one with each factor.

x is a matrix of M columns here, in which K rows together are a block of the transform. A program
does some columns of as many whole blocks as fit `BLOCK_K` rows: it multiplies their rows with
`right`, and the sums with `left` once per block, which stands on the diagonal of a larger matrix.

Products are summed in fp32. fp32 inputs are multiplied in "tf32x3", as exact as fp32. 16-bit ones
are multiplied as they are; the sums between the two products are rounded to 16 bits, as the result
is, and for that divided by the largest of their column, so that none is out of fp16's range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from edgeattn.kernels.chunks import dot, jit, load, store
from edgeattn.kernels.kernel import Kernel
from edgeattn.kernels.launch import check_call
from edgeattn.ops.hadamard_transform import SPEC, rows_of_tile, variants

_STEP = tl.constexpr(64)  # columns and rows of a product's parts


@jit
def transform(
    x: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    y: tl.tensor,
    L: tl.tensor,
    K: tl.tensor,
    M: tl.tensor,
    TILE: tl.tensor,
    scale: tl.tensor,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Some columns of `TILE` rows of x `[L, M]`."""
    PRECISION: tl.constexpr = "tf32x3"  # where numbers have 32 bits
    M = M // VECTOR * VECTOR  # which the compiler understands
    parts = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0)
    first = (program // parts).to(tl.int64) * TILE
    height = tl.minimum(L - first, TILE)
    x, y = x + first * M, y + first * M
    rows = tl.arange(0, BLOCK_K)
    columns = program % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for start in range(0, M, _STEP):
        inner = start + tl.arange(0, _STEP)
        factor = load(right, inner, columns, M, M)
        sums += dot(load(x, rows, inner, height, M), factor, PRECISION)
    scales = tl.full([1, BLOCK_M], 1.0, tl.float32) * scale
    if x.dtype.element_ty != tl.float32:
        largest = tl.maximum(tl.max(tl.abs(sums), axis=0), 1e-30)[None, :]
        sums, scales = sums * (1 / largest), scales * largest
    sums = sums.to(x.dtype.element_ty)
    for start in tl.static_range(0, BLOCK_K, _STEP):
        out = start + tl.arange(0, _STEP)
        same_block = (out // K)[:, None] == (rows // K)[None, :]
        place = left + (rows % K)[None, :] * K + (out % K)[:, None]
        factor = tl.load(place, mask=same_block, other=0.0)
        store(y, out, columns, height, M, dot(factor, sums, PRECISION) * scales)


TRANSFORM = Kernel(
    name="hadamard_transform.transform",
    function=transform,
    arguments={
        **dict.fromkeys(("x", "left", "right", "y"), "*T"),
        **dict.fromkeys(("L", "K", "M", "TILE"), "i32"),
        "scale": "fp32",
    },
    constants=("BLOCK_K", "BLOCK_M", "VECTOR"),
    grid=("cdiv(M, BLOCK_M) * cdiv(L, TILE)", "1", "1"),
    num_warps=8,
    num_stages=2,
)
KERNELS: tuple[Kernel, ...] = (TRANSFORM,)


def hadamard_transform(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`edgeattn.ops.hadamard_transform.reference`, whose arguments these are, on a GPU.

    Raises:
        RuntimeInputError: shapes do not fit, or no kernel is made for such inputs.
    """
    tensors = check_call(SPEC, (x, left, right), {})
    launch(tensors, {})
    return tensors["y"]


def launch(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    """Runs the kernel on inputs and outputs, by name, that fit the operator and are contiguous.

    Raises:
        RuntimeInputError: no kernel is made for such factors.
    """
    x, k, m = tensors["x"], len(tensors["left"]), len(tensors["right"])
    dims = {"...": tuple(x.shape[:-1]), "N": x.shape[-1], "K": k, "M": m}
    ((_, constants),) = variants(dims, attributes)
    sizes = {"L": x.numel() // m, "K": k, "M": m, "TILE": rows_of_tile(constants["BLOCK_K"], k)}
    with torch.cuda.device(x.get_device()):
        TRANSFORM.launch({**tensors, **sizes, "scale": 1 / math.sqrt(k * m), **constants})
