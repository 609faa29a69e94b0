"""GPTQ against rounding to nearest and against a naive elimination of columns, one by one."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeattn.errors import CheckpointError, LoweringError, RuntimeInputError
from edgeattn.quant.affine import QuantizedTensor, quantize, quantize_symmetric
from edgeattn.quant.gptq import Hessian, gptq
from edgeattn.quant.scheme import WeightFormat

INT8, INT4, GROUPED = WeightFormat(8), WeightFormat(4), WeightFormat(4, group_size=8)
FORMATS = pytest.mark.parametrize(
    "format", [INT8, INT4, GROUPED], ids=["int8", "int4", "int4-groups"]
)
CLIPS = pytest.mark.parametrize("clip", ["mse", "max"])
SEARCHES = pytest.mark.parametrize("scale_search", ["plain", "weighted"])
seeds = st.integers(0, 2**32 - 1)


def problem(
    seed: int, *, rows: int = 4, inputs: int = 24, tokens: int = 400, sample: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of inputs that are correlated and of very different sizes.

    Another sample is of other inputs with the same distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    spectrum = torch.arange(1, inputs + 1).double() ** -0.5
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    gain = torch.randn(inputs, generator=generator, dtype=torch.float64).exp()
    generator.manual_seed(seed + 1 + sample)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) * spectrum
    x = x @ mixing * gain
    return weight, x.T @ x / tokens


def loss(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """The mean square of what the layer's output is off."""
    error = (quantized - weight).double()
    return float((error @ hessian * error).sum())


def eliminate_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    format: WeightFormat,
    *,
    act_order: bool = False,
    damp: float = 0.01,
    feedback: float = 1.0,
) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """Optimal brain quantisation in a fixed order, as its formulas stand there, in fp64.

    Takes the scales as given. Returns the integers, the weights before each column was rounded,
    and how near a weight came to a tie. A `feedback` other than 1 is wrong.
    """
    order = torch.arange(weight.shape[1])
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    w, steps = weight.double(), scale.double()
    steps = steps.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped[order][:, order])
    integers, before, margin = torch.zeros_like(w), [], 0.5
    for i, column in enumerate(order.tolist()):
        before.append(w.clone())
        ratio = w[:, column] / steps[:, column]
        integers[:, column] = ratio.round().clamp(format.low, format.high)
        margin = min(margin, float((ratio - ratio.floor() - 0.5).abs().min()))
        error = w[:, column] - integers[:, column] * steps[:, column]
        w[:, order[i + 1 :]] -= feedback * torch.outer(error, inverse[0, 1:] / inverse[0, 0])
        # The inverse of the Hessian without this column, by one step of Gaussian elimination.
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return integers, before, margin


@FORMATS
@SEARCHES
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@given(seed=seeds)
@settings(max_examples=10)
def test_integers_are_those_of_naive_elimination(
    format: WeightFormat, scale_search: Literal["plain", "weighted"], act_order: bool, seed: int
) -> None:
    weight, hessian = problem(seed)
    result = gptq(
        weight, hessian, format, clip="mse", act_order=act_order, scale_search=scale_search
    )
    expected, _, margin = eliminate_columns(
        weight, hessian, result.scale, format, act_order=act_order
    )
    assume(margin > 1e-4)
    assert torch.equal(result.qdata.double(), expected)


