"""How many heads are active by layer: the costs against a layer run with those heads alone."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.attention import Densities, HeadSparseRequest, Unit
from edgeattn.calibration.heads import run_heads
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, load_layer, model_of
from edgeattn.models.stream import embed_windows, run_layer, window_inputs
from edgeattn.transforms.head_density import cheapest_slots, layer_slots, sparsity_costs


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    """3 layers of 4 heads in 2 KV groups."""
    return model_of(open_checkpoint(tiny_checkpoint))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (6, 10))


@pytest.mark.parametrize(
    ("density", "unit", "slots"),
    [
        (Fraction(3, 4), "heads", 3),
        (Fraction("0.74"), "heads", 2),
        (Fraction(1, 4), "heads", 1),
        (Fraction(3, 4), "groups", 1),
    ],
)
def test_uniform_slots_are_the_floor(
    model: Model, windows: Tensor, density: Fraction, unit: Unit, slots: int
) -> None:
    assert layer_slots(model, HeadSparseRequest(density, unit), windows) == {1: slots, 2: slots}


@pytest.mark.parametrize("layers", ["uniform", "importance"])
def test_full_density_needs_no_router(model: Model, windows: Tensor, layers: Densities) -> None:
    assert layer_slots(model, HeadSparseRequest(Fraction(1), layers=layers), windows) == {}


def test_importance_gives_as_many_slots_in_all(model: Model, windows: Tensor) -> None:
    done: list[tuple[int, int]] = []
    request = HeadSparseRequest(Fraction(1, 2), layers="importance")
    slots = layer_slots(model, request, windows, progress=lambda *counts: done.append(counts))
    assert sum(slots.get(layer, 4) for layer in (1, 2)) == 4
    assert done == [(1, 3), (2, 3), (3, 3)]


@torch.inference_mode()
def test_a_cost_is_how_far_the_stream_moves(model: Model, windows: Tensor) -> None:
    """With one group alone in layer 1, whose MLP does nothing."""
    costs = sparsity_costs(model, 2, windows)
    hidden = embed_windows(model, windows)
    shared = window_inputs(model.shape, 10)[model.shape.layer_kind(0)]
    run_layer(load_layer(model, 0, weight_dtype=torch.float32), hidden, shared)
    layer = load_layer(model, 1, weight_dtype=torch.float32)
    layer.mlp.down_proj.weight.zero_()
    dense, sparse = hidden.clone(), hidden.clone()
    run_layer(layer, dense, shared)

    def longest(normed: Tensor, heads: Tensor) -> Tensor:
        norms = heads.square().sum(-1)
        is_first = norms[..., :2].amax(-1) > norms[..., 2:].amax(-1)
        return torch.stack((is_first, is_first, ~is_first, ~is_first), dim=-1)

    run_heads(layer, sparse, shared, longest)
    moved = ((sparse - dense).norm(dim=-1) / hidden.norm(dim=-1)).mean()
    assert costs[1][1] == pytest.approx(float(moved) ** 2, rel=1e-4)
    assert [len(of_layer) for of_layer in costs] == [3, 3, 3]
    assert all(of_layer[0] > of_layer[1] > of_layer[2] == 0 for of_layer in costs)


@given(
    st.lists(st.lists(st.integers(1, 50), min_size=4, max_size=4), min_size=2, max_size=3),
    st.data(),
)
def test_greed_finds_the_best_where_each_head_more_is_worth_less(
    worths: list[list[int]], data: st.DataObject
) -> None:
    """Convex costs, which are the sum of what the missing heads are worth."""
    total = data.draw(st.integers(len(worths), 4 * len(worths)))
    costs = {}
    for layer, worth in enumerate(worths):
        ordered = sorted(worth, reverse=True)
        costs[layer] = [float(sum(ordered[active:])) for active in range(5)]
    slots = cheapest_slots(costs, total)
    choices = itertools.product(range(1, 5), repeat=len(worths))
    best = min(
        sum(costs[layer][count] for layer, count in enumerate(choice))
        for choice in choices
        if sum(choice) == total
    )
    assert sum(slots.values()) == total
    assert sum(costs[layer][count] for layer, count in slots.items()) == best


def test_no_layer_falls_below_the_floor() -> None:
    costs = {0: [0.0] * 11, 1: [float(10 - n) for n in range(11)]}
    assert cheapest_slots(costs, 12) == {0: 2, 1: 10}
    # A density below the floor is what was asked for.
    assert cheapest_slots(costs, 2) == {0: 1, 1: 1}
