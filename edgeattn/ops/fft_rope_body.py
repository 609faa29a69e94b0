"""The function body of `FftRopeAttention`, on the score matrix: for parity, not speed.

Coefficients are filled up to those of `HIGHEST_DEGREE` with zeros, because the degree of a node is
not known to it; so one body serves all. kv_len is taken as at most S.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edgeattn.attention import HIGHEST_DEGREE
from edgeattn.ops.fft_rope_attention import LOWEST
from edgeattn.ops.function import Body


def build_body(body: Body) -> ir.Function:
    """The operator in standard ONNX, computed in fp32.

    Args:
        body: empty, of the operator.
    """
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
    lowest = body.floats(LOWEST)
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
