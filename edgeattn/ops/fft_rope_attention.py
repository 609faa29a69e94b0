"""`FftRopeAttention`: attention whose far keys are weighed by a polynomial instead of exp.

Per batch row b and head h, for row i of q at position p_i = i + max(kv_len − Tq, 0) and keys
j < kv_len, after RoPE on both (`causal`: j ≤ p_i); q has its own row for each head, k and v theirs
for a group of heads:

    s_ij = scale q_i·k_j
    near: j < sink or |p_i − j| < window;  far: the other keys that the row sees
    c_i  = mean of s_ij over far (`row_centre`), else scale q_i·key_mean_h
    P_h(x) = Σ_r coefficients_hr x^r,  T_h(δ) = exp log_bias_h(δ)
    w_ij = T_h(p_i − j) exp s_ij                    (near, and all keys of exact rows)
    w_ij = T_h(p_i − j) exp c_i P_h(s_ij − c_i)     (far)
    y_i  = Σ_j w_ij v_j / Σ_j w_ij

`backend` says how a head is computed: 0 exactly, 1 by features and 2 by FFT, which are the same
numbers (`edgeattn.ops.polynomial_sums`). The polynomial in place of exp and the FFT are those of
arXiv 2505.11892; near keys, centres and coefficients that are fitted are edgeattn's own, because a
polynomial of all scores around 0 keeps hardly any head of a trained model.

log_bias is `[1 or H, N]`, N odd, with offset δ in column (N − 1)/2 + δ: a table of relative biases,
a slope, a decay, −∞ for what a mask hides. N is 1, one number for all offsets (0 for none), or at
least 2 S − 1.

A row of a head with backend 1 or 2 is exact all the same, and counted in fallback_count, where
|x_ij| may exceed score_bound, up to which P is known to be positive. With μ = key_mean_h, f over
far, and reach = scale (or 2 scale with `row_centre`, since |k_j − mean| ≤ 2 max_f |k_f − μ|) this
is Cauchy-Schwarz, squared, all in fp32:

    not ((L(q_i) max_f L(k_f − μ)) (reach reach) ≤ score_bound_h score_bound_h)
    L(x) = Σ_d ((x_d x_d + M) − M),  M = 2 D max_d x_d x_d

L is |x|² rounded so that every order of summation gives the same bits (no product and sum may be
fused): implementations agree on the decision. What is lost is less than `_MARGIN` up to D = 256.

Rows from kv_len on are padding and not counted. Their y is 0, as is that of rows for which no key
has a weight. What stands in keys from kv_len on is not looked at; keys that log_bias hides are
among those of the mean and of the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.spec import (
    STANDARD_TOLERANCE,
    AttributeSpec,
    Case,
    OpSpec,
    Shape,
    TensorSpec,
    bind,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from edgeattn.ops.function import Body

EXACT, FACTORISED, TOEPLITZ_FFT = 0, 1, 2
HIGHEST_DEGREE = 4
# P must be positive beyond the bound by this factor, for what L is rounded by.
_MARGIN = 1.01
# Below every finite exponent, for rows that no key has a weight for.
_LOWEST = -3.4e38

_FP32, _INT32 = ("fp32",), ("int32",)
_INPUTS = (
    TensorSpec("q", ("B", "H", "Tq", "D")),
    TensorSpec("k", ("B", "Hkv", "S", "D")),
    TensorSpec("v", ("B", "Hkv", "S", "D")),
    TensorSpec("coefficients", ("H", "C"), _FP32, "S", values="series"),
    TensorSpec("key_mean", ("H", "D"), _FP32, "S"),
    TensorSpec("log_bias", ("Hb", "N"), _FP32, "S"),
    TensorSpec("score_bound", ("H",), _FP32, "S", values="positive"),
    TensorSpec("backend", ("H",), _INT32, "I", values="0..2"),
    TensorSpec("kv_len", ("B",), _INT32, "I", values="1..S"),
)
_OUTPUTS = (
    TensorSpec("y", ("B", "H", "Tq", "D")),
    TensorSpec("fallback_count", ("H",), _INT32, "I"),
)
_ATTRIBUTES = (
    AttributeSpec("degree", "int", 2),
    AttributeSpec("sink", "int", 0),  # first keys that are exact
    AttributeSpec("window", "int", 0),  # offsets below which keys are exact; 1 is a row's own
    AttributeSpec("causal", "int", 1),
    AttributeSpec("row_centre", "int", 1),  # 0 for that of key_mean
    AttributeSpec("scale", "float", 0.0),  # 0 for 1 / sqrt(D)
)


def infer_shapes(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Shapes of y and fallback_count.

    Raises:
        RuntimeInputError: shapes do not fit each other, or the attributes do not.
    """
    _check_attributes(attributes)
    dims = bind(_INPUTS, inputs)
    sizes = {symbol: size for symbol, size in dims.items() if isinstance(size, int)}
    h, kv, d = sizes.get("H"), sizes.get("Hkv"), sizes.get("D")
    if h is not None and kv is not None and (kv < 1 or h % kv):
        raise _refused("query heads in groups of one size per key head", f"{h} for {kv}")
    if d is not None and (d < 2 or d % 2):
        raise _refused("an even head_dim, as RoPE rotates pairs", f"{d}")
    count = attributes["degree"] + 1
    if sizes.get("C", count) != count:
        raise _refused(f"{count} coefficients per head for degree {count - 1}", f"{sizes['C']}")
    biases, offsets, keys = sizes.get("Hb", 1), sizes.get("N", 1), sizes.get("S", 1)
    if biases not in (1, sizes.get("H", biases)):
        raise _refused(f"one log_bias for all heads or one for each of {h}", f"{biases}")
    if offsets % 2 == 0 or 1 != offsets < 2 * keys - 1:
        expected = f"log_bias at 1 offset or an odd number of them from {2 * keys - 1} on"
        raise _refused(f"{expected}, for {keys} keys", f"{offsets}")
    return tuple(inputs[0]), (dims["H"],)


