"""Head routers: labels and recall by brute force, and routers that know more than frequencies."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.models.attention_variants import active_heads
from edgeattn.transforms.head_router import (
    HeadRouter,
    Method,
    recall,
    train_router,
)

METHODS = get_args(Method)
TOKENS, WIDTH, HEADS = 16384, 24, 6


def best(scores: list[float], units: int, slots: int) -> set[int]:
    """The query heads of the units whose best head is best, by trying all choices of units."""
    size = len(scores) // units
    of_unit = [max(scores[size * unit : size * (unit + 1)]) for unit in range(units)]
    chosen = max(
        itertools.combinations(range(units), slots), key=lambda c: sum(of_unit[u] for u in c)
    )
    return {head for head in range(len(scores)) if head // size in chosen}


@given(
    st.lists(st.integers(-99, 99), min_size=6, max_size=6, unique=True),
    st.sampled_from([(6, 1), (6, 4), (6, 6), (3, 2), (2, 1), (1, 1)]),
)
def test_active_heads_are_those_of_the_best_units(
    scores: list[int], choice: tuple[int, int]
) -> None:
    units, slots = choice
    active = active_heads(torch.tensor(scores).float(), units, slots)
    found = {head for head, is_active in enumerate(active.tolist()) if is_active}
    assert found == best([float(score) for score in scores], units, slots)


def test_a_group_counts_by_its_best_head_not_by_its_sum() -> None:
    scores = torch.tensor([5.0, 0.0, 4.0, 4.0])
    assert active_heads(scores, units=2, slots=1).tolist() == [True, True, False, False]


def test_recall_is_the_share_of_the_longest_that_are_found() -> None:
    norms = torch.tensor([[3.0, 2.0, 1.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    scores = torch.tensor([[9.0, 1.0, 8.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert recall(scores, norms, units=4, slots=2) == pytest.approx((0.5 + 1) / 2)
    # Of the groups {0, 1} and {2, 3} the longest are found for both tokens.
    assert recall(scores, norms, units=2, slots=1) == 1
    assert recall(-scores, norms, units=2, slots=1) == 0


@pytest.fixture(scope="module")
def activity() -> tuple[Tensor, Tensor]:
    """Heads whose lengths follow from the input, but for some noise; scales as in a real model."""
    generator = torch.Generator().manual_seed(1)
    scale = 10 ** torch.linspace(-2, 1, WIDTH)
    normed = torch.randn(TOKENS, WIDTH, generator=generator) * scale + 3 * scale
    causes = torch.randn(WIDTH, HEADS, generator=generator) / scale.unsqueeze(1)
    noise = torch.randn(TOKENS, HEADS, generator=generator)
    lengths = (0.2 * (normed - 3 * scale) @ causes + 0.3 * noise).exp()
    return normed, lengths * torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 1.0])


def held_recall(router: HeadRouter, activity: tuple[Tensor, Tensor], **choice: int) -> float:
    normed, norms = (part[-1024:] for part in activity)
    return recall(router.scores(normed), norms, **choice)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("choice", [{"units": 6, "slots": 3}, {"units": 3, "slots": 1}], ids=str)
def test_a_router_finds_what_the_input_tells(
    activity: tuple[Tensor, Tensor], method: Method, choice: dict[str, int]
) -> None:
    normed, norms = (part[:-1024] for part in activity)
    router = train_router(normed, norms, **choice, method=method)
    constant = HeadRouter(torch.zeros(WIDTH, HEADS), norms.log().mean(0))
    assert held_recall(router, activity, **choice) > 0.83
    assert held_recall(constant, activity, **choice) < 0.65
    # The lengths of other tokens teach nothing.
    shuffled = norms[torch.randperm(len(norms))]
    confused = train_router(normed, shuffled, **choice, method=method)
    assert held_recall(confused, activity, **choice) < 0.65


@pytest.mark.parametrize("method", METHODS)
def test_the_same_inputs_give_the_same_router(
    activity: tuple[Tensor, Tensor], method: Method
) -> None:
    torch.manual_seed(1)
    one = train_router(*activity, units=6, slots=3, method=method)
    torch.manual_seed(2)
    other = train_router(*activity, units=6, slots=3, method=method)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_a_regression_is_least_squares_of_log_lengths(activity: tuple[Tensor, Tensor]) -> None:
    normed, norms = activity
    router = train_router(normed, norms, units=6, slots=3)
    inputs = torch.cat((normed, torch.ones(TOKENS, 1)), dim=1).double()
    solution = torch.linalg.lstsq(inputs, norms.double().log()).solution
    wanted = inputs @ solution
    torch.testing.assert_close(router.scores(normed).double(), wanted, atol=2e-2, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_and_silent_heads_give_finite_routers(method: Method) -> None:
    normed, norms = torch.randn(64, 8), torch.rand(64, 4)
    normed[:, 3], norms[:, 2] = 1.5, 0
    router = train_router(normed, norms, units=4, slots=2, method=method)
    assert router.weight.isfinite().all()
    assert router.bias.isfinite().all()
    assert not active_heads(router.scores(normed), units=4, slots=2)[:, 2].any()
