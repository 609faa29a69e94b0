"""FftRopeAttention against a double loop in fp64, and against what is known to be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from op_cases import case_id, case_inputs, op_model, relative_error, run_onnx
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.fft_rope_attention import SPEC, least_value, reference, squared_length
from edgeattn.ops.polynomial_sums import (
    direct,
    factorised,
    plain_symbols,
    row_coefficients,
    toeplitz_fft,
    toeplitz_matrix,
    toeplitz_product,
)
from edgeattn.ops.spec import Case

DEGREES = (1, 2, 3, 4)
LENGTHS = (1, 2, 7, 16, 65)


def looped(inputs: list[Tensor], attributes: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The module's formulas, key by key in fp64; the bound not squared."""
    a = SPEC.complete_attributes(attributes)
    q, k, v, series, mean, log_bias, bound, backend, kv_len = (x.double().numpy() for x in inputs)
    batch, heads, rows, width = q.shape
    scale = a["scale"] or 1 / math.sqrt(width)
    y, counts = np.zeros(q.shape), np.zeros(heads)
    for b, h in np.ndindex(batch, heads):
        group, length = h // (heads // k.shape[1]), int(kv_len[b])
        table = log_bias[h if len(log_bias) > 1 else 0]
        for i in range(rows):
            p = i + max(length - rows, 0)
            if p >= length:
                continue
            seen = range(min(p + 1, length) if a["causal"] else length)
            far = [j for j in seen if j >= a["sink"] and abs(p - j) >= a["window"]]
            scores = {j: scale * float(q[b, h, i] @ k[b, group, j]) for j in seen}
            centre = scale * float(q[b, h, i] @ mean[h])
            if a["row_centre"]:
                centre = sum(scores[j] for j in far) / max(len(far), 1)
            longest = max((np.linalg.norm(k[b, group, j] - mean[h]) for j in far), default=0.0)
            reach = scale * (1 + a["row_centre"]) * np.linalg.norm(q[b, h, i]) * longest
            exact = backend[h] == 0 or reach > bound[h]
            counts[h] += backend[h] != 0 and reach > bound[h]
            total, row = 0.0, np.zeros(width)
            for j in seen:
                x = scores[j] - centre
                weight = math.exp(table[len(table) // 2 + p - j] if len(table) > 1 else table[0])
                weight *= (
                    sum(c * x**r for r, c in enumerate(series[h]))
                    if j in far and not exact
                    else math.exp(x)
                )
                total, row = total + weight, row + weight * v[b, group, j]
            y[b, h, i] = row / total if total > 0 else 0
    return torch.from_numpy(y), torch.from_numpy(counts)


def body(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return run_onnx(op_model(SPEC, case, 21, dynamic=("B", "Tq", "S")), inputs)


def made(
    rows: int = 7,
    keys: int | None = None,
    *,
    batch: int = 1,
    width: int = 8,
    biased: bool = False,
    values: Mapping[str, str] | None = None,
    **attributes: float,
) -> tuple[Case, list[Tensor]]:
    """Four heads over two of keys, in bounds, with whole caches, none of them exact."""
    keys = keys or rows
    dims = {"B": batch, "H": 4, "Hkv": 2, "Tq": rows, "S": keys, "D": width}
    dims |= {"Hb": 4 if biased else 1, "N": 2 * keys - 1 if biased else 1}
    dims["C"] = int(attributes.get("degree", 2)) + 1
    usual = {"log_bias": "any" if biased else "zero", "kv_len": "S..S", "backend": "1..2"}
    attributes = {"scale": 0.2, **attributes}
    case = Case("made", dims, attributes=attributes, values={**usual, **(values or {})})
    inputs = case_inputs(SPEC, case, seed=rows)
    inputs[6] = torch.full((4,), 100.0)
    if attributes.get("degree", 2) % 2:  # positive where |x| < 0.9
        inputs[0], inputs[6] = inputs[0] / 16, torch.full((4,), 0.9)
    return case, inputs


def far_by_scores(p: Problem, *, causal: int, window: int, biased: bool) -> Tensor:
    return direct(p.q, p.k, p.u, p.series, p.toeplitz)


def far_by_fft(p: Problem, *, causal: int, window: int, biased: bool) -> Tensor:
    symbols = plain_symbols(p.q.shape[-1], torch.ones_like(p.toeplitz[0]))
    return toeplitz_fft(p.q, p.k, p.u, p.series, p.toeplitz, symbols)


def far_by_features(p: Problem, *, causal: int, window: int, biased: bool) -> Tensor:
    """By states in chunks, those of later keys from the end on; by T where there is a bias."""
    if biased:
        return factorised(p.q, p.k, p.u, p.series, causal=False, toeplitz=p.toeplitz)
    if not (causal or window):
        return factorised(p.q, p.k, p.u, p.series, causal=False)
    y = factorised(p.q, p.k, p.u, p.series, causal=True, lag=window, chunk=6)
    if causal:
        return y
    back = (x.flip(-2) for x in (p.q, p.k, p.u, p.series))
    return y + factorised(*back, causal=True, lag=window, chunk=6).flip(-2)


class Problem(NamedTuple):
    """The far field of all heads in fp64: q `[H, T, D]` scaled, u 0 for sinks, T with masks."""

    q: Tensor
    k: Tensor
    u: Tensor
    series: Tensor
    toeplitz: Tensor


def by_form(form: Callable[..., Tensor], inputs: list[Tensor], *, biased: bool, **a: Any) -> Tensor:
    """The operator for one sequence, with near keys by exp and far ones by a form."""
    group, length = inputs[0].shape[1] // inputs[1].shape[1], inputs[0].shape[2]
    q = inputs[0][0].double() * a["scale"]
    k, v = (x[0].double().repeat_interleave(group, 0) for x in inputs[1:3])
    u = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    offsets, keys = torch.arange(1 - length, length), torch.arange(length)
    seen = ((offsets >= 0) if a["causal"] else torch.ones_like(offsets)).double()
    far = seen * (offsets.abs() >= a["window"])
    toeplitz = inputs[5].double().exp().expand(len(q), len(offsets))
    is_far = (keys >= a["sink"]).double()[:, None]
    # The centre of a row: its query with the mean of far keys, a running sum.
    sums = toeplitz_product(far, is_far * torch.cat([k, torch.ones_like(k[..., :1])], dim=-1))
    centre = (q * sums[..., :-1]).sum(-1) / sums[..., -1].round().clamp(min=1)
    series = row_coefficients(inputs[3].double(), centre)
    result = form(
        Problem(q, k, u * is_far, series, toeplitz * far),
        **{name: a[name] for name in ("causal", "window")},
        biased=biased,
    )
    weights = (q @ k.mT - centre[..., None]).exp() * toeplitz_matrix(toeplitz * seen, length)
    near = 1 - toeplitz_matrix(far, length) * is_far.mT
    result = result + (weights * near) @ u
    return (result[..., :-1] / result[..., -1:]).unsqueeze(0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (2, 5), (3, 0)])
@pytest.mark.parametrize("form", [far_by_scores, far_by_features, far_by_fft])
def test_a_form_is_the_operator(
    form: Callable[..., Tensor], sink: int, window: int, degree: int, causal: int, biased: bool
) -> None:
    attributes = {"degree": degree, "causal": causal, "sink": sink, "window": window}
    case, inputs = made(21, width=4, biased=biased, **attributes)
    found = by_form(form, inputs, biased=biased, **case.attributes)
    exact, fallbacks = looped(inputs, case.attributes)
    assert (fallbacks == 0).all()
    assert float((found - exact).abs().max()) < 1e-10
    assert relative_error(reference(*inputs, **case.attributes)[0], exact) < 1e-5


@pytest.mark.parametrize("case", SPEC.cases, ids=case_id)
def test_reference_is_the_loop(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    y, counts = looped(inputs, case.attributes)
    found, fallbacks = reference(*inputs, **case.attributes)
    assert relative_error(found, y) < 1e-5
    assert fallbacks.tolist() == counts.tolist()


def test_the_cases_have_rows_of_all_kinds() -> None:
    """Heads without a row that falls back, with some and with nothing else."""
    kinds = set()
    for case in SPEC.cases:
        inputs = case_inputs(SPEC, case)
        rows = inputs[0].shape[2]
        real = int(inputs[8].clamp(max=rows).sum())
        for backend, count in zip(inputs[7], looped(inputs, case.attributes)[1], strict=True):
            if backend:
                kinds.add("none" if count == 0 else "all" if count == real else "some")
    assert kinds == {"none", "some", "all"}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("degree", [0, *DEGREES])
@pytest.mark.parametrize("length", LENGTHS)
def test_all_degrees_at_all_lengths(length: int, degree: int, causal: int, biased: bool) -> None:
    attributes = {"degree": degree, "causal": causal, "sink": 1, "window": 3}
    case, inputs = made(length, biased=biased, **attributes)
    y, _ = looped(inputs, case.attributes)
    for found, fallbacks in (reference(*inputs, **case.attributes), body(case, inputs)):
        assert relative_error(found, y) < 1e-5
        assert fallbacks.tolist() == [0] * 4


def test_polynomials_are_not_exp_and_backends_but_the_exact_one_are_alike() -> None:
    case, inputs = made(40, batch=2)
    found = {}
    for backend in (0, 1, 2):
        inputs[7][:] = backend
        found[backend], fallbacks = reference(*inputs, **case.attributes)
        assert (fallbacks == 0).all()
    assert torch.equal(found[1], found[2])
    assert relative_error(found[1], found[0]) > 1e-3
    q, k, v = inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:3])
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    assert relative_error(found[0], softmax) < 1e-5


@pytest.mark.parametrize("row_centre", [0, 1])
@pytest.mark.parametrize(("sink", "window"), [(50, 0), (0, 50), (3, 37), (0, 40)])
def test_where_all_keys_are_near_it_is_softmax(sink: int, window: int, row_centre: int) -> None:
    attributes = {"sink": sink, "window": window, "row_centre": row_centre}
    case, inputs = made(40, **attributes)
    y = reference(*inputs, **case.attributes)[0]
    inputs[7].zero_()
    assert relative_error(y, reference(*inputs, **case.attributes)[0]) < 1e-5


def test_sinks_and_window_are_exact_and_one_key_less_is_not() -> None:
    """Far keys have one score, where P is exact; sinks and the window have others."""
    case, inputs = made(30, sink=2, window=5)
    q, k = inputs[:2]
    q[:], k[:] = 0, 0
    q[..., 0], q[..., 1] = 1, torch.arange(30) % 7
    k[:, :, :2, 0], k[:, :, :, 1] = 9, 0.0
    inputs[3][:, 0] = 1
    exact = inputs.copy()
    exact[7] = torch.zeros_like(exact[7])
    right = reference(*exact, **case.attributes)[0]
    for attributes, equal in (({"sink": 2}, True), ({"sink": 1}, False)):
        found = reference(*inputs, **{**case.attributes, **attributes, "window": 0})[0]
        assert (relative_error(found, right) < 1e-5) is equal
    # Now the last five keys of the last row stand out.
    k[:, :, :2, 0], k[:, :, 25:, 0] = 0, 9
    right = reference(*exact, **case.attributes)[0][:, :, -1]
    for window, equal in ((5, True), (6, True), (4, False)):
        found = reference(*inputs, **{**case.attributes, "window": window})[0][:, :, -1]
        assert (relative_error(found, right) < 1e-5) is equal


@pytest.mark.parametrize("row_centre", [0, 1])
def test_a_row_centre_takes_any_shift_of_the_keys(row_centre: int) -> None:
    """A shift adds one constant to a row's scores, which key_mean follows only if it is told."""
    case, inputs = made(30, row_centre=row_centre)
    before = reference(*inputs, **case.attributes)[0]
    inputs[1] = inputs[1] + 2
    after = reference(*inputs, **case.attributes)[0]
    assert (relative_error(after, before) < 1e-5) == bool(row_centre)
    inputs[4] = inputs[4] + 2
    assert relative_error(reference(*inputs, **case.attributes)[0], before) < 1e-5


@pytest.mark.parametrize("row_centre", [0, 1])
def test_rows_out_of_bounds_are_exact_and_counted(row_centre: int) -> None:
    case, inputs = made(20, batch=2, row_centre=row_centre)
    wide = reference(*inputs, **case.attributes)[0]
    inputs[0][0, 1, 12] *= 40  # of head 1 alone
    inputs[6][:] = 25.0
    y, counts = reference(*inputs, **case.attributes)
    assert counts.tolist() == [0, 1, 0, 0]
    found, fallbacks = body(case, inputs)
    assert relative_error(found, y) < 1e-5
    assert torch.equal(fallbacks, counts)
    kept = torch.ones_like(y, dtype=torch.bool)
    kept[0, 1, 12] = False
    assert torch.equal(y[kept], wide[kept])
    inputs[7].zero_()
    exact, counts = reference(*inputs, **case.attributes)
    assert relative_error(y[0, 1, 12], exact[0, 1, 12]) < 1e-5
    assert counts.tolist() == [0] * 4


def test_a_row_knows_no_keys_behind_it() -> None:
    """Prefill and decoding decide alike, and see alike."""
    case, inputs = made(24, sink=2, window=3)
    inputs[6][:] = 3.0
    inputs[1][:, :, 17] *= 5
    whole, counts = reference(*inputs, **case.attributes)
    assert 0 < int(counts.sum()) < 4 * 24
    rows, total = [], torch.zeros_like(counts)
    for i in range(24):
        step = [inputs[0][:, :, i : i + 1], *inputs[1:8], torch.tensor([i + 1], dtype=torch.int32)]
        y, count = reference(*step, **case.attributes)
        rows.append(y)
        total += count
    assert relative_error(torch.cat(rows, dim=2), whole) < 1e-5
    assert torch.equal(total, counts)


@pytest.mark.parametrize("width", [2, 64, 128, 256])
def test_the_bound_hangs_on_no_order_of_summation(width: int) -> None:
    x = torch.randn(500, width) * torch.logspace(-3, 3, 500).unsqueeze(-1)
    found = squared_length(x)
    for seed in range(5):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(squared_length(x[:, order]), found)
    right = x.double().square().sum(-1, keepdim=True)
    assert ((found / right - 1).abs() < 1e-2).all()  # _MARGIN is of its square root, and twice
    assert torch.equal(squared_length(torch.zeros(2, width)), torch.zeros(2, 1))


@pytest.mark.parametrize("causal", [0, 1])
def test_what_stands_behind_kv_len_is_not_looked_at(causal: int) -> None:
    case, inputs = made(9, 14, batch=3, causal=causal, sink=1, window=2)
    inputs[8] = torch.tensor([14, 10, 5], dtype=torch.int32)
    inputs[1][1, :, 10:], inputs[2][2, :, 5:] = math.nan, math.nan
    y, counts = reference(*inputs, **case.attributes)
    found, fallbacks = body(case, inputs)
    assert relative_error(found, y) < 1e-5
    assert torch.equal(fallbacks, counts)
    assert (y[2, :, 5:] == 0).all()
    assert (y[2, :, :5] != 0).any()
    for b, length in enumerate((14, 10, 5)):
        first = min(9, length)
        alone = [x[b : b + 1, :, : min(x.shape[2], length)] for x in inputs[:3]]
        alone += [*inputs[3:8], inputs[8][b : b + 1]]
        cut = reference(*alone, **case.attributes)[0]
        assert relative_error(y[b, :, :first], cut[0, :, :first]) < 1e-5


def test_biases_can_be_masks_decays_and_one_for_all() -> None:
    case, inputs = made(20, biased=True, causal=0)
    offsets = torch.arange(-19, 20)
    inputs[5] = torch.where((offsets >= 0) & (offsets < 6), -0.1 * offsets, -math.inf).repeat(4, 1)
    masked = reference(*inputs, **case.attributes)[0]
    assert relative_error(body(case, inputs)[0], masked) < 1e-5
    inputs[7].zero_()
    masked = reference(*inputs, **case.attributes)[0]
    distance = (torch.arange(20)[:, None] - torch.arange(20)).float()
    mask = torch.where((distance >= 0) & (distance < 6), -0.1 * distance, -math.inf)
    q, k, v = inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:3])
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
    assert relative_error(masked, softmax) < 1e-5
    plain, one = made(20)[1], made(20)[1]
    one[5] = torch.full((1, 1), -700.0)
    assert relative_error(reference(*one)[0], reference(*plain)[0]) < 1e-5