def _check_attributes(attributes: Mapping[str, Any]) -> None:
    if not 0 <= attributes["degree"] <= HIGHEST_DEGREE:
        raise _refused(f"a degree from 0 to {HIGHEST_DEGREE}", f"{attributes['degree']}")
    for name in ("sink", "window"):
        if attributes[name] < 0:
            raise _refused(f"{name} of at least 0", f"{attributes[name]}")
    for name in ("causal", "row_centre"):
        if attributes[name] not in (0, 1):
            raise _refused(f"{name} of 0 or 1", f"{attributes[name]}")
    if not 0 <= attributes["scale"] < math.inf:
        raise _refused("a finite scale of at least 0", f"{attributes['scale']}")


def _refused(expected: str, came: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=expected, came=f"{came} came", todo="see FftRopeAttention in edgeattn.ops"
    )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Tensor,
    key_mean: Tensor,
    log_bias: Tensor,
    score_bound: Tensor,
    backend: Tensor,
    kv_len: Tensor,
    *,
    degree: int = 2,
    sink: int = 0,
    window: int = 0,
    causal: int = 1,
    row_centre: int = 1,
    scale: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition in fp32, on the score matrix.

    Args:
        q: `[B, H, Tq, D]`, after RoPE.
        k: `[B, Hkv, S, D]`, after RoPE.
        v: `[B, Hkv, S, D]`.
        coefficients: of P, from the constant on, `[H, degree + 1]`.
        key_mean: μ, `[H, D]`; zeros for none.
        log_bias: `[1 or H, N]` as the module says; `[[0]]` for none.
        score_bound: `[H]`, how far from the centre P is positive.
        backend: `[H]`, `EXACT`, `FACTORISED` or `TOEPLITZ_FFT`.
        kv_len: `[B]`, keys of each sequence, from 1 to S.
        degree: of P.
        sink: first keys that are exact.
        window: keys at smaller offsets are exact; 0 for none.
        causal: 1 where a row sees no later keys.
        row_centre: 1 for the row's own centre, 0 for that of key_mean.
        scale: of the scores, 0 for 1 / sqrt(D).

    Returns:
        y `[B, H, Tq, D]` in the dtype of q, and fallback_count `[H]`, int32.

    Raises:
        RuntimeInputError: numbers are none that the operator has a meaning for; kernels and plugins
            do not look, but never read outside a tensor and take kv_len as at most S.
    """
    import torch

    from edgeattn.ops.polynomial_sums import horner

    _check_numbers(coefficients, log_bias, score_bound, backend, kv_len, k.shape[2])
    masks = masks_of(kv_len, q.shape[2], k.shape[2], sink=sink, window=window, causal=causal)
    group = q.shape[1] // k.shape[1]
    # [B, H, S, D]
    keys, values = (
        torch.where(masks.is_key, x.float(), 0.0).repeat_interleave(group, 1) for x in (k, v)
    )
    queries, factor = q.float(), _scale(scale, q)
    x = queries @ keys.mT * factor  # [B, H, Tq, S]
    if row_centre:
        total, count = (
            sums.sum(-1, keepdim=True) for sums in (torch.where(masks.far, x, 0.0), masks.far)
        )
        x = x - total / count.clamp(min=1)
    else:
        x = x - factor * (queries * key_mean.unsqueeze(1)).sum(-1, keepdim=True)
    shifted, reach = keys - key_mean.unsqueeze(1), factor * (1 + row_centre)
    within = _is_within(queries, shifted, masks.far, reach, score_bound)
    polynomial = (backend != EXACT).reshape(-1, 1, 1)
    approximated = polynomial & within & masks.far
    exponent = torch.where(approximated, 0.0, x) + bias_of(log_bias, masks.offset)
    exponent = torch.where(masks.seen, exponent, -math.inf)
    peak = exponent.amax(-1, keepdim=True).clamp(min=_LOWEST)
    weights = torch.where(approximated, horner(coefficients[:, None, None], x), 1.0)
    weights = weights * (exponent - peak).exp()
    total = weights.sum(-1, keepdim=True)
    y = weights @ values / torch.where(total > 0, total, 1.0)
    fallbacks = (polynomial & ~within & masks.is_row).sum((0, 2, 3), dtype=torch.int32)
    return torch.where(masks.is_row, y, 0.0).to(q.dtype), fallbacks


class Masks(NamedTuple):
    """What stands where.

    Attributes:
        offset: p_i − j, `[B, Tq, S]`.
        seen: whether a row sees a key, `[B, 1, Tq, S]`.
        far: seen, neither one of the first keys nor in the window, likewise.
        is_row: `[B, 1, Tq, 1]`, not of padding.
        is_key: `[B, 1, S, 1]`, likewise.
    """

    offset: Tensor
    seen: Tensor
    far: Tensor
    is_row: Tensor
    is_key: Tensor


def masks_of(
    kv_len: Tensor, rows: int, capacity: int, *, sink: int, window: int, causal: int
) -> Masks:
    """The masks of sequences of kv_len keys, `[B]`, in tensors of `rows` queries and S keys."""
    import torch

    lengths = kv_len.long().reshape(-1, 1, 1)
    position = torch.arange(rows, device=kv_len.device).unsqueeze(-1)
    position = position + (lengths - rows).clamp(min=0)  # [B, Tq, 1]
    key = torch.arange(capacity, device=kv_len.device)
    offset, is_key = position - key, key < lengths
    seen = is_key & (offset >= 0) if causal else is_key.expand_as(offset)
    near = (key < sink) | (offset.abs() < window)
    per_head = (seen, seen & ~near, position < lengths, is_key.mT)
    return Masks(offset, *(mask.unsqueeze(1) for mask in per_head))


def bias_of(log_bias: Tensor, offset: Tensor) -> Tensor:
    """Log T(offset), `[B, 1 or H, Tq, S]`, of the table `[1 or H, N]`."""
    middle = log_bias.shape[-1] // 2
    return log_bias[:, (offset + middle).clamp(0, 2 * middle)].transpose(0, 1)


def _check_numbers(
    coefficients: Tensor,
    log_bias: Tensor,
    score_bound: Tensor,
    backend: Tensor,
    kv_len: Tensor,
    capacity: int,
) -> None:
    lengths, backends = kv_len.tolist(), backend.tolist()
    for length in lengths:
        if not 1 <= length <= capacity:
            raise _refused(f"kv_len from 1 to {capacity}", f"{length}")
    for found in backends:
        if found not in (EXACT, FACTORISED, TOEPLITZ_FFT):
            raise _refused("backend of 0, 1 or 2", f"{found}")
    if not bool((log_bias < math.inf).all()):
        raise _refused("log_bias below infinity", f"{float(log_bias.max())}")
    heads = zip(coefficients.tolist(), score_bound.tolist(), backends, strict=True)
    for head, (series, bound, found) in enumerate(heads):
        if found == EXACT:
            continue
        if not 0 <= bound < math.inf:
            raise _refused(f"a finite score_bound of at least 0 for head {head}", f"{bound}")
        if not (least := least_value(series, _MARGIN * bound)) > 0:
            expected = (
                f"coefficients of head {head} that are positive up to {_MARGIN:g} x {bound:g}"
            )
            raise _refused(expected, f"a polynomial that falls to {least:g}")


def least_value(coefficients: Sequence[float], bound: float) -> float:
    """The least value of a polynomial between −bound and bound; NaN of numbers that are none.

    Args:
        coefficients: from the constant on.
        bound: at least 0.
    """
    import numpy as np

    series = np.array(coefficients, dtype=np.float64)
    if not np.isfinite(series).all():
        return math.nan
    slope = np.polynomial.Polynomial(series).deriv()
    # Where the slope's roots are complex, their real parts are points like any others.
    turns = np.real(slope.trim().roots())
    points = np.array([-bound, bound, 0.0, *turns]).clip(-bound, bound)
    return float(np.polynomial.Polynomial(series)(points).min())


def _scale(scale: float, q: Tensor) -> Tensor:
    """Of the scores in fp32, rounded as the function body does."""
    import torch

    if scale:
        return torch.tensor(scale, dtype=torch.float32, device=q.device)
    width = torch.tensor(q.shape[-1], dtype=torch.float32, device=q.device)
    return width.sqrt().reciprocal()


def _is_within(
    queries: Tensor, shifted: Tensor, far: Tensor, reach: Tensor, score_bound: Tensor
) -> Tensor:
    """Which rows' scores are known to lie within the bound, `[B, H, Tq, 1]`.

    Args:
        queries: `[B, H, Tq, D]`.
        shifted: k − μ, `[B, H, S, D]`.
        far: `[B, 1, Tq, S]`.
        reach: scale or 2 scale, a number.
        score_bound: `[H]`.
    """
    import torch

    longest = torch.where(far, squared_length(shifted).mT, 0.0).amax(-1, keepdim=True)
    bound = score_bound.reshape(-1, 1, 1)
    within: Tensor = (squared_length(queries) * longest) * (reach * reach) <= bound * bound
    return within


def squared_length(x: Tensor) -> Tensor:
    """L(x) of the module's formula, `[..., 1]`."""
    squares = x * x
    rounder = squares.amax(-1, keepdim=True) * (2 * x.shape[-1])
    return ((squares + rounder) - rounder).sum(-1, keepdim=True)


