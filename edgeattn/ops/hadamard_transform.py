"""`HadamardTransform`: rotates activations at run time (R3 and R4 of SpinQuant, arXiv 2405.16406).

    y = x (I ⊗ left ⊗ right) / sqrt(K M)

for rows x of blocks K M numbers: per block, seen as X `[K, M]`, leftᵀ X right / sqrt(K M), so that
two small products stand for one of the row's size. The factors of `quant.hadamard` are symmetric
Hadamard matrices, but nothing here depends on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.spec import (
    LEADING,
    STANDARD_TOLERANCE,
    Case,
    OpSpec,
    Shape,
    TensorSpec,
    bind,
    refused,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

_ONNX_FLOAT = 1  # TensorProto.FLOAT
_refused = functools.partial(refused, "HadamardTransform")
_INPUTS = (
    TensorSpec("x", (LEADING, "N")),
    TensorSpec("left", ("K", "K")),
    TensorSpec("right", ("M", "M")),
)


def infer_shapes(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    """The shape of x is that of y.

    Raises:
        RuntimeInputError: K M does not divide N, or a factor is not square.
    """
    dims = bind(_INPUTS, inputs)
    sizes = n, k, m = dims["N"], dims["K"], dims["M"]
    if all(isinstance(size, int) for size in sizes) and (n < 1 or k * m < 1 or n % (k * m)):
        raise RuntimeInputError(
            expected=f"rows of a multiple of {k} x {m} numbers, as the factors are",
            came=f"they have {n}",
            todo="take the factors of edgeattn.quant.hadamard.hadamard_factors for that width",
        )
    return (tuple(inputs[0]),)


def reference(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The definition, computed in fp32.

    Args:
        x: `[..., blocks K M]`.
        left: `[K, K]`.
        right: `[M, M]`.

    Returns:
        `[..., blocks K M]` in the dtype of x.
    """
    k, m = len(left), len(right)
    blocks = x.float().reshape(*x.shape[:-1], -1, k, m)
    rotated = left.float().T @ blocks @ right.float() / math.sqrt(k * m)
    return rotated.reshape(x.shape).to(x.dtype)


def function_body(opset: int) -> ir.Function:
    """The operator in standard ONNX, in the dtype of x.

    The scale is applied to left: with constant factors all but Reshape, MatMul, MatMul, Shape and
    Reshape is folded, and fp16 overflows no sooner than the result does. Rows are cut by the
    factors' sizes alone, so their width must have been checked before (`infer_shapes`).

    Args:
        opset: of the standard domain, 15 or later.
    """
    from edgeattn.ops.function import Body

    body = Body(SPEC, opset)
    x, left, right = body.inputs
    k = body.op("Shape", left, start=0, end=1)
    m = body.op("Shape", right, start=0, end=1)
    root = body.op("Sqrt", body.op("Cast", body.op("Mul", k, m), to=_ONNX_FLOAT))
    scale = body.op("CastLike", body.op("Reciprocal", root), left)
    scaled = body.op("Mul", body.op("Transpose", left, perm=(1, 0)), scale)
    sizes = body.op("Concat", body.ints(-1), k, m, axis=0)
    blocks = body.op("Reshape", x, sizes)
    rotated = body.op("MatMul", body.op("MatMul", scaled, blocks), right)
    return body.function(body.op("Reshape", rotated, body.op("Shape", x)))


# Kernels take factors up to this order; the larger one is multiplied part by part.
LARGEST_LEFT = 256
# Rows of x, seen as a matrix of M columns, are counted in int32.
_MOST_ROWS = 2**31 - 1


def rows_of_tile(block: int, k: int) -> int:
    """Rows of whole blocks of K in a tile of `block` rows."""
    return block // k * k


def variants(
    dims: Mapping[str, Any], attributes: Mapping[str, Any]
) -> list[tuple[str, dict[str, int]]]:
    """The kernel a node needs.

    Raises:
        RuntimeInputError: no kernel is made for such factors, or for so many rows.
    """
    k, m = dims["K"], dims["M"]
    if not (isinstance(k, int) and isinstance(m, int)):
        return []
    if k > LARGEST_LEFT:
        raise _refused(f"a left factor of order {LARGEST_LEFT} at most", f"{k}")
    sizes = (*dims[LEADING], dims["N"])
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) // m > _MOST_ROWS:
        raise _refused(f"at most {_MOST_ROWS * m} numbers", f"{math.prod(sizes)}")
    block_k = next(block for block in (64, 128, 256) if block >= k)
    wide = block_k == 128 or (block_k == 64 and m > 64)
    # Numbers loaded at once; orders of Hadamard matrices are 1, 2 and multiples of 4.
    vector = next(vector for vector in (8, 4, 1) if m % vector == 0)
    constants = {"BLOCK_K": block_k, "BLOCK_M": 128 if wide else 64, "VECTOR": vector}
    return [("hadamard_transform.transform", constants)]


SPEC = OpSpec(
    name="HadamardTransform",
    inputs=_INPUTS,
    outputs=(TensorSpec("y", (LEADING, "N")),),
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    triton="edgeattn.kernels.hadamard_transform:hadamard_transform",
    plugin=True,
    variants=variants,
    cases=(
        Case("decode", {"...": (1, 1), "N": 1536, "K": 32, "M": 48}),
        Case("heads", {"...": (2, 3, 5), "N": 64, "K": 8, "M": 8}, dtype="fp16"),
        Case("odd-rows", {"...": (3, 7), "N": 4864, "K": 64, "M": 76}, dtype="fp16"),
        Case("brain-float", {"...": (2, 2), "N": 576, "K": 24, "M": 24}, dtype="bf16"),
        Case("prime-blocks", {"...": (5,), "N": 172, "K": 2, "M": 2}),
        Case("one-factor", {"...": (1, 2), "N": 12, "K": 1, "M": 12}),
        Case("bare-row", {"...": (), "N": 128, "K": 8, "M": 16}),
        Case("unlike-factors", {"...": (2, 3), "N": 11008, "K": 32, "M": 344}),
        Case("wide", {"...": (2, 2), "N": 14336, "K": 112, "M": 128}, dtype="fp16"),
        Case("widest", {"...": (3,), "N": 25600, "K": 160, "M": 160}, dtype="fp16"),
    ),
    tolerance=STANDARD_TOLERANCE,
)