@FORMATS
@CLIPS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(seed=seeds)
@settings(max_examples=5)
def test_keeps_the_contract_of_a_quantized_tensor(
    format: WeightFormat, clip: Literal["mse", "max"], scale_dtype: torch.dtype, seed: int
) -> None:
    weight, hessian = problem(seed)
    result = gptq(weight.half(), hessian, format, clip=clip, scale_dtype=scale_dtype)
    like = quantize_symmetric(weight, format, clip=clip, scale_dtype=scale_dtype)
    for ours, theirs in ((result.qdata, like.qdata), (result.scale, like.scale)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.is_contiguous()
        assert not ours.is_inference()
    assert result.format == format
    assert result.qdata.min() >= format.low
    assert result.qdata.max() <= format.high
    assert (result.scale > 0).all()


@FORMATS
@CLIPS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@given(seed=seeds)
@settings(max_examples=5)
def test_uncorrelated_inputs_give_rounding_to_nearest(
    format: WeightFormat,
    clip: Literal["mse", "max"],
    scale_dtype: torch.dtype,
    act_order: bool,
    seed: int,
) -> None:
    weight, _ = problem(seed)
    options: dict[str, Any] = {"clip": clip, "scale_dtype": scale_dtype}
    result = gptq(
        weight, torch.eye(24), format, act_order=act_order, scale_search="plain", **options
    )
    expected = quantize_symmetric(weight, format, **options)
    assert torch.equal(result.scale, expected.scale)
    assert torch.equal(result.qdata, expected.qdata)


@FORMATS
def test_the_weighted_search_with_equal_weights_is_as_good_as_the_plain_one(
    format: WeightFormat,
) -> None:
    weight = torch.randn(64, 64)
    result = gptq(weight, torch.eye(64), format, clip="mse")
    plain = quantize_symmetric(weight, format, clip="mse")
    groups = weight.view(-1, format.group_size or 64)
    nearest = quantize(groups, result.scale.view(-1, 1), format)
    assert torch.equal(result.qdata, nearest.view(64, 64))
    identity = torch.eye(64, dtype=torch.float64)
    assert loss(weight, result.dequantize(), identity) <= loss(weight, plain.dequantize(), identity)


@FORMATS
@CLIPS
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_correlated_inputs_lose_far_less_than_with_rounding_to_nearest(
    format: WeightFormat, clip: Literal["mse", "max"], act_order: bool
) -> None:
    weight, hessian = problem(0, rows=64, inputs=128, tokens=2048)
    _, fresh = problem(0, rows=64, inputs=128, tokens=2048, sample=1)
    rounded = quantize_symmetric(weight, format, clip=clip).dequantize()
    result = gptq(weight, hessian, format, clip=clip, act_order=act_order).dequantize()
    # Also on inputs that the Hessian was not made of.
    for judge in (hessian, fresh):
        assert loss(weight, result, judge) < 0.4 * loss(weight, rounded, judge)


@pytest.mark.parametrize("feedback", [-1.0, 0.0], ids=["wrong sign", "none"])
def test_wrong_feedback_gains_nothing(feedback: float) -> None:
    """The comparison above can tell a wrong implementation from a right one."""
    weight, hessian = problem(0, rows=64, inputs=128, tokens=2048)
    plain = quantize_symmetric(weight, INT4, clip="mse")
    losses = {
        sign: loss(
            weight,
            eliminate_columns(weight, hessian, plain.scale, INT4, feedback=sign)[0] * plain.scale,
            hessian,
        )
        for sign in (1.0, feedback)
    }
    rounded = loss(weight, plain.dequantize(), hessian)
    assert losses[1.0] < 0.4 * rounded
    assert losses[feedback] > 0.99 * rounded


@pytest.mark.parametrize("format", [INT4, GROUPED], ids=["int4", "int4-groups"])
def test_the_weighted_search_loses_less_than_the_plain_one(format: WeightFormat) -> None:
    weight, hessian = problem(0, rows=64, inputs=128, tokens=2048)
    plain, weighted = (
        gptq(weight, hessian, format, clip="mse", scale_search=search).dequantize()
        for search in ("plain", "weighted")
    )
    assert loss(weight, weighted, hessian) < 0.8 * loss(weight, plain, hessian)


def test_the_weighted_search_is_near_the_best_of_a_fine_grid() -> None:
    """A brute-force search over 1,000 scales per group is at most a tenth better.

    Without correlations the importance of a column is the diagonal of the Hessian itself.
    """
    weight, hessian = problem(1, rows=64)
    importance = hessian.diagonal()
    groups, weights = weight.double().view(64, 3, 8), importance.view(3, 8)
    best = torch.full((64, 3), torch.inf, dtype=torch.float64)
    for fraction in torch.linspace(0.1, 1.1, 1000):
        scale = groups.abs().amax(2, keepdim=True) * fraction / 7
        error = (groups / scale).round().clamp(-8, 7) * scale - groups
        best = torch.minimum(best, (error.square() * weights).sum(2))
    weighted, plain = (
        gptq(weight, importance.diag(), GROUPED, clip="mse", damp=0, scale_search=search)
        for search in ("weighted", "plain")
    )
    assert loss(weight, weighted.dequantize(), importance.diag()) <= 1.1 * best.sum()
    assert loss(weight, plain.dequantize(), importance.diag()) > 1.5 * best.sum()


@given(seed=seeds)
@settings(max_examples=10)
def test_scales_of_a_group_mind_the_errors_of_the_groups_before(seed: int) -> None:
    weight, hessian = problem(seed)
    result = gptq(weight, hessian, GROUPED, clip="max")
    _, before, margin = eliminate_columns(weight, hessian, result.scale, GROUPED)
    assume(margin > 1e-4)
    for group in range(3):
        moved = before[8 * group][:, 8 * group : 8 * group + 8]
        expected = moved.abs().amax(1).float() / GROUPED.high
        torch.testing.assert_close(result.scale[:, group], expected, rtol=1e-4, atol=0)


def test_act_order_chooses_scales_from_the_original_weights() -> None:
    weight, hessian = problem(0)
    result = gptq(weight, hessian, GROUPED, clip="mse", act_order=True, scale_search="plain")
    expected = quantize_symmetric(weight, GROUPED, clip="mse")
    assert torch.equal(result.scale, expected.scale)


@FORMATS
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_inputs_that_are_always_zero(format: WeightFormat, act_order: bool) -> None:
    """Their weights become zero and change nothing about the others, scales included."""
    weight, hessian = problem(0)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[3, 8, 23]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = gptq(weight, hessian, format, clip="max", act_order=act_order)
    loud = gptq(weight.masked_fill(dead, 1e6), hessian, format, clip="max", act_order=act_order)
    assert (result.qdata[:, dead] == 0).all()
    assert torch.equal(result.qdata, loud.qdata)
    assert torch.equal(result.scale, loud.scale)
    assert result.qdata.count_nonzero() > 40


def test_nothing_but_zeros() -> None:
    for weight, hessian in (
        (torch.zeros(3, 24), problem(0)[1]),
        (torch.randn(3, 24), torch.zeros(24, 24)),
    ):
        result = gptq(weight, hessian, GROUPED, clip="mse", scale_dtype=torch.float16)
        assert (result.scale > 0).all()
        assert (result.dequantize() == 0).all()


def test_a_constant_factor_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(0)
    assert same(
        gptq(weight, hessian, GROUPED, clip="mse"),
        gptq(weight, hessian * 1024, GROUPED, clip="mse"),
    )


def test_the_result_is_reproducible_on_any_number_of_threads() -> None:
    weight, hessian = problem(0, rows=300, inputs=320, tokens=4096)
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 2):
        torch.set_num_threads(number)
        results.append(gptq(weight, hessian, GROUPED, clip="mse"))
    torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[1], results[2])