def function_body(opset: int) -> ir.Function:
    """The operator in standard ONNX, computed in fp32 on the score matrix: for parity, not speed.

    Coefficients are filled up to those of `HIGHEST_DEGREE` with zeros, because the degree of a node
    is not known to it; so one body serves all. kv_len is taken as at most S.

    Args:
        opset: of the standard domain, 18 or later.
    """
    from edgeattn.ops.function import Body

    body = Body(SPEC, opset)
    q, k, v, coefficients, key_mean, log_bias, score_bound, backend, kv_len = body.inputs
    sizes = {symbol: body.size(q, axis) for axis, symbol in enumerate(("B", "H", "T", "D"))}
    sizes |= {"Hkv": body.size(k, 1), "S": body.size(k, 2)}
    sizes["G"] = body.op("Div", sizes["H"], sizes["Hkv"])
    masks = _masks(body, sizes, kv_len)
    zero, one = body.floats(0.0), body.floats(1.0)
    keys, values = (
        body.op("Unsqueeze", body.op("Where", masks["is_key"], body.fp32(x), zero), body.ints(2))
        for x in (k, v)
    )
    factor, q = body.scale(sizes["D"]), body.fp32(q)
    grouped = body.reshape(q, sizes, "B", "Hkv", "G", "T", "D")
    scores = body.op("MatMul", grouped, body.op("Transpose", keys, perm=(0, 1, 2, 4, 3)))
    scores = body.op("Mul", body.reshape(scores, sizes, "B", "H", "T", "S"), factor)
    row_centre = body.op("Cast", body.attribute("row_centre"), to=body.BOOL)
    x = body.op("Sub", scores, _centre(body, scores, q, key_mean, masks["far"], row_centre, factor))
    reach = body.op("Mul", factor, body.op("Where", row_centre, body.floats(2.0), one))
    within = _within(body, sizes, q, keys, key_mean, masks["far"], reach, score_bound)
    polynomial = body.op("Unsqueeze", body.op("Cast", backend, to=body.BOOL), body.ints(1, 2))
    approximated = body.op("And", body.op("And", polynomial, within), masks["far"])
    exponent = body.op("Where", approximated, zero, x)
    exponent = body.op("Add", exponent, _bias(body, log_bias, masks["offset"]))
    weights = body.op("Where", approximated, _polynomial(body, sizes, coefficients, x), one)
    weights = body.op("Mul", weights, _exponential(body, exponent, masks["seen"]))
    y = _weighted_mean(body, sizes, weights, values, masks["is_row"])
    outside = body.op("And", body.op("And", polynomial, body.op("Not", within)), masks["is_row"])
    counts = body.op("Cast", outside, to=body.INT32)
    counts = body.op("ReduceSum", counts, body.ints(0, 2, 3), keepdims=0)
    return body.function(body.op("CastLike", y, body.inputs[0]), counts)


