"""Regrouped heads: what must change nothing does not, and what is lost is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor
from wrapped_weights import changed

from edgeattn.attention import GroupQueryRequest
from edgeattn.errors import LoweringError, ProofError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, load_decoder, model_of
from edgeattn.planner.group_query import regrouped_shape
from edgeattn.transforms.head_alignment import (
    align,
    balanced_groups,
    distances,
    lost_by_pooling,
    moments_of,
    nearest_orthogonal,
    nearest_rotary,
)
from edgeattn.transforms.regroup import (
    LayerGroups,
    check_exact,
    choose_groups,
    observe_layers,
    regroup,
    regroup_on_text,
    stack_groups,
    unstack_groups,
)

TOLERANCE = 1e-5  # fp32
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": FOUR,
    "llama-heads-of-24": {**FOUR, "head_dim": 24, "tie_word_embeddings": False},
    "mistral-window": {**FOUR, "model_type": "mistral", "sliding_window": 4},
    "qwen2-biases": {**FOUR, "model_type": "qwen2"},
    "qwen3-norms": {**FOUR, "model_type": "qwen3"},
    "smollm3-without-rope": {**FOUR, "model_type": "smollm3", "num_hidden_layers": 5},
    "phi3-partial-rotary": {
        **FOUR,
        "model_type": "phi3",
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
    },
    "gemma2-softcap": {
        **FOUR,
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
    },
}


@pytest.fixture
def model_named(random_checkpoint: Callable[..., Path]) -> Callable[[str], Model]:
    """A function from a name in `MODELS` to the model."""
    return lambda name: model_of(open_checkpoint(random_checkpoint(**MODELS[name])))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (4, 23))


@torch.inference_mode()
def logits(model: Model, windows: Tensor) -> Tensor:
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    mask, places = torch.ones_like(windows), torch.arange(windows.shape[1]).expand_as(windows)
    found: Tensor = decoder(windows, mask, places, decoder.empty_cache(len(windows))).logits
    return found


def difference(one: Model, other: Model, windows: Tensor) -> float:
    """Largest of any logit, in units of their root mean square."""
    expected, found = logits(one, windows), logits(other, windows)
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


def chosen(model: Model, windows: Tensor, kv_heads: int) -> list[LayerGroups]:
    observed = observe_layers(model, windows)
    return [
        choose_groups(layer, model.shape, model.shape.layer_kind(index), kv_heads)
        for index, layer in enumerate(observed)
    ]


def interleaved(layer: LayerGroups) -> LayerGroups:
    """KV heads 0 and 2, and 1 and 3, whatever was chosen: an order that is none of neighbours."""
    members = torch.tensor([[0, 2], [1, 3]])
    per_head = layer.queries.numel() // members.numel()
    queries = members.unsqueeze(2) * per_head + torch.arange(per_head)
    return replace(layer, members=members, queries=queries.flatten(1))


@pytest.mark.parametrize("name", MODELS)
def test_alignment_and_order_change_nothing(
    model_named: Callable[[str], Model], windows: Tensor, name: str
) -> None:
    model = model_named(name)
    layers = [interleaved(layer) for layer in chosen(model, windows, 2)]
    aligned = regroup(model, [layer.apart() for layer in layers])
    assert aligned.shape == model.shape
    assert not torch.equal(
        aligned.weights.read("layers.0.self_attn.v_proj.weight"),
        model.weights.read("layers.0.self_attn.v_proj.weight"),
    )
    assert difference(model, aligned, windows) < TOLERANCE
    assert difference(model, regroup(model, layers), windows) > 100 * TOLERANCE


def test_keys_behind_a_norm_stay_as_they_are(
    model_named: Callable[[str], Model], windows: Tensor
) -> None:
    model = model_named("qwen3-norms")
    for layer in chosen(model, windows, 2):
        assert torch.equal(layer.keys, torch.eye(16, dtype=torch.float64).expand(4, 16, 16))


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-biases", "qwen3-norms"])
@pytest.mark.parametrize("kv_heads", [8])
def test_copies_change_nothing(
    model_named: Callable[[str], Model], windows: Tensor, name: str, kv_heads: int
) -> None:
    model = model_named(name)
    more = regroup(model, chosen(model, windows, kv_heads))
    assert more.shape.num_kv_heads == kv_heads
    assert difference(model, more, windows) < TOLERANCE


def test_one_kv_head_becomes_several(
    random_checkpoint: Callable[..., Path], windows: Tensor
) -> None:
    path = random_checkpoint(num_attention_heads=6, num_key_value_heads=1, hidden_size=96)
    model = model_of(open_checkpoint(path))
    for kv_heads in (2, 3, 6):
        more = regroup(model, chosen(model, windows, kv_heads))
        assert difference(model, more, windows) < TOLERANCE


def twins(model: Model) -> Model:
    """KV heads 2 and 3 become turned copies of 1 and 0, and their query heads go with them.

    Keys are turned by one angle for each frequency, values by any orthogonal map, so that averaging
    the right pairs loses nothing, and other pairs, or no alignment, would lose much.
    """
    width = model.shape.head_dim
    angle = torch.rand(width // 2, dtype=torch.float64) * 6
    turn = torch.zeros(width, width, dtype=torch.float64)
    i = torch.arange(width // 2)
    turn[i, i] = turn[i + width // 2, i + width // 2] = angle.cos()
    turn[i + width // 2, i] = angle.sin()
    turn[i, i + width // 2] = -angle.sin()
    maps = {"k": turn, "v": torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q}

    def copied(name: str, value: Tensor) -> Tensor:
        for part, map_ in maps.items():
            if f"{part}_proj" in name:
                heads = value.double().reshape(4, width, -1)
                heads = torch.stack([heads[0], heads[1], map_ @ heads[1], map_ @ heads[0]])
                return heads.reshape(value.shape).float()
        return value

    return changed(model, copied)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-biases"])
def test_turned_copies_are_found_and_averaged_without_loss(
    model_named: Callable[[str], Model], windows: Tensor, name: str
) -> None:
    model = twins(model_named(name))
    layers = chosen(model, windows, 2)
    assert [layer.members.tolist() for layer in layers] == [[[0, 3], [1, 2]]] * 3
    assert all(max(layer.key_loss, layer.value_loss) < 1e-9 for layer in layers)
    merged = regroup(model, layers)
    assert merged.shape.num_kv_heads == 2
    assert difference(model, merged, windows) < TOLERANCE


def test_a_map_of_keys_that_does_not_commute_with_rope_is_caught(
    model_named: Callable[[str], Model], windows: Tensor
) -> None:
    """Any orthogonal map would bring keys closer, and change the model."""
    model = model_named("llama-tied")
    wrong = []
    for layer, seen in zip(chosen(model, windows, 2), observe_layers(model, windows), strict=True):
        keys = torch.stack([nearest_orthogonal(seen.keys[0, j]) for j in range(4)])
        wrong.append(replace(layer, keys=keys).apart())
    assert difference(model, regroup(model, wrong), windows) > 100 * TOLERANCE


def test_fewer_query_heads_are_the_most_important(
    model_named: Callable[[str], Model], windows: Tensor
) -> None:
    """Heads that add nothing go first, and cost nothing."""
    model = model_named("llama-tied")
    silent = [1, 2, 4, 7]  # one of each KV head's two

    def muted(name: str, value: Tensor) -> Tensor:
        if "o_proj" not in name:
            return value
        heads = torch.unflatten(value, 1, (8, 16)).clone()
        heads[:, silent] = 0
        return heads.flatten(1)

    model = changed(model, muted)
    shape = regrouped_shape(model.shape, GroupQueryRequest(heads=4))
    layers, report = regroup_on_text(model, windows, shape)
    assert [layer.queries.flatten().tolist() for layer in layers] == [[0, 3, 5, 6]] * 3
    fewer = regroup(model, layers)
    assert (fewer.shape.num_heads, fewer.shape.num_kv_heads) == (4, 4)
    assert difference(model, fewer, windows) < TOLERANCE
    assert report.fewer_heads == pytest.approx(report.before, rel=1e-5)


def test_each_step_is_measured(model_named: Callable[[str], Model], windows: Tensor) -> None:
    model = model_named("llama-tied")
    shape = regrouped_shape(model.shape, GroupQueryRequest(kv_heads=1, heads=6))
    layers, report = regroup_on_text(model, windows, shape)
    assert report.aligned == pytest.approx(report.before, rel=1e-5)
    assert report.averaged != pytest.approx(report.before, rel=1e-3)
    assert report.after == report.fewer_heads
    again = unstack_groups(stack_groups(layers))
    assert difference(regroup(model, layers), regroup(model, again), windows) == 0


@pytest.mark.parametrize("after", [10.001, float("nan"), 9.999])
def test_a_step_that_should_be_exact_and_is_not_is_refused(after: float) -> None:
    with pytest.raises(ProofError, match="perplexity of 10"):
        check_exact(10.0, after)
    check_exact(10.0, 10.00005)


def test_groups_have_the_least_cost_of_all() -> None:
    cost = torch.rand(6, 6, dtype=torch.float64)
    cost = cost + cost.T
    near = [(0, 3), (1, 5), (2, 4)]
    for i, j in near:
        cost[i, j] = cost[j, i] = 0.01
    assert balanced_groups(cost, 3) == [list(pair) for pair in near]


def test_aligning_three_heads_finds_the_turns_between_them() -> None:
    x = torch.randn(500, 1, 8, dtype=torch.float64) * torch.linspace(1, 2, 8)
    turns = torch.linalg.qr(torch.randn(3, 8, 8, dtype=torch.float64)).Q
    moments = moments_of((turns @ x.unsqueeze(-1)).squeeze(-1))
    maps = align(moments, nearest_orthogonal)
    assert lost_by_pooling(moments, maps) < 1e-12
    assert lost_by_pooling(moments, torch.eye(8).double().repeat(3, 1, 1)) > 0.3
    torch.testing.assert_close(maps @ turns, turns[:1].expand(3, -1, -1))
    assert float(distances(moments, nearest_orthogonal).abs().max()) < 1e-9


@pytest.mark.parametrize("rotated", [0, 4, 8])
def test_rotary_maps_commute_with_rope(rotated: int) -> None:
    from edgeattn.models.rotary import apply_rotary

    found = nearest_rotary(rotated)(torch.randn(8, 8, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, torch.eye(8, dtype=torch.float64))
    x, angle = torch.randn(1, 1, 5, 8, dtype=torch.float64), torch.rand(5, rotated // 2).double()
    cos, sin = angle.cos(), angle.sin()
    torch.testing.assert_close(
        apply_rotary(x, cos, sin) @ found.T, apply_rotary(x @ found.T, cos, sin)
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (GroupQueryRequest(kv_heads=3), "kv_heads=1 or 2 or 4 or 8"),
        (GroupQueryRequest(kv_heads=16), "divides"),
        (GroupQueryRequest(kv_heads=2, heads=5), "divides"),
        (GroupQueryRequest(heads=6), "makes 6 on 4"),
        (GroupQueryRequest(heads=9), "at most 8 query heads"),
        (GroupQueryRequest(kv_heads=4), "already"),
        (GroupQueryRequest(kv_heads=4, heads=8), "already"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    model_named: Callable[[str], Model], request_: GroupQueryRequest, words: str
) -> None:
    with pytest.raises(LoweringError, match=words) as caught:
        regrouped_shape(model_named("llama-tied").shape, request_)
    assert "\n" not in str(caught.value)