def test_where_no_key_has_a_weight_y_is_0() -> None:
    case, inputs = made(8, biased=True)
    inputs[5][:, :8] = -math.inf  # offsets up to 0
    inputs[5][1] = -math.inf
    for y, _ in (reference(*inputs, **case.attributes), body(case, inputs)):
        assert (y[:, :, 0] == 0).all()
        assert (y[:, 1] == 0).all()
        assert (y[:, 0, 1:] != 0).any()


@pytest.mark.parametrize("length", [0, -3, 99])
def test_the_body_reads_nothing_outside_whatever_kv_len(length: int) -> None:
    case, inputs = made(6, batch=2, biased=True)
    right = reference(*inputs, **case.attributes)[0]
    inputs[8][1] = length
    found = body(case, inputs)[0]
    assert relative_error(found[0], right[0]) < 1e-5
    expected = right[1] if length > 6 else torch.zeros_like(right[1])
    assert relative_error(found[1], expected) < 1e-5


def test_large_scores_and_biases_do_not_overflow() -> None:
    case, inputs = made(30, biased=True, scale=1.0, sink=1, window=4)
    inputs[0] *= 100
    inputs[5] = inputs[5] * 300
    inputs[6][:] = 1e9
    y, counts = reference(*inputs, **case.attributes)
    assert y.isfinite().all()
    assert counts.tolist() == [0] * 4
    assert relative_error(body(case, inputs)[0], y) < 1e-5