def _masks(body: Body, sizes: Mapping[str, ir.Value], kv_len: ir.Value) -> dict[str, ir.Value]:
    """What stands where: seen, far `[B, 1, T, S]`, is_row and is_key, offset `[B, T, S]`."""
    lengths = body.op("Cast", kv_len, to=body.INT64)
    lengths = body.op("Unsqueeze", body.op("Min", lengths, sizes["S"]), body.ints(1, 2))
    first = body.op("Max", body.op("Sub", lengths, sizes["T"]), body.ints(0))
    position = body.op("Add", body.op("Unsqueeze", _range(body, sizes["T"]), body.ints(1)), first)
    key = _range(body, sizes["S"])
    offset = body.op("Sub", position, key)
    is_key = body.op("Less", key, lengths)  # [B, 1, S]
    causal = body.op("Cast", body.attribute("causal"), to=body.BOOL)
    earlier = body.op("GreaterOrEqual", offset, body.ints(0))
    seen = body.op("And", is_key, body.op("Or", earlier, body.op("Not", causal)))
    window = body.attribute("window")
    beside = body.op("Less", body.op("Sub", key, position), window)
    beside = body.op("And", beside, body.op("Less", offset, window))
    near = body.op("Or", beside, body.op("Less", key, body.attribute("sink")))
    masks = {
        "seen": seen,
        "far": body.op("And", seen, body.op("Not", near)),
        "is_row": body.op("Less", position, lengths),
        "is_key": body.op("Transpose", is_key, perm=(0, 2, 1)),
    }
    masks = {name: body.op("Unsqueeze", mask, body.ints(1)) for name, mask in masks.items()}
    return {**masks, "offset": offset}


