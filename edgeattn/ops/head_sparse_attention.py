"""`HeadSparseAttention`: decoding over a key-value cache for the active heads alone.

Per sequence b, with L = kv_len clamped to the cache, row t of T queries stands at L − T + t:

    y_t = Σ_j softmax_j(scale k_scale q_t·k_j) v_scale v_j over the keys j ≤ L − T + t

in an active head, else 0; and 0 where a row sees no key. `head_index` lists a sequence's active
query heads in any order, with `groups` its active key heads, whose query heads are all active; -1
is an empty slot. With T > 1 (prefill) all heads are active. This is Polar Sparsity's attention
(arXiv 2505.14884).

`error_count` has per sequence how many indices are out of range or were listed before, which are
skipped, and one more where kv_len is negative or beyond the cache. Cache behind L is never used.
The cache has the dtype of q, or int8; the scales are those of the latter, ones for others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeattn.ops.kernel_widths import block_of
from edgeattn.ops.spec import (
    FLOATS,
    STANDARD_TOLERANCE,
    AttributeSpec,
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

    from edgeattn.ops.function import Body

_CACHE = (*FLOATS, "int8")
_refused = functools.partial(refused, "HeadSparseAttention")
_INPUTS = (
    TensorSpec("q", ("B", "H", "T", "D")),
    TensorSpec("k_cache", ("B", "Hkv", "S", "D"), _CACHE, "C"),
    TensorSpec("v_cache", ("B", "Hkv", "S", "D"), _CACHE, "C"),
    TensorSpec("k_scale", ("Hkv",), ("fp32",), "S", values="positive"),
    TensorSpec("v_scale", ("Hkv",), ("fp32",), "S", values="positive"),
    TensorSpec("head_index", ("B", "K"), ("int32",), "I"),
    TensorSpec("kv_len", ("B",), ("int32",), "I"),
)
_OUTPUTS = (
    TensorSpec("y", ("B", "H", "T", "D")),
    TensorSpec("error_count", ("B",), ("int32",), "I"),
)
_ATTRIBUTES = (
    AttributeSpec("groups", "int", 0),  # 1 where head_index lists key heads
    AttributeSpec("scale", "float", 0.0),  # 0 for 1 / sqrt(D)
)
EMPTY_SLOT = -1


def infer_shapes(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Shapes of y and error_count.

    Raises:
        RuntimeInputError: shapes do not fit each other, or the attributes do not.
    """
    dims = bind(_INPUTS, inputs)
    heads, kv_heads, rows = dims["H"], dims["Hkv"], dims["T"]
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        raise _refused("query heads in groups of one size per key head", f"{heads} for {kv_heads}")
    if isinstance(rows, int) and rows < 1:
        raise _refused("at least one row", f"{rows}")
    if attributes["groups"] not in (0, 1):
        raise _refused("groups of 0 or 1", f"{attributes['groups']}")
    if not 0 <= attributes["scale"] < math.inf:
        raise _refused("a finite scale of at least 0", f"{attributes['scale']}")
    return tuple(inputs[0]), (dims["B"],)


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    head_index: Tensor,
    kv_len: Tensor,
    *,
    groups: int = 0,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in fp32, one sequence after the other.

    Args:
        q: `[B, H, T, D]`, the last T of each sequence's rows.
        k_cache: `[B, Hkv, S, D]`, with the keys of these rows, in the dtype of q or int8.
        v_cache: `[B, Hkv, S, D]`, likewise.
        k_scale: `[Hkv]`, of each key head's keys.
        v_scale: `[Hkv]`, of its values.
        head_index: `[B, K]`, what is active where T is 1.
        kv_len: `[B]`, how much of the cache is filled.
        groups: 1 where head_index lists key heads.
        scale: of the scores, 0 for 1 / sqrt(D).

    Returns:
        y `[B, H, T, D]` in the dtype of q, and error_count `[B]` in int32.
    """
    import torch

    (_, heads, length, width), (_, kv_heads, capacity, _) = q.shape, k_cache.shape
    q_per_kv = heads // kv_heads
    listed = torch.arange(kv_heads if groups else heads, device=q.device)
    times = (head_index.unsqueeze(-1) == listed).sum(1)  # [B, H or Hkv]
    # Slots that are not empty, less one for each head that is listed.
    errors = (head_index != EMPTY_SLOT).sum(1) - (times > 0).sum(1)
    errors += (kv_len < 0) | (kv_len > capacity)
    active = times.repeat_interleave(q_per_kv, 1) > 0 if groups else times > 0
    y = torch.zeros_like(q)
    for b, filled in enumerate(kv_len.clamp(0, capacity).tolist()):
        keys = k_cache[b, :, :filled].float() * k_scale[:, None, None]
        values = v_cache[b, :, :filled].float() * v_scale[:, None, None]
        scores = q[b].float() @ keys.repeat_interleave(q_per_kv, 0).mT  # [H, T, L]
        position = torch.arange(filled - length, filled, device=q.device).unsqueeze(-1)
        unseen = torch.arange(filled, device=q.device) > position
        scores = (scores * (scale or 1 / math.sqrt(width))).masked_fill(unseen, -math.inf)
        # The weights of a row that sees no key are NaN before.
        weights = scores.softmax(-1).masked_fill(unseen, 0)
        rows = (weights @ values.repeat_interleave(q_per_kv, 0)).to(q.dtype)
        y[b] = rows if length > 1 else rows.masked_fill(~active[b, :, None, None], 0)
    return y, errors.int()


def variants(
    dims: Mapping[str, Any], attributes: Mapping[str, Any]
) -> list[tuple[str, dict[str, int]]]:
    """The kernels a node needs, as far as its length is known.

    Raises:
        RuntimeInputError: no kernel is made for such a head dimension, or for so many rows.
    """
    rows, capacity, width = dims["T"], dims["S"], dims["D"]
    if not isinstance(width, int):
        return []
    longest = max((n for n in (rows, capacity) if isinstance(n, int)), default=None)
    block = max(block_of("HeadSparseAttention", (width,), longest), LEAST_BLOCK)
    suffix = INT8_SUFFIX if dims.get("C") == "int8" else ""
    decoding = [(f"decode{suffix}", {"BLOCK": block}), ("reduce", {})]
    prefill = [(f"prefill{suffix}", {"BLOCK": block})]
    kernels = [*(decoding if rows == 1 or not isinstance(rows, int) else ())]
    kernels += prefill if rows != 1 else []
    return [(f"head_sparse_attention.{name}", constants) for name, constants in kernels]


# Smaller head dimensions are padded to it too: one width less to compile for.
LEAST_BLOCK = 32
# Of the kernels that read a cache in int8.
INT8_SUFFIX = "_int8"


def function_body(opset: int) -> ir.Function:
    """The operator in standard ONNX, computed in fp32: all heads with all keys, then a mask.

    Args:
        opset: of the standard domain, 18 or later.
    """
    from edgeattn.ops.function import Body

    body = Body(SPEC, opset)
    q, k_cache, v_cache, k_scale, v_scale, head_index, kv_len = body.inputs
    sizes = {symbol: body.size(q, axis) for axis, symbol in enumerate(("B", "H", "T", "D"))}
    sizes |= {symbol: body.size(k_cache, axis) for axis, symbol in ((1, "Hkv"), (2, "S"))}
    sizes["G"] = body.op("Div", sizes["H"], sizes["Hkv"])
    active, errors = _active(body, sizes, head_index)
    given = body.op("Cast", kv_len, to=body.INT64)
    filled = body.op("Min", body.op("Max", given, body.ints(0)), sizes["S"])
    errors = body.op("Add", errors, _count(body, body.op("Not", body.op("Equal", given, filled))))
    seen, sees = _seen(body, sizes, filled)
    zero, column = body.floats(0.0), body.ints(1, 2)
    # What is behind the last key may be no number.
    keys_end = body.op("Unsqueeze", filled, body.ints(1, 2, 3))
    is_key = body.op("Less", body.op("Unsqueeze", _range(body, sizes["S"]), body.ints(1)), keys_end)
    keys = body.op("Mul", body.fp32(k_cache), body.op("Unsqueeze", k_scale, column))
    values = body.op("Mul", body.fp32(v_cache), body.op("Unsqueeze", v_scale, column))
    keys = body.op("Unsqueeze", body.op("Where", is_key, keys, zero), body.ints(2))
    values = body.op("Unsqueeze", body.op("Where", is_key, values, zero), body.ints(2))
    queries = body.op("Mul", body.fp32(q), body.scale(sizes["D"]))
    queries = body.reshape(queries, sizes, "B", "Hkv", "G", "T", "D")
    scores = body.op("MatMul", queries, body.op("Transpose", keys, perm=(0, 1, 2, 4, 3)))
    scores = body.op("Where", seen, scores, body.floats(_LOWEST))
    y = body.op("MatMul", body.op("Softmax", scores, axis=-1), values)
    y = body.op("Where", sees, y, zero)
    y = body.reshape(y, sizes, "B", "H", "T", "D")
    prefill = body.op("Greater", sizes["T"], body.ints(1))
    active = body.op("Unsqueeze", body.op("Or", active, prefill), body.ints(2, 3))
    y = body.op("CastLike", body.op("Where", active, y, zero), q)
    return body.function(y, body.op("Cast", errors, to=body.INT32))


# Of a score that a row does not see: what is left of it is 0.
_LOWEST = -1e38


def _active(
    body: Body, sizes: Mapping[str, ir.Value], head_index: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Which heads are listed, `[B, H]`, and how many indices are wrong, `[B]`.

    Of a listed key head, the first query head alone is counted for errors.
    """
    groups = body.op("Cast", body.attribute("groups"), to=body.BOOL)
    heads = _range(body, sizes["H"])
    kv_heads = body.op("Div", heads, sizes["G"])
    first = body.op("Equal", body.op("Mul", kv_heads, sizes["G"]), heads)
    counted = body.op("Or", first, body.op("Not", groups))
    listed = body.op("Where", groups, kv_heads, heads)
    index = body.op("Cast", head_index, to=body.INT64)
    matches = body.op("Equal", body.op("Unsqueeze", index, body.ints(2)), listed)  # [B, K, H]
    times = body.op("ReduceSum", _count(body, matches), body.ints(1), keepdims=0)
    active = body.op("Greater", times, body.ints(0))
    # Slots that are not empty, less one for each head that is listed.
    filled = _count(body, body.op("Not", body.op("Equal", index, body.ints(EMPTY_SLOT))))
    right = _count(body, body.op("And", active, counted))
    errors = body.op(
        "Sub",
        body.op("ReduceSum", filled, body.ints(1), keepdims=0),
        body.op("ReduceSum", right, body.ints(1), keepdims=0),
    )
    return active, errors


