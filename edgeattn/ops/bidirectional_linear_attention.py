"""`BidirectionalLinearAttention`: linear attention to rows before and behind, with decay (LION).

Per head, for rows i and j of query q, key k, value v and log-decay g = log λ:

    y_i = scale Σ_j M_ij (q_i·k_j) v_j, with `normalise` divided by scale Σ_j M_ij q_i·k_j + epsilon
    M_ij = exp D_ij,  D_ij = g_{i+1} + … + g_j (i < j),  D_ii = 0,
                      D_ij = g_j + … + g_{i-1} (i > j),  without `gate_shift` g_{j+1} + … + g_i

These are the formulas of arXiv 2502.16249; `gate_shift` is what LION's own checkpoints mean.
LION-LIT has g = 0, LION-D one g per head, LION-S one per head and row. The k, v and g of a key that
is padding are 0: the others get what they would get without it. Where all keys are, y is 0.

In chunks (the function body and the kernels), with U = [V, 1] and f the gates that enter a row from
the row before it, f_i = g_{i-1} or g_i:

    Y = scale ((Q Kᵀ ⊙ M) U + exp(f_1 + … + f_i) Q S + exp(g_{i+1} + … + g_C) Q R),
    S' = exp(f_1 + … + f_C) S + (K ⊙ exp(f_{j+1} + … + f_C))ᵀ U   (the state before the next chunk),
    R' = exp(g_1 + … + g_C) R + (K ⊙ exp(g_1 + … + g_j))ᵀ U       (that behind the one before).

All sums are of segments, never differences of cumulative sums, which cancel where decay is strong
and are NaN at −∞. No exponent is positive.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeattn.ops.kernel_widths import block_of
from edgeattn.ops.spec import (
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

_refused = functools.partial(refused, "BidirectionalLinearAttention")
_INPUTS = (
    TensorSpec("q", ("B", "H", "T", "Dk")),
    TensorSpec("k", ("B", "H", "T", "Dk")),
    TensorSpec("v", ("B", "H", "T", "Dv")),
    TensorSpec("log_decay", ("B", "H", "T"), ("fp32",), "S", values="non-positive"),
    TensorSpec("key_padding", ("B", "T"), ("int32",), "P", values="truth"),  # 0 for a key
)
_OUTPUTS = (TensorSpec("y", ("B", "H", "T", "Dv")),)
_ATTRIBUTES = (
    AttributeSpec("gate_shift", "int", 1),  # 0 for the decays that causal models have
    AttributeSpec("normalise", "int", 1),  # 1 to divide by the row's sum
    AttributeSpec("scale", "float", 0.0),  # 0 for 1 / sqrt(Dk)
    AttributeSpec("epsilon", "float", 1e-6),
)
# A row that sees no key is divided by epsilon alone, whose reciprocal must be a number in fp32.
LEAST_EPSILON = 1e-37


def infer_shapes(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    """The shape of y.

    Raises:
        RuntimeInputError: shapes do not fit each other, or the attributes do not.
    """
    dims = bind(_INPUTS, inputs)
    for name in ("gate_shift", "normalise"):
        if attributes[name] not in (0, 1):
            raise _refused(f"{name} of 0 or 1", f"{attributes[name]}")
    least = {"scale": 0.0, "epsilon": LEAST_EPSILON if attributes["normalise"] else 0.0}
    for name, bound in least.items():
        if not bound <= attributes[name] < math.inf:
            raise _refused(f"a finite {name} of at least {bound:g}", f"{attributes[name]}")
    return ((*inputs[0][:3], dims["Dv"]),)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    key_padding: Tensor,
    *,
    gate_shift: int = 1,
    normalise: int = 1,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """The definition in fp32, each row against all keys.

    Args:
        q: `[B, H, T, Dk]`.
        k: `[B, H, T, Dk]`.
        v: `[B, H, T, Dv]`.
        log_decay: `[B, H, T]`, at most 0; zeros for no decay.
        key_padding: `[B, T]`, not 0 where a key is padding.
        gate_shift: 1 where the gate of row j, not that of row i, decays what row i > j sees of it.
        normalise: 1 to divide by the row's sum.
        scale: of the queries, 0 for 1 / sqrt(Dk).
        epsilon: added to the row's sum.

    Returns:
        `[B, H, T, Dv]` in the dtype of q.

    Raises:
        RuntimeInputError: a key's log-decay is positive or NaN; kernels and plugins do not look.
    """
    padding = (key_padding != 0).unsqueeze(1)
    gates = log_decay.float().masked_fill(padding, 0)
    if not bool((gates <= 0).all()):
        raise _refused("log-decays of at most 0", f"{float(gates.max()):.3g}")
    entering = gates.roll(1, -1) if gate_shift else gates  # what enters the first row is not read
    keys = k.float().masked_fill(padding.unsqueeze(-1), 0)
    values = v.float().masked_fill(padding.unsqueeze(-1), 0)
    queries = q.float() * (scale or 1 / math.sqrt(q.shape[-1]))
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    between = gates.new_empty(gates.shape)
    for i in range(q.shape[2]):
        # D_ij of all j, summed up away from row i.
        before = entering[..., 1 : i + 1].flip(-1).cumsum(-1).flip(-1)
        behind = gates[..., i + 1 :].cumsum(-1)
        between[..., :i], between[..., i], between[..., i + 1 :] = before, 0, behind
        weights = between.exp() * (keys @ queries[:, :, i, :, None]).squeeze(-1)
        row = (weights.unsqueeze(-2) @ values).squeeze(-2)
        if normalise:
            row = row / (weights.sum(-1, keepdim=True) + epsilon)
        y[:, :, i] = row.to(y.dtype)
    return y


def variants(
    dims: Mapping[str, Any], attributes: Mapping[str, Any]
) -> list[tuple[str, dict[str, int]]]:
    """The kernels a node needs.

    Raises:
        RuntimeInputError: no kernel is made for such head dimensions, or for so many rows.
    """
    widths = (dims["Dk"], dims["Dv"])
    if not all(isinstance(width, int) for width in widths):
        return []
    constants = {"BLOCK": block_of("BidirectionalLinearAttention", widths, dims["T"])}
    return [(f"bidirectional_linear_attention.{name}", constants) for name in ("states", "outputs")]


# Rows of a chunk in the function body.
_CHUNK = 64


def function_body(opset: int) -> ir.Function:
    """The operator in standard ONNX, computed in fp32, linear in T.

    All chunks are done at once, but for their states: a Scan carries S forward and R backward and
    gives those of every chunk.

    Args:
        opset: of the standard domain, 18 or later.
    """
    from edgeattn.ops.function import Body

    body = Body(SPEC, opset)
    q, k, v, log_decay, key_padding = body.inputs
    sizes = {symbol: body.size(q, axis) for axis, symbol in enumerate(("B", "H", "T", "Dk"))}
    sizes |= {"Dv": body.size(v, 3), **body.chunk_sizes(sizes["T"], _CHUNK)}
    sizes["Du"] = body.op("Add", sizes["Dv"], body.ints(1))
    is_key = body.op("Not", body.op("Cast", key_padding, to=body.BOOL))
    is_key = body.op("Unsqueeze", is_key, body.ints(1, 3))
    zero, one = body.floats(0.0), body.floats(1.0)
    k = body.op("Where", is_key, body.fp32(k), zero)
    v = body.op("Where", is_key, body.fp32(v), zero)
    ones = body.op("Expand", one, body.dims(sizes, "B", "H", "T", 1))
    leaving = body.op("Where", is_key, body.op("Unsqueeze", log_decay, body.ints(-1)), zero)
    y = _chunks(
        body,
        sizes,
        q=body.chunked(body.op("Mul", body.fp32(q), body.scale(sizes["Dk"])), sizes, "H", "Dk"),
        k=body.chunked(k, sizes, "H", "Dk"),
        u=body.chunked(body.op("Concat", v, ones, axis=3), sizes, "H", "Du"),
        entering=body.chunked(_entering(body, sizes, leaving), sizes, "H", 1),
        leaving=body.chunked(leaving, sizes, "H", 1),
    )
    normalise = body.op("Cast", body.attribute("normalise"), to=body.BOOL)
    total = body.op("Add", body.last(y, 4), body.attribute("epsilon"))
    y = body.op("Slice", y, body.ints(0), body.ints(-1), body.ints(4))
    y = body.op("Div", y, body.op("Where", normalise, total, one))
    y = body.op("Transpose", y, perm=(1, 2, 0, 3, 4))
    y = body.reshape(y, sizes, "B", "H", "NC", "Dv")
    y = body.op("Slice", y, body.ints(0), sizes["T"], body.ints(2))
    return body.function(body.op("CastLike", y, body.inputs[0]))


def _entering(body: Body, sizes: Mapping[str, ir.Value], leaving: ir.Value) -> ir.Value:
    """The gate that enters each row from the row before it, `[B, H, T, 1]`."""
    shift = body.op("Cast", body.attribute("gate_shift"), to=body.BOOL)
    first = body.op("ConstantOfShape", body.dims(sizes, "B", "H", 1, 1))
    others = body.op("Slice", leaving, body.ints(0), body.ints(-1), body.ints(2))
    return body.op("Where", shift, body.op("Concat", first, others, axis=2), leaving)


def _chunks(
    body: Body,
    sizes: Mapping[str, ir.Value],
    *,
    q: ir.Value,
    k: ir.Value,
    u: ir.Value,
    entering: ir.Value,
    leaving: ir.Value,
) -> ir.Value:
    """Y of all chunks, `[N, B, H, C, Du]`.

    Args:
        body: of the function.
        sizes: all it needs.
        q: `[N, B, H, C, Dk]`, scaled.
        k: `[N, B, H, C, Dk]`.
        u: `[N, B, H, C, Du]`.
        entering: f, `[N, B, H, C, 1]`.
        leaving: g, `[N, B, H, C, 1]`.
    """
    # D and M of a chunk, [N, B, H, C (i), C (j)]; one of both sums is 0.
    rows = body.op("Range", body.scalar(0), body.op("Squeeze", sizes["C"]), body.scalar(1))
    i, j = body.op("Unsqueeze", rows, body.ints(1)), body.op("Unsqueeze", rows, body.ints(0))
    zero, across = body.floats(0.0), body.op("Transpose", leaving, perm=(0, 1, 2, 4, 3))
    steps = body.op("Where", body.op("Greater", i, j), entering, zero)
    before = body.op("CumSum", steps, body.scalar(3))
    steps = body.op("Where", body.op("Greater", j, i), across, zero)
    behind = body.op("CumSum", steps, body.scalar(4))
    decays = body.op("Exp", body.op("Add", before, behind))
    scores = body.op("MatMul", q, body.op("Transpose", k, perm=(0, 1, 2, 4, 3)))
    y = body.op("MatMul", body.op("Mul", scores, decays), u)
    # From the chunk's first row and to it; the last row and column of M lead to its end.
    into = body.op("Exp", body.op("CumSum", entering, body.scalar(3)))
    back = body.op("Exp", body.op("CumSum", leaving, body.scalar(3)))
    ahead = body.op("Transpose", body.last(decays, 3), perm=(0, 1, 2, 4, 3))
    state, behind_state = _states(
        body,
        sizes,
        kept=body.last(into, 3),
        added=_product(body, body.op("Mul", k, ahead), u),
        kept_behind=body.last(back, 3),
        added_behind=_product(body, body.op("Mul", k, back), u),
    )
    y = body.op("Add", y, body.op("MatMul", body.op("Mul", q, into), state))
    recalled = body.op("MatMul", body.op("Mul", q, body.last(decays, 4)), behind_state)
    return body.op("Add", y, recalled)


def _product(body: Body, k: ir.Value, u: ir.Value) -> ir.Value:
    """Kᵀ U of every chunk."""
    return body.op("MatMul", body.op("Transpose", k, perm=(0, 1, 2, 4, 3)), u)


def _states(
    body: Body,
    sizes: Mapping[str, ir.Value],
    *,
    kept: ir.Value,
    added: ir.Value,
    kept_behind: ir.Value,
    added_behind: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """S before and R behind every chunk, `[N, B, H, Dk, Du]`.

    Args:
        body: of the function.
        sizes: all it needs.
        kept: what is left of S behind a chunk, `[N, B, H, 1, 1]`.
        added: and what comes to it, `[N, B, H, Dk, Du]`.
        kept_behind: of R before a chunk, likewise.
        added_behind: likewise.
    """
    empty = body.op("ConstantOfShape", body.dims(sizes, "B", "H", "Dk", "Du"))
    rows = {
        "kept": kept,
        "added": added,
        "kept_behind": body.reversed(kept_behind),
        "added_behind": body.reversed(added_behind),
    }
    _, (before, behind) = body.scan({"before": empty, "behind": empty}, rows, _step)
    return before, body.reversed(behind)


def _step(body: Body, values: Mapping[str, ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
    """The states behind a chunk on either way, and those it meets."""
    states, met = [], []
    for state, kept, added in (
        ("before", "kept", "added"),
        ("behind", "kept_behind", "added_behind"),
    ):
        left = body.op("Mul", values[kept], values[state])
        states.append(body.op("Add", left, values[added]))
        met.append(body.op("Identity", values[state]))
    return states, met


def _case(
    name: str,
    b: int = 1,
    h: int = 2,
    t: int = 7,
    dk: int = 16,
    dv: int = 16,
    *,
    dtype: str = "fp32",
    values: Mapping[str, str] | None = None,
    **attributes: float,
) -> Case:
    dims = {"B": b, "H": h, "T": t, "Dk": dk, "Dv": dv}
    # As feature maps give them; the row's sum may be 0 otherwise.
    features = dict.fromkeys(("q", "k"), "non-negative") if attributes.get("normalise", 1) else {}
    return Case(name, dims, dtype, attributes, {**features, **(values or {})})


SPEC = OpSpec(
    name="BidirectionalLinearAttention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    attributes=_ATTRIBUTES,
    triton="edgeattn.kernels.bidirectional_linear_attention:bidirectional_linear_attention",
    plugin=True,
    variants=variants,
    cases=(
        _case("odd-length", b=3, t=67, dk=64, dv=64, dtype="fp16"),
        _case("one-row", t=1, dk=64, dv=64, dtype="fp16"),
        _case("short", b=2),
        _case("one-chunk", t=64, gate_shift=0),
        _case("causal-gates", b=2, t=130, dk=64, dv=64, gate_shift=0),
        _case("no-decay", t=200, values={"log_decay": "zero", "key_padding": "zero"}),
        _case("not-normalised", t=65, dk=32, dv=32, normalise=0, dtype="fp16"),
        _case("all-padding", b=2, t=20, values={"key_padding": "positive"}),
        _case("small-heads", t=33, dk=8, dv=8),
        _case("unequal-widths", t=35, dk=40, dv=24, dtype="fp16"),
        _case("wide-heads", t=70, h=1, dk=128, dv=128, dtype="fp16"),
        _case("brain-float", t=19, dk=32, dv=32, dtype="bf16"),
        _case("scaled", t=20, scale=0.7, epsilon=0.1),
    ),
    tolerance=STANDARD_TOLERANCE,
)