def _range(body: Body, size: ir.Value) -> ir.Value:
    """0, 1, … below a size `[1]`."""
    return body.op("Range", body.scalar(0), body.op("Squeeze", size), body.scalar(1))


def _centre(
    body: Body,
    scores: ir.Value,
    q: ir.Value,
    key_mean: ir.Value,
    far: ir.Value,
    row_centre: ir.Value,
    factor: ir.Value,
) -> ir.Value:
    """The centre of every row, `[B, H, T, 1]`."""
    total = body.op("ReduceSum", body.op("Where", far, scores, body.floats(0.0)), body.ints(-1))
    count = body.op("ReduceSum", body.fp32(far), body.ints(-1))
    own = body.op("Div", total, body.op("Max", count, body.floats(1.0)))
    products = body.op("Mul", q, body.op("Unsqueeze", key_mean, body.ints(1)))
    given = body.op("Mul", body.op("ReduceSum", products, body.ints(-1)), factor)
    return body.op("Where", row_centre, own, given)


def _within(
    body: Body,
    sizes: Mapping[str, ir.Value],
    q: ir.Value,
    keys: ir.Value,
    key_mean: ir.Value,
    far: ir.Value,
    reach: ir.Value,
    score_bound: ir.Value,
) -> ir.Value:
    """Which rows' scores are known to lie within the bound, `[B, H, T, 1]`."""
    mean = body.op("Unsqueeze", body.reshape(key_mean, sizes, "Hkv", "G", "D"), body.ints(2))
    shifted = _squared_length(body, body.op("Sub", keys, mean), sizes["D"])
    shifted = body.reshape(shifted, sizes, "B", "H", 1, "S")
    longest = body.op("Where", far, shifted, body.floats(0.0))
    longest = body.op("ReduceMax", longest, body.ints(-1))
    left = body.op("Mul", _squared_length(body, q, sizes["D"]), longest)
    left = body.op("Mul", left, body.op("Mul", reach, reach))
    right = body.op("Unsqueeze", body.op("Mul", score_bound, score_bound), body.ints(1, 2))
    return body.op("LessOrEqual", left, right)


