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

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeattn.attention import HIGHEST_DEGREE
from edgeattn.ops.fft_rope_kernels import variants
from edgeattn.ops.fft_rope_masks import bias_of, masks_of
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

EXACT, FACTORISED, TOEPLITZ_FFT = 0, 1, 2
# P must be positive beyond the bound by this factor, for what L is rounded by.
_MARGIN = 1.01
# Below every finite exponent, for rows that no key has a weight for.
LOWEST = -3.4e38

_FP32, _INT32 = ("fp32",), ("int32",)
_refused = functools.partial(refused, "FftRopeAttention")
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
    peak = exponent.amax(-1, keepdim=True).clamp(min=LOWEST)
    weights = torch.where(approximated, horner(coefficients[:, None, None], x), 1.0)
    weights = weights * (exponent - peak).exp()
    total = weights.sum(-1, keepdim=True)
    y = weights @ values / torch.where(total > 0, total, 1.0)
    fallbacks = (polynomial & ~within & masks.is_row).sum((0, 2, 3), dtype=torch.int32)
    return torch.where(masks.is_row, y, 0.0).to(q.dtype), fallbacks


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
    """The operator in standard ONNX (`fft_rope_body`).

    Args:
        opset: of the standard domain, 18 or later.
    """
    from edgeattn.ops.fft_rope_body import build_body
    from edgeattn.ops.function import Body

    return build_body(Body(SPEC, opset))


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


_WHOLE, _POLYNOMIAL, _BY_FFT = {"kv_len": "S..S"}, {"backend": "1..2"}, {"backend": "2..2"}
SPEC = OpSpec(
    name="FftRopeAttention",
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    infer_shapes=infer_shapes,
    reference=reference,
    function_body=function_body,
    attributes=_ATTRIBUTES,
    triton="edgeattn.kernels.fft_rope_attention:fft_rope_attention",
    plugin=True,
    variants=variants,
    cases=(
        _case(*("hybrid", 2, 6, 2, 67, 67, 64), sink=4, window=16, scale=0.08, dtype="fp16"),
        _case("decode", b=3, h=4, kv=2, t=1, s=37, d=64, sink=4, window=8, dtype="fp16"),
        _case("later-rows", b=3, h=4, kv=1, t=5, s=40, values=_POLYNOMIAL, scale=0.12),
        _case("linear", b=2, t=33, s=33, degree=1, scale=0.04, values=_POLYNOMIAL),
        _case("quartic", b=2, t=20, s=20, d=8, degree=4, values={**_WHOLE, **_POLYNOMIAL}),
        _case("constant", t=9, s=9, degree=0, window=3, scale=0.1, values=_WHOLE),
        _case("cubic", t=21, s=21, d=8, degree=3, scale=0.06, values=_WHOLE, dtype="fp16"),
        _case("bias", h=4, kv=2, t=19, s=30, biases=4, window=2, scale=0.1, values=_POLYNOMIAL),
        _case(
            *("fft", 1, 2, 1, 66, 68, 8), biases=2, degree=1, window=2, scale=0.04, values=_BY_FFT
        ),
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