def test_rows_do_not_influence_each_other() -> None:
    """More rows than are quantised together, and layers stacked."""
    weight, hessian = problem(0, rows=2100)
    whole = gptq(weight, hessian, GROUPED, clip="mse")
    for rows in (slice(0, 700), slice(2000, 2100)):
        part = gptq(weight[rows], hessian, GROUPED, clip="mse")
        # A product of another shape may round the last bit another way, and a tie with it.
        assert (part.qdata != whole.qdata[rows]).float().mean() < 1e-3


def test_too_few_tokens_are_made_up_for_by_damping() -> None:
    """The Hessian of 5 tokens has rank 5; without damping no factor exists."""
    weight, hessian = problem(0, tokens=5)
    result = gptq(weight, hessian, INT8, clip="mse", damp=0)
    assert same(result, gptq(weight, hessian, INT8, clip="mse", damp=0.01))


def test_refuses_a_matrix_that_is_no_hessian() -> None:
    weight, hessian = problem(0)
    with pytest.raises(RuntimeInputError, match="not positive definite even with 10 of its mean"):
        gptq(weight, -hessian, INT8, clip="mse")
    with pytest.raises(RuntimeInputError, match="finite Hessian of 24 x 24"):
        gptq(weight, hessian[1:, 1:], INT8, clip="mse")
    hessian[2, 2] = torch.nan
    with pytest.raises(RuntimeInputError, match="finite Hessian of 24 x 24"):
        gptq(weight, hessian, INT8, clip="mse")


def test_refuses_weights_that_are_not_finite() -> None:
    weight, hessian = problem(0)
    weight[1, 1] = torch.inf
    with pytest.raises(CheckpointError, match="expected finite weights"):
        gptq(weight, hessian, INT8, clip="mse")


def test_refuses_a_group_that_does_not_divide() -> None:
    weight, hessian = problem(0)
    with pytest.raises(LoweringError, match=r"a group that divides the 24 inputs .* group is 32"):
        gptq(weight, hessian, WeightFormat(4, 32), clip="mse")


def test_the_hessian_of_many_tokens_is_exact() -> None:
    """Inputs with a large mean, 65,536 tokens in uneven batches of every shape and dtype."""
    x = (torch.randn(65536, 12) + 30).half()
    hessian = Hessian(12)
    for batch in (x[:1].float(), x[1:10001].view(4, 2500, 12), x[10001:].double()):
        hessian.add(batch)
    exact = x.double().T @ x.double() / len(x)
    assert hessian.tokens == 65536
    torch.testing.assert_close(hessian.matrix, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_the_hessian_refuses_what_is_not_finite(value: float) -> None:
    hessian = Hessian(4)
    hessian.add(torch.ones(3, 4))
    with pytest.raises(RuntimeInputError, match="1 of 4 channels hold NaN, infinity or numbers"):
        hessian.add(torch.ones(3, 4).index_fill(1, torch.tensor(2), value))
    assert hessian.tokens == 3
    assert torch.equal(hessian.matrix, torch.ones(4, 4, dtype=torch.float64))


def test_the_hessian_of_no_tokens_is_refused() -> None:
    with pytest.raises(RuntimeInputError, match="none were added"):
        _ = Hessian(4).matrix


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)