def _squared_length(body: Body, x: ir.Value, width: ir.Value) -> ir.Value:
    """L of the module's formula, `[..., 1]`."""
    squares = body.op("Mul", x, x)
    twice = body.fp32(body.op("Mul", width, body.ints(2)))
    rounder = body.op("Mul", body.op("ReduceMax", squares, body.ints(-1)), twice)
    rounded = body.op("Sub", body.op("Add", squares, rounder), rounder)
    return body.op("ReduceSum", rounded, body.ints(-1))


def _bias(body: Body, log_bias: ir.Value, offset: ir.Value) -> ir.Value:
    """Log T(δ), `[B, 1 or H, T, S]`; never read outside the table."""
    count = body.size(log_bias, 1)
    index = body.op("Add", offset, body.op("Div", count, body.ints(2)))
    last = body.op("Sub", count, body.ints(1))
    index = body.op("Min", body.op("Max", index, body.ints(0)), last)
    return body.op("Transpose", body.op("Gather", log_bias, index, axis=1), perm=(1, 0, 2, 3))


def _polynomial(
    body: Body, sizes: Mapping[str, ir.Value], coefficients: ir.Value, x: ir.Value
) -> ir.Value:
    """P(x) by Horner's rule, `[B, H, T, S]`."""
    zeros = body.op("ConstantOfShape", body.dims(sizes, "H", HIGHEST_DEGREE))
    filled = body.op("Concat", coefficients, zeros, axis=1)

    def column(r: int) -> ir.Value:
        one = body.op("Slice", filled, body.ints(r), body.ints(r + 1), body.ints(1))
        return body.op("Unsqueeze", one, body.ints(1))

    value = column(HIGHEST_DEGREE)
    for r in reversed(range(HIGHEST_DEGREE)):
        value = body.op("Add", body.op("Mul", value, x), column(r))
    return value


def _exponential(body: Body, exponent: ir.Value, seen: ir.Value) -> ir.Value:
    """Exp of what is seen, divided by the row's largest; else 0."""
    lowest = body.floats(_LOWEST)
    peak = body.op("ReduceMax", body.op("Where", seen, exponent, lowest), body.ints(-1))
    shifted = body.op("Sub", exponent, body.op("Max", peak, lowest))
    return body.op("Where", seen, body.op("Exp", shifted), body.floats(0.0))


