"""The cost of heads against the paper's own figures, and by counting."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.devices.registry import parse_target
from edgeattn.planner.cost import (
    Heads,
    StepCost,
    Tradeoff,
    candidate_heads,
    inference_flops,
    inference_values,
    paper_cost,
    step_cost,
    with_heads,
)
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.planner.published_heads import (
    CONTEXTS,
    LOSSES,
    published_heads,
    reference_size,
)
from edgeattn.recipe import Recipe
from edgeattn.recurrent import Recurrent
from edgeattn.shape import LayerKind, ModelShape

# arXiv 2503.09579, at 128K tokens: (32, 8) with 1.2 billion parameters and (8, 1) with 1.8 billion.
LAYERS, WIDTH, CONTEXT = 36, 64, 131072
PAPER = ModelShape(
    family="llama",
    num_layers=36,
    hidden_size=1536,
    num_heads=24,
    num_kv_heads=24,
    head_dim=64,
    intermediate_size=4096,
    vocab_size=50304,
    max_context=8192,
    norm_eps=1e-5,
    layer_cycle=(LayerKind(None),),
    tied_embeddings=True,
)


def lowering(shape: ModelShape, target: str = "l4", quant: str = "none", **fields: int) -> Lowering:
    place = parse_target(target)
    return fit_lowering(plan_lowering(Recipe(target, quant=quant, **fields), place), shape, place)


@pytest.mark.parametrize(("heads", "saving"), [(24, 0.577), (32, 0.677)])
def test_flops_that_few_heads_save(heads: int, saving: float) -> None:
    many = inference_flops(1.2e9, LAYERS, WIDTH, heads, CONTEXT)
    few = inference_flops(1.8e9, LAYERS, WIDTH, 8, CONTEXT)
    assert 1 - few / many == pytest.approx(saving, abs=5e-4)
    causal = [
        inference_flops(n, LAYERS, WIDTH, h, CONTEXT / 2) for n, h in ((1.2e9, heads), (1.8e9, 8))
    ]
    # A token sees every key of its context: with half of them on the mean, less would be saved.
    assert 1 - causal[1] / causal[0] < saving - 0.01


def test_memory_that_few_heads_save() -> None:
    many = inference_values(1.2e9, LAYERS, WIDTH, 8, CONTEXT)
    few = inference_values(1.8e9, LAYERS, WIDTH, 1, CONTEXT)
    assert 1 - few / many == pytest.approx(0.601, abs=5e-4)


def test_the_paper_prefers_the_larger_model_with_few_heads() -> None:
    def cost(parameters: float, heads: Heads, context: int) -> float:
        return Tradeoff().cost(
            inference_values(parameters, LAYERS, WIDTH, heads.kv, context),
            inference_flops(parameters, LAYERS, WIDTH, heads.query, context),
        )

    assert cost(1.8e9, Heads(8, 1), CONTEXT) < cost(1.2e9, Heads(32, 8), CONTEXT)
    assert cost(1.8e9, Heads(8, 1), 1024) > cost(1.2e9, Heads(32, 8), 1024)


def test_the_cost_by_hand() -> None:
    assert Tradeoff().cost(100, 1000) == pytest.approx(0.9 * 10 + 0.1 * 10)
    assert Tradeoff(0.5, 1, 1).cost(100, 1000) == pytest.approx(550)


def test_a_gated_mlp_has_three_matrices() -> None:
    assert PAPER.num_parameters == pytest.approx(1.10e9, rel=0.005)
    two = PAPER.num_parameters - 36 * 1536 * 4096
    assert two == pytest.approx(0.87e9, rel=0.005), "as printed"


def counted(shape: ModelShape, context: int) -> tuple[int, int]:
    """FLOPs of one token that sees `context` keys, and numbers held, one by one."""
    flops = values = 0
    for _ in range(shape.num_layers):
        for rows, columns in shape.linears().values():
            flops += 2 * rows * columns
            values += rows * columns
        for head in range(shape.num_heads):
            flops += sum(2 * shape.head_dim + 2 * shape.head_dim for _ in range(context))
            if head < shape.num_kv_heads:
                values += 2 * context * shape.head_dim
    table = shape.vocab_size * shape.hidden_size
    return flops + 2 * table, values + table * (1 if shape.tied_embeddings else 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [Heads(4, 1), Heads(6, 3), Heads(8, 8)])
def test_a_model_is_counted(shape: ModelShape, heads: Heads, *, tied: bool) -> None:
    shape = with_heads(replace(shape, num_layers=3, tied_embeddings=tied), heads)
    found, (flops, values) = paper_cost(shape, 100, Tradeoff()), counted(shape, 100)
    norms = 2 * shape.hidden_size * 3 + shape.hidden_size
    assert found.values == values + norms
    assert found.flops == flops + 2 * norms
    assert found.cost == pytest.approx(0.9 * found.values**0.5 + 0.1 * found.flops ** (1 / 3))


@pytest.mark.parametrize("tied", [True, False])
def test_16_bits_and_one_row_are_the_papers(shape: ModelShape, *, tied: bool) -> None:
    shape = replace(shape, tied_embeddings=tied)
    found = step_cost(shape, lowering(shape), 4096, 1)
    paper = paper_cost(shape, 4096, Tradeoff())
    assert found.flops == paper.flops
    assert found.cost(Tradeoff()) == pytest.approx(paper.cost, rel=1e-5), "but for RoPE's tables"


def test_rows_and_bits(shape: ModelShape) -> None:
    one = step_cost(shape, lowering(shape), 4096, 1)
    several = step_cost(shape, lowering(shape), 4096, 8)
    assert several.weight_bytes == one.weight_bytes
    assert several.cache_bytes == 8 * one.cache_bytes == 8 * 4096 * 2 * 30 * 3 * 64 * 2
    assert several.flops == 8 * one.flops
    small = step_cost(shape, lowering(shape, quant="w4-rtn"), 4096, 1)
    assert small.weight_bytes < 0.35 * one.weight_bytes
    assert (small.cache_bytes, small.flops) == (one.cache_bytes, one.flops)
    short = step_cost(shape, lowering(shape, quant="w4a16-gptq:kv=int8"), 4096, 1)
    assert 2 * short.cache_bytes == one.cache_bytes


@given(
    context=st.integers(1, 1 << 20),
    more=st.integers(1, 1 << 20),
    pair=st.sampled_from([Heads(2, 1), Heads(8, 2), Heads(16, 16)]),
)
def test_cost_grows(context: int, more: int, pair: Heads) -> None:
    shape, stored = with_heads(PAPER, pair), lowering(PAPER)

    def cost(shape: ModelShape, context: int, batch: int = 1) -> float:
        return step_cost(shape, stored, context, batch).cost(Tradeoff())

    least = cost(shape, context)
    assert cost(shape, context + more) > least
    assert cost(shape, context, 2) > least
    assert cost(with_heads(shape, Heads(2 * pair.query, pair.kv)), context) > least
    assert cost(with_heads(shape, Heads(2 * pair.query, 2 * pair.kv)), context) > cost(
        with_heads(shape, Heads(2 * pair.query, pair.kv)), context
    )
    assert cost(replace(shape, intermediate_size=8192), context) > least


def test_four_bits_favour_fewer_kv_heads() -> None:
    """The cache weighs more beside small weights."""

    def gain(quant: str) -> float:
        few = with_heads(PAPER, Heads(24, 1))
        steps = [step_cost(s, lowering(s, quant=quant), 32768, 1) for s in (few, PAPER)]
        return steps[0].cost(Tradeoff()) / steps[1].cost(Tradeoff())

    assert gain("w4-rtn") < gain("none")


@pytest.mark.parametrize("heads", [Heads(8, 1), Heads(24, 3), Heads(32, 32)])
def test_parameters_of_equal_cost(heads: Heads) -> None:
    own = step_cost(PAPER, lowering(PAPER), 16384, 1).cost(Tradeoff())
    other = step_cost(with_heads(PAPER, heads), lowering(PAPER), 16384, 1)
    found = other.parameters_at(own, Tradeoff())
    assert found is not None
    assert (found > other.parameters) == (other.cost(Tradeoff()) < own)
    # each parameter is two bytes and two FLOPs
    same = 0.9 * (found + other.cache_bytes / 2) ** 0.5
    same += 0.1 * (2 * found + other.attention_flops) ** (1 / 3)
    assert same == pytest.approx(own, rel=1e-5)


def test_a_cache_that_costs_more_by_itself_has_no_equal() -> None:
    step = StepCost(1000, 2000, 10**9, 2000.0, 1e6)
    assert step.parameters_at(Tradeoff().cost(5e8, 1e6) * 0.99, Tradeoff()) is None
    own = step.parameters_at(step.cost(Tradeoff()), Tradeoff())
    assert own == pytest.approx(1000, abs=1)


def test_more_parameters_than_a_float_counts_one_by_one() -> None:
    """Beside a cache of 2^60 tokens a parameter more or less is below what a float resolves."""
    own = step_cost(PAPER, lowering(PAPER), 2**30, 2**30)
    fewer = step_cost(with_heads(PAPER, Heads(1, 1)), lowering(PAPER), 2**30, 2**30)
    found = fewer.parameters_at(own.cost(Tradeoff()), Tradeoff())
    assert found is not None
    assert fewer.times(found / fewer.parameters).cost(Tradeoff()) == pytest.approx(
        own.cost(Tradeoff())
    )


def test_candidates(shape: ModelShape) -> None:
    found = candidate_heads(PAPER)
    powers = [heads for heads in found if heads.query != 24]
    assert len(powers) == 21
    assert [kv for query, kv in found if query == 24] == [1, 2, 3, 4, 6, 8, 12, 24]
    assert all(query % kv == 0 for query, kv in found)
    assert len(candidate_heads(shape)) == 21 + 3
    assert len(set(candidate_heads(replace(shape, num_heads=8, num_kv_heads=8)))) == 21


def test_layers_with_a_state_have_no_heads_to_choose(shape: ModelShape) -> None:
    linear = LayerKind(None, attention=Recurrent("gated", 4, 4, 8, 8))
    softmax = shape.layer_kind(0)
    mixed = replace(shape, num_layers=4, layer_cycle=(linear, softmax, linear, linear))
    every = paper_cost(replace(shape, num_layers=4), 8192, Tradeoff())
    parameters = mixed.num_parameters
    assert paper_cost(mixed, 8192, Tradeoff()).values - parameters == pytest.approx(
        (every.values - replace(shape, num_layers=4).num_parameters) / 4
    )
    assert len(candidate_heads(mixed)) > 1
    without = replace(shape, layer_cycle=(linear,))
    assert candidate_heads(without) == [Heads(shape.num_heads, shape.num_kv_heads)]


def test_the_published_table_is_read_where_it_is_nearest() -> None:
    def heads(context: int, loss: float) -> tuple[int, int] | None:
        found = published_heads(context, loss)
        return None if found is None else found.heads

    assert heads(131072, 2.615) == (8, 1), "the paper's example"
    assert heads(8192, 2.6) == (32, 8), "Llama 3's layout, at short context"
    assert heads(65536, 2.35) == (32, 16)
    assert heads(16384, 3.0) == (16, 1)
    assert heads(11000, 2.7) == (32, 4)
    assert heads(12000, 2.7) == (16, 2), "nearer by ratio, not by difference"
    assert heads(32768, 2.36) == heads(32768, 2.35) == (32, 32)


def test_the_published_table_ends_at_its_edges() -> None:
    assert published_heads(8191, 2.6) is None
    assert published_heads(131073, 2.6) is None
    for loss in (None, 3.01, 2.34, float("nan")):
        found = published_heads(8192, loss)
        assert found is not None
        assert (found.loss, found.heads) == (None, None)
        assert len(found.column) == 8


def test_the_published_table_is_monotone() -> None:
    """Longer contexts never want more heads, lower losses never fewer."""
    columns = [published_heads(context) for context in CONTEXTS]
    assert list(LOSSES) == sorted(LOSSES, reverse=True)
    for shorter, longer in pairwise(columns):
        assert shorter is not None
        assert longer is not None
        for loss in LOSSES:
            assert shorter.column[loss].query >= longer.column[loss].query
            assert shorter.column[loss].kv >= longer.column[loss].kv
    for column in columns:
        assert column is not None
        pairs = list(column.column.values())
        assert pairs == sorted(pairs)
        assert [kv for _, kv in pairs] == sorted(kv for _, kv in pairs)


def test_losses_are_those_of_models_of_the_same_size() -> None:
    assert reference_size(1.24e9) == 1.2e9
    assert reference_size(8.03e9) == 8e9
    assert reference_size(3.2e9) == 3e9
    for unknown in (135e6, 0.6e9, 1.9e9, 70e9):
        assert reference_size(unknown) is None