def _seen(body: Body, sizes: Mapping[str, ir.Value], filled: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Which keys each row sees, `[B, 1, 1, T, S]`, and whether it sees any, `[B, 1, 1, T, 1]`."""
    start = body.op("Unsqueeze", body.op("Sub", filled, sizes["T"]), body.ints(1, 2, 3, 4))
    rows = body.op("Unsqueeze", _range(body, sizes["T"]), body.ints(1))
    position = body.op("Add", start, rows)
    seen = body.op("LessOrEqual", _range(body, sizes["S"]), position)
    return seen, body.op("GreaterOrEqual", position, body.ints(0))


def _range(body: Body, size: ir.Value) -> ir.Value:
    """0, 1, … `[size]`."""
    return body.op("Range", body.scalar(0), body.op("Squeeze", size), body.scalar(1))


def _count(body: Body, truths: ir.Value) -> ir.Value:
    """1 for true, else 0."""
    return body.op("Cast", truths, to=body.INT64)


def _case(
    name: str,
    b: int = 2,
    h: int = 4,
    kv: int = 2,
    t: int = 1,
    s: int = 70,
    d: int = 64,
    k: int = 3,
    *,
    dtype: str = "fp32",
    cache: str | None = None,
    values: Mapping[str, str] | None = None,
    **attributes: float,
) -> Case:
    dims = {"B": b, "H": h, "Hkv": kv, "T": t, "S": s, "D": d, "K": k}
    # Some lie behind the cache.
    values = {"kv_len": "large", **(values or {})}
    return Case(name, dims, dtype, attributes, values, {"C": cache} if cache else {})


_INT8_SCALES = dict.fromkeys(("k_scale", "v_scale"), "unit")

SPEC = OpSpec(
    name="HeadSparseAttention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    attributes=_ATTRIBUTES,
    triton="edgeattn.kernels.head_sparse_attention:head_sparse_attention",
    plugin=True,
    variants=variants,
    cases=(
        _case("decode", b=3, s=300, dtype="fp16"),
        _case("decode-groups", b=3, kv=4, h=8, s=200, groups=1, dtype="fp16"),
        _case("one-key-head", b=3, h=18, kv=1, d=32, k=9),
        _case("no-groups", b=4, h=3, kv=3, d=16, s=130),
        _case("more-slots-than-heads", h=2, k=40, d=128, dtype="fp16"),
        _case("no-slots", k=0, d=32),
        _case("empty-cache", s=0, d=32),
        _case("odd-width", b=4, h=6, kv=3, d=72, s=65, dtype="fp16"),
        _case("small-heads", b=4, d=8, s=20, groups=1),
        _case("short", b=3, values={"kv_len": "any"}),
        _case("prefill", b=3, t=67, s=200, d=64, dtype="fp16"),
        _case("prefill-longer-than-cache", b=4, t=40, s=33, d=16, groups=1),
        _case("two-rows", b=3, t=2, s=140, d=128, dtype="fp16"),
        _case("brain-float", b=3, d=32, dtype="bf16"),
        _case("int8-cache", b=4, s=200, dtype="fp16", cache="int8", values=_INT8_SCALES),
        _case("int8-prefill", b=3, t=20, d=40, cache="int8", values=_INT8_SCALES),
        _case("scaled", b=3, d=32, scale=0.7),
    ),
    tolerance=STANDARD_TOLERANCE,
)