def _weighted_mean(
    body: Body,
    sizes: Mapping[str, ir.Value],
    weights: ir.Value,
    values: ir.Value,
    is_row: ir.Value,
) -> ir.Value:
    """Y, `[B, H, T, D]`, of weights `[B, H, T, S]` and values `[B, Hkv, 1, S, D]`."""
    grouped = body.reshape(weights, sizes, "B", "Hkv", "G", "T", "S")
    y = body.reshape(body.op("MatMul", grouped, values), sizes, "B", "H", "T", "D")
    total, zero = body.op("ReduceSum", weights, body.ints(-1)), body.floats(0.0)
    some = body.op("Greater", total, zero)
    y = body.op("Div", y, body.op("Where", some, total, body.floats(1.0)))
    return body.op("Where", is_row, y, zero)


def _case(
    name: str,
    b: int = 1,
    h: int = 3,
    kv: int = 3,
    t: int = 7,
    s: int = 7,
    d: int = 16,
    *,
    biases: int = 0,
    dtype: str = "fp32",
    values: Mapping[str, str] | None = None,
    **attributes: float,
) -> Case:
    dims = {"B": b, "H": h, "Hkv": kv, "Tq": t, "S": s, "D": d}
    dims |= {"Hb": biases or 1, "N": 2 * s - 1 if biases else 1}
    dims["C"] = int(attributes.get("degree", 2)) + 1
    # Few rows fall back: queries of length 1, and the keys' own mean near 0.
    usual = {"q": "unit-norm", "key_mean": "zero", "log_bias": "any" if biases else "zero"}
    if attributes.get("degree", 2) % 2:  # which are negative further from the centre
        usual["score_bound"] = "unit"
    return Case(name, dims, dtype, attributes, {**usual, **(values or {})})


_WHOLE, _POLYNOMIAL = {"kv_len": "S..S"}, {"backend": "1..2"}
SPEC = OpSpec(
    name="FftRopeAttention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    attributes=_ATTRIBUTES,
    cases=(
        _case(*("hybrid", 2, 6, 2, 67, 67, 64), sink=4, window=16, scale=0.08, dtype="fp16"),
        _case("decode", b=3, h=4, kv=2, t=1, s=37, d=64, sink=4, window=8, dtype="fp16"),
        _case("later-rows", b=3, h=4, kv=1, t=5, s=40, values=_POLYNOMIAL, scale=0.12),
        _case("linear", b=2, t=33, s=33, degree=1, scale=0.04, values=_POLYNOMIAL),
        _case("quartic", b=2, t=20, s=20, d=8, degree=4, values={**_WHOLE, **_POLYNOMIAL}),
        _case("constant", t=9, s=9, degree=0, window=3, scale=0.1, values=_WHOLE),
        _case("cubic", t=21, s=21, d=8, degree=3, scale=0.06, values=_WHOLE, dtype="fp16"),
        _case("bias", h=4, kv=2, t=19, s=30, biases=4, window=2, scale=0.1, values=_POLYNOMIAL),
        _case("one-bias", t=12, s=12, biases=1, causal=0, scale=0.1, values=_WHOLE, dtype="fp16"),
        _case("encoder", b=3, t=30, s=30, d=32, causal=0, sink=1, window=4),
        _case(
            "key-mean", t=25, s=25, row_centre=0, scale=0.15, values={**_WHOLE, "key_mean": "any"}
        ),
        _case("all-exact", b=2, t=16, s=16, values={"backend": "0..0", "q": "any"}),
        _case("all-fall-back", t=16, s=16, values={**_WHOLE, **_POLYNOMIAL, "q": "positive"}),
        _case("more-rows-than-keys", b=2, t=9, s=4, causal=0, values=_POLYNOMIAL),
        _case(
            "brain-float", t=18, s=18, d=32, sink=2, values={**_WHOLE, **_POLYNOMIAL}, dtype="bf16"
        ),
    ),
    tolerance=STANDARD_TOLERANCE,
)