def test_a_later_key_however_large_changes_nothing() -> None:
    case, inputs = made(9, degree=4)
    right, counts = reference(*inputs, **case.attributes)
    inputs[1][:, :, 8] = 3e18  # whose score to the fourth power is none
    for y, fallbacks in (reference(*inputs, **case.attributes), body(case, inputs)):
        assert relative_error(y[:, :, :8], right[:, :, :8]) < 1e-5
        assert (fallbacks == counts + 1).all()


@pytest.mark.parametrize(
    ("series", "bound", "least"),
    [
        ([1.0, 1.0], 0.5, 0.5),
        ([1.0, 1.0, 0.5], 3.0, 0.5),
        ([1.0, 0.0, 1.0], 2.0, 1.0),
        ([2.0], 7.0, 2.0),
        ([0.0, 1.0, 0.0], 1.0, -1.0),
        ([1.0, -2.0, 1.0], 0.5, 0.25),
        ([1.0, -2.0, 1.0], 2.0, 0.0),
        ([1.0, 1.0, 0.5, 1 / 6], 2.0, -1 / 3),
        ([1.0, 1.0, 0.5, 1 / 6, 1 / 24], 9.0, 0.2704),
    ],
    ids=str,
)
def test_least_value(series: list[float], bound: float, least: float) -> None:
    assert least_value(series, bound) == pytest.approx(least, abs=1e-4)


