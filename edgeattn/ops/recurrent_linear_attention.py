"""`RecurrentLinearAttention`: causal linear attention with a state, in prefill and in decoding.

Per head, for rows t of key k, value v, log-decay g (one number, or one per key channel), rate β:

    S_t = Diag(exp g_t) S_{t-1} + k_t u_tᵀ,   u_t = v_t                              (delta = 0)
                                              u_t = β_t (v_t − (Diag(exp g_t) S_{t-1})ᵀ k_t) (1)
    z_t = exp g_t ⊙ z_{t-1} + k_t
    y_t = scale S_tᵀ q_t, with `normalise` divided by scale z_tᵀ q_t + epsilon

What is called the linear and the gated rule (arXiv 2312.06635) is delta = 0 with g = 0 and without,
the delta and the gated delta rule (arXiv 2412.06464) delta = 1; those four are the rules of ONNX's
LinearAttention (opset 27), whose results these are. A group of query heads shares the state of its
key and value head, as there.

In chunks (the function body and the kernels), with segment sums D_ij = g_{j+1} + … + g_i and
e_i = exp(g_1 + … + g_i):

    P_ij = Σ_d q_id k_jd exp D_ijd (j ≤ i),  A_ij = β_i Σ_d k_id k_jd exp D_ijd (j < i),
    U = (I + A)⁻¹ (β V − β (K ⊙ e) S)  (delta = 1; else U = V),
    Y = scale ((Q ⊙ e) S + P U),  S' = Diag(e_C) S + (K ⊙ exp D_C)ᵀ U.

Segment sums are never formed as differences of cumulative sums: those cancel where decay is strong
(5 % error measured with g = −1000 in half of 4096 rows) and are NaN at −∞. No exponent is positive.
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

_FP32 = ("fp32",)
_refused = functools.partial(refused, "RecurrentLinearAttention")
_INPUTS = (
    TensorSpec("q", ("B", "H", "T", "Dk")),
    TensorSpec("k", ("B", "Hkv", "T", "Dk")),
    TensorSpec("v", ("B", "Hkv", "T", "Dv")),
    TensorSpec("log_decay", ("B", "Hkv", "T", "Dg"), _FP32, "S", values="non-positive"),
    TensorSpec("beta", ("B", "Hkv", "T"), _FP32, "S", values="unit"),
    TensorSpec("past_state", ("B", "Hkv", "Dk", "Dv"), _FP32, "S"),
    TensorSpec("past_normaliser", ("B", "Hkv", "Dk"), _FP32, "S"),
)
_OUTPUTS = (
    TensorSpec("y", ("B", "H", "T", "Dv")),
    TensorSpec("present_state", ("B", "Hkv", "Dk", "Dv"), _FP32, "S", updates="past_state"),
    TensorSpec("present_normaliser", ("B", "Hkv", "Dk"), _FP32, "S", updates="past_normaliser"),
)
_ATTRIBUTES = (
    AttributeSpec("delta", "int", 0),  # 1 for the delta rules
    AttributeSpec("normalise", "int", 0),  # 1 to divide by the normaliser
    AttributeSpec("scale", "float", 0.0),  # 0 for 1 / sqrt(Dk)
    AttributeSpec("epsilon", "float", 1e-6),
)


def infer_shapes(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Shapes of y, present_state and present_normaliser.

    Raises:
        RuntimeInputError: shapes do not fit each other, or the attributes do not.
    """
    dims = bind(_INPUTS, inputs)
    h, kv, dk, dg = dims["H"], dims["Hkv"], dims["Dk"], dims["Dg"]
    if isinstance(h, int) and isinstance(kv, int) and (kv < 1 or h % kv):
        raise _refused("query heads in groups of one size per key head", f"{h} for {kv}")
    if isinstance(dg, int) and isinstance(dk, int) and dg not in (1, dk):
        raise _refused(f"one log-decay per row or one per each of {dk} channels", f"{dg}")
    for name in ("delta", "normalise"):
        if attributes[name] not in (0, 1):
            raise _refused(f"{name} of 0 or 1", f"{attributes[name]}")
    if attributes["delta"] and attributes["normalise"]:
        raise _refused("the delta rule without normaliser, which has no meaning there", "both")
    for name in ("scale", "epsilon"):
        if not 0 <= attributes[name] < math.inf:
            raise _refused(f"a finite {name} of at least 0", f"{attributes[name]}")
    state, normaliser = tuple(inputs[5]), tuple(inputs[6])
    return (*inputs[0][:3], dims["Dv"]), state, normaliser


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    past_state: Tensor,
    past_normaliser: Tensor,
    *,
    delta: int = 0,
    normalise: int = 0,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, row by row in fp32.

    Args:
        q: `[B, H, T, Dk]`.
        k: `[B, Hkv, T, Dk]`.
        v: `[B, Hkv, T, Dv]`.
        log_decay: `[B, Hkv, T, 1 or Dk]`, at most 0; zeros for no decay.
        beta: `[B, Hkv, T]`; only read with `delta`.
        past_state: `[B, Hkv, Dk, Dv]`.
        past_normaliser: `[B, Hkv, Dk]`; given back as it is without `normalise`.
        delta: 1 for the delta rules.
        normalise: 1 to divide by the normaliser.
        scale: of the queries, 0 for 1 / sqrt(Dk).
        epsilon: added to the normaliser.

    Returns:
        y `[B, H, T, Dv]` in the dtype of q, present_state and present_normaliser in fp32.

    Raises:
        RuntimeInputError: a log-decay is positive or NaN; kernels and plugins do not look.
    """
    if not bool((log_decay <= 0).all()):
        raise _refused("log-decays of at most 0", f"{float(log_decay.max()):.3g}")
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    scale = scale or 1 / math.sqrt(width)
    grouped = q.float().reshape(batch, kv_heads, heads // kv_heads, length, width) * scale
    state, normaliser = past_state.float(), past_normaliser.float()
    y = q.new_empty(*grouped.shape[:-1], v.shape[-1])
    for t in range(length):
        decay, key, value = log_decay[:, :, t].float().exp(), k[:, :, t].float(), v[:, :, t].float()
        state = decay.unsqueeze(-1) * state
        if delta:
            known = (key.unsqueeze(-2) @ state).squeeze(-2)
            value = beta[:, :, t, None].float() * (value - known)
        state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
        row = grouped[:, :, :, t] @ state
        if normalise:
            normaliser = decay * normaliser + key
            row = row / (grouped[:, :, :, t] @ normaliser.unsqueeze(-1) + epsilon)
        y[:, :, :, t] = row.to(y.dtype)
    y = y.reshape(batch, heads, length, v.shape[-1])
    return y, state.clone(), normaliser.clone()


# Fewer rows than this are walked one by one.
CHUNKED_LENGTH = 16


def variants(
    dims: Mapping[str, Any], attributes: Mapping[str, Any]
) -> list[tuple[str, dict[str, int]]]:
    """The kernels a node needs, as far as its length is known.

    Raises:
        RuntimeInputError: no kernel is made for such head dimensions, or for so many rows.
    """
    length, widths, dg = dims["T"], (dims["Dk"], dims["Dv"]), dims["Dg"]
    if not all(isinstance(width, int) for width in (*widths, dg)):
        return []
    block = block_of("RecurrentLinearAttention", widths, length)
    decoding = {"BLOCK": block}
    if attributes["normalise"]:  # which is read by the program of every value, and written by one
        decoding["BLOCK_V"] = block
    kernels = [("decode", decoding)]
    if not isinstance(length, int) or length >= CHUNKED_LENGTH:
        chunked = ("prepare", "states", "outputs") if attributes["delta"] else ("states", "outputs")
        both = {"BLOCK": block, "CHANNELS": int(dg > 1)}
        longer = [(name, both) for name in chunked]
        kernels = longer if isinstance(length, int) else kernels + longer
    return [(f"recurrent_linear_attention.{name}", constants) for name, constants in kernels]


# Rows of a chunk in the function body: few enough for a decay per channel and pair of rows.
_CHUNK = 16
_LEVELS = 4  # 2^_LEVELS = _CHUNK


def function_body(opset: int) -> ir.Function:
    """The operator in standard ONNX, computed in fp32: a Scan over chunks, linear in T.

    One body serves all rules and both shapes of decays, because a node's attributes and shapes are
    not known to it: without `delta` the matrix A is zero.

    Args:
        opset: of the standard domain, 18 or later.
    """
    from edgeattn.ops.function import Body

    body = Body(SPEC, opset)
    q, k, v, log_decay, beta, past_state, past_normaliser = body.inputs
    sizes = _sizes(body, q, k, v, log_decay)
    # Read here and not in the Scan, where onnx's own evaluator does not know them.
    normalise = body.op("Cast", body.attribute("normalise"), to=body.BOOL)
    delta, epsilon = body.fp32(body.attribute("delta")), body.attribute("epsilon")
    q_scaled = body.op("Mul", body.fp32(q), body.scale(sizes["Dk"]))
    rows = {
        "q": body.chunked(q_scaled, sizes, "H", "Dk"),
        "k": body.chunked(body.fp32(k), sizes, "Hkv", "Dk"),
        "v": body.chunked(body.fp32(v), sizes, "Hkv", "Dv"),
        "log_decay": body.chunked(log_decay, sizes, "Hkv", "Dg"),
        "beta": body.chunked(body.op("Unsqueeze", beta, body.ints(-1)), sizes, "Hkv", 1),
    }
    rows["q"] = body.reshape(rows["q"], sizes, "N", "B", "Hkv", "G", "C", "Dk")
    (state, normaliser), (y,) = body.scan(
        {"state": past_state, "normaliser": past_normaliser},
        rows,
        lambda step, values: _chunk(
            step, delta=delta, normalise=normalise, epsilon=epsilon, **values
        ),
    )
    y = body.op("Transpose", y, perm=(1, 2, 3, 0, 4, 5))
    y = body.reshape(y, sizes, "B", "H", "NC", "Dv")
    y = body.op("Slice", y, body.ints(0), sizes["T"], body.ints(2))
    normaliser = body.op("Where", normalise, normaliser, past_normaliser)
    return body.function(body.op("CastLike", y, q), state, normaliser)


def _sizes(
    body: Body, q: ir.Value, k: ir.Value, v: ir.Value, log_decay: ir.Value
) -> dict[str, ir.Value]:
    """Every size the body needs, `[1]` each."""
    sizes = {symbol: body.size(q, axis) for axis, symbol in enumerate(("B", "H", "T", "Dk"))}
    sizes |= {"Hkv": body.size(k, 1), "Dv": body.size(v, 3), "Dg": body.size(log_decay, 3)}
    sizes["G"] = body.op("Div", sizes["H"], sizes["Hkv"])
    return {**sizes, **body.chunk_sizes(sizes["T"], _CHUNK)}


def _chunk(
    body: Body,
    *,
    state: ir.Value,
    normaliser: ir.Value,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    log_decay: ir.Value,
    beta: ir.Value,
    delta: ir.Value,
    normalise: ir.Value,
    epsilon: ir.Value,
) -> tuple[list[ir.Value], list[ir.Value]]:
    """One chunk: the carried state and normaliser, and y.

    Args:
        body: of the Scan.
        state: `[B, Hkv, Dk, Dv]`.
        normaliser: `[B, Hkv, Dk]`.
        q: `[B, Hkv, G, C, Dk]`, scaled.
        k: `[B, Hkv, C, Dk]`.
        v: `[B, Hkv, C, Dv]`.
        log_decay: `[B, Hkv, C, Dg]`.
        beta: `[B, Hkv, C, 1]`.
        delta: 0 or 1.
        normalise: a truth value.
        epsilon: of the normaliser.
    """
    rows = body.op("Range", body.scalar(0), body.op("Squeeze", body.size(k, 2)), body.scalar(1))
    i, j = body.op("Unsqueeze", rows, body.ints(1)), body.op("Unsqueeze", rows, body.ints(0))
    # Segment sums and decays between rows, [B, Hkv, C (i), C (j), Dg].
    below = body.op("Unsqueeze", body.op("Greater", i, j), body.ints(-1))
    steps = body.op("Where", below, body.op("Unsqueeze", log_decay, body.ints(3)), body.floats(0.0))
    between = body.op("Exp", body.op("CumSum", steps, body.scalar(2)))
    # Keys as row i sees them: later ones not at all, [B, Hkv, C, C, Dk].
    seen = body.op("Unsqueeze", body.op("GreaterOrEqual", i, j), body.ints(-1))
    weights = body.op("Where", seen, between, body.floats(0.0))
    decayed = body.op("Mul", weights, body.op("Unsqueeze", k, body.ints(2)))
    scores = _times_row(body, body.op("Unsqueeze", decayed, body.ints(2)), q)
    into = body.op("Exp", body.op("CumSum", log_decay, body.scalar(2)))
    products = _times_row(body, decayed, k)
    u = _updates(body, delta, state, k, v, beta, body.op("Mul", k, into), products)
    u_of_group = body.op("Unsqueeze", u, body.ints(2))
    q = body.op("Mul", q, body.op("Unsqueeze", into, body.ints(2)))
    carried = body.op("MatMul", q, body.op("Unsqueeze", state, body.ints(2)))
    y = body.op("Add", carried, body.op("MatMul", scores, u_of_group))
    column = body.op("Unsqueeze", normaliser, body.ints(2, 4))
    total = body.op("ReduceSum", scores, body.ints(-1))
    total = body.op("Add", body.op("MatMul", q, column), total)
    total = body.op("Add", total, epsilon)
    y = body.op("Div", y, body.op("Where", normalise, total, body.floats(1.0)))
    # What is left of each key behind the last row, and of the state.
    last = body.op("Squeeze", body.last(decayed, 2), body.ints(2))
    left = body.op("Transpose", body.last(into, 2), perm=(0, 1, 3, 2))
    added = body.op("MatMul", body.op("Transpose", last, perm=(0, 1, 3, 2)), u)
    state = body.op("Add", body.op("Mul", left, state), added)
    left = body.op("Squeeze", body.last(into, 2), body.ints(2))
    normaliser = body.op("Mul", left, normaliser)
    normaliser = body.op("Add", normaliser, body.op("ReduceSum", last, body.ints(2), keepdims=0))
    return [state, normaliser], [y]


def _times_row(body: Body, keys: ir.Value, row: ir.Value) -> ir.Value:
    """Products of row i with the keys as it sees them: `[..., C, C, Dk]`, `[..., C, Dk]`."""
    column = body.op("Unsqueeze", row, body.ints(-1))
    return body.op("Squeeze", body.op("MatMul", keys, column), body.ints(-1))


def _updates(
    body: Body,
    delta: ir.Value,
    state: ir.Value,
    k: ir.Value,
    v: ir.Value,
    beta: ir.Value,
    k_into: ir.Value,
    products: ir.Value,
) -> ir.Value:
    """U of the module's formula, `[B, Hkv, C, Dv]`.

    I + A is inverted by blocks: X, the inverse of its diagonal blocks of 2^level rows, becomes that
    of blocks twice as large by X − X (A within the latter, outside the former) X.
    """
    rate = body.op("Mul", delta, beta)
    keep = body.op("Add", body.op("Sub", body.floats(1.0), delta), rate)  # 1, or beta with delta
    a = body.op("Mul", products, rate)
    rows = body.op("Range", body.scalar(0), body.op("Squeeze", body.size(k, 2)), body.scalar(1))
    x = body.op("Cast", _same_block(body, rows, 1), to=body.FLOAT)
    for level in range(_LEVELS):
        inside = body.op("Not", _same_block(body, rows, 2**level))
        mask = body.op("And", _same_block(body, rows, 2 ** (level + 1)), inside)
        i, j = body.op("Unsqueeze", rows, body.ints(1)), body.op("Unsqueeze", rows, body.ints(0))
        mask = body.op("And", mask, body.op("Greater", i, j))
        block = body.op("Where", mask, a, body.floats(0.0))
        x = body.op("Sub", x, body.op("MatMul", body.op("MatMul", x, block), x))
    known = body.op("Mul", rate, body.op("MatMul", k_into, state))
    return body.op("MatMul", x, body.op("Sub", body.op("Mul", keep, v), known))


def _same_block(body: Body, rows: ir.Value, size: int) -> ir.Value:
    """`[C, C]`, whether two rows lie in one block of `size`."""
    block = body.op("Div", rows, body.scalar(size))
    columns = body.op("Unsqueeze", block, body.ints(0))
    return body.op("Equal", body.op("Unsqueeze", block, body.ints(1)), columns)


def _case(
    name: str,
    b: int = 1,
    h: int = 2,
    kv: int = 2,
    t: int = 7,
    dk: int = 16,
    dv: int = 16,
    *,
    channels: bool = False,
    dtype: str = "fp32",
    **attributes: float,
) -> Case:
    dims = {"B": b, "H": h, "Hkv": kv, "T": t, "Dk": dk, "Dv": dv, "Dg": dk if channels else 1}
    values = {}
    if attributes.get("delta"):  # longer keys make the state grow without bound
        values = {"k": "unit-norm"}
    if attributes.get("normalise"):  # as feature maps give them; the sum may be 0 otherwise
        values = dict.fromkeys(("q", "k", "past_normaliser"), "non-negative")
    return Case(name, dims, dtype, attributes, values)


SPEC = OpSpec(
    name="RecurrentLinearAttention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    attributes=_ATTRIBUTES,
    triton="edgeattn.kernels.recurrent_linear_attention:recurrent_linear_attention",
    plugin=True,
    variants=variants,
    cases=(
        _case("decode", t=1, dk=64, dv=64, dtype="fp16"),
        _case("decode-delta", t=1, dk=128, dv=128, delta=1, dtype="fp16"),
        _case("decode-normalised", b=3, t=1, dk=40, dv=40, normalise=1),
        _case("one-chunk", t=16),
        _case("odd-length", b=3, t=67, h=4, kv=2, dk=64, dv=64),
        _case("odd-length-delta", b=3, t=67, h=4, kv=1, dk=64, dv=64, delta=1),
        _case("small-heads", t=33, dk=8, dv=8, normalise=1),
        _case("unequal-widths", t=35, dk=40, dv=24, delta=1, dtype="fp16"),
        _case("wide-heads", t=70, h=1, kv=1, dk=128, dv=128, dtype="fp16"),
        _case("channels", t=37, h=4, kv=2, dk=32, dv=32, channels=True),
        _case("channels-delta", t=130, dk=64, dv=64, channels=True, delta=1),
        _case("channels-normalised", t=21, dk=16, dv=8, channels=True, normalise=1, dtype="fp16"),
        _case("brain-float", t=19, dk=32, dv=32, delta=1, dtype="bf16"),
        _case("scaled", t=20, scale=0.7),
    ),
    tolerance=STANDARD_TOLERANCE,
)