def change(
    index: int, place: int | tuple[int, ...], value: float
) -> Callable[[list[Tensor]], None]:
    def apply(inputs: list[Tensor]) -> None:
        inputs[index][place] = value

    return apply


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change(3, (2, 0), -1.0), "coefficients of head 2 that are positive up to 1.01 x 100, but"),
        (change(3, (0, 2), -0.01), "coefficients of head 0 that are positive"),
        (change(3, (1, 1), math.nan), "coefficients of head 1 that are positive"),
        (change(5, (0, 0), math.inf), "log_bias below infinity"),
        (change(5, (0, 0), math.nan), "log_bias below infinity"),
        (change(6, 3, -1.0), "finite score_bound of at least 0 for head 3"),
        (change(6, 3, math.inf), "finite score_bound of at least 0 for head 3, but inf"),
        (change(7, 1, 3), "backend of 0, 1 or 2, but 3"),
        (change(7, 1, -1), "backend of 0, 1 or 2, but -1"),
        (change(8, 0, 0), "kv_len from 1 to 7, but 0"),
        (change(8, 0, 8), "kv_len from 1 to 7, but 8"),
    ],
)
def test_refused_numbers(changed: Callable[[list[Tensor]], None], words: str) -> None:
    case, inputs = made(7)
    changed(inputs)
    with pytest.raises(RuntimeInputError, match=words):
        reference(*inputs, **case.attributes)


def test_taylor_of_degree_1_and_3_is_refused_where_it_is_negative() -> None:
    case, inputs = made(7, degree=3)
    inputs[6][:] = 2.0
    with pytest.raises(RuntimeInputError, match=r"positive up to .* x 2, but a polynomial that"):
        reference(*inputs, **case.attributes)
    inputs[7].zero_()  # an exact head has no polynomial
    assert reference(*inputs, **case.attributes)[0].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: (1, 4, 7, 7), 1: (1, 2, 7, 7), 2: (1, 2, 7, 7), 4: (4, 7)}, "even head_dim.*but 7"),
        ({1: (1, 3, 7, 8), 2: (1, 3, 7, 8)}, "groups of one size per key head, but 4 for 3"),
        ({2: (1, 2, 6, 8)}, r"v \[B, Hkv, S, D\] with S = 7"),
        ({3: (4, 4)}, "3 coefficients per head for degree 2, but 4"),
        ({3: (3, 3)}, r"coefficients \[H, C\] with H = 4"),
        ({4: (2, 8)}, r"key_mean \[H, D\] with H = 4"),
        ({5: (2, 13)}, "one log_bias for all heads or one for each of 4, but 2"),
        ({5: (1, 11)}, "1 offset or an odd number of them from 13 on, for 7 keys, but 11"),
        ({5: (1, 14)}, "odd number of them from 13 on, for 7 keys, but 14"),
        ({7: (1,)}, r"backend \[H\] with H = 4"),
        ({8: (2,)}, r"kv_len \[B\] with B = 1"),
    ],
    ids=str,
)
def test_refused_shapes(changed: dict[int, tuple[int, ...]], words: str) -> None:
    case, _ = made(7)
    shapes = [changed.get(i, shape) for i, shape in enumerate(SPEC.input_shapes(case))]
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*shapes)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"degree": 5}, "a degree from 0 to 4, but 5"),
        ({"degree": -1}, "a degree from 0 to 4"),
        ({"degree": 1}, "2 coefficients per head for degree 1, but 3"),
        ({"sink": -1}, "sink of at least 0"),
        ({"window": -1}, "window of at least 0"),
        ({"causal": 2}, "causal of 0 or 1"),
        ({"row_centre": 2}, "row_centre of 0 or 1"),
        ({"scale": math.inf}, "finite scale of at least 0"),
    ],
    ids=str,
)
def test_refused_attributes(attributes: dict[str, Any], words: str) -> None:
    case, _ = made(7)
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*SPEC.input_shapes(case), **attributes)


def test_symbolic_sizes_are_taken_on_trust() -> None:
    case, _ = made(7)
    shapes = [("B", *shape[1:]) for shape in SPEC.input_shapes(case)[:3]]
    shapes = [(*s[:2], name, s[3]) for s, name in zip(shapes, ("T", "S", "S"), strict=True)]
    others = [*SPEC.input_shapes(case)[3:8], ("B",)]
    assert SPEC.output_shapes(*shapes, *others) == (("B", 4, "T", 8), (4,))
