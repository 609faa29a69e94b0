"""Routers of a whole model, and the sparse model, token by token against whole windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from edgeattn.attention import HeadSparse, HeadSparseRequest, Unit
from edgeattn.calibration.windows import token_windows
from edgeattn.errors import UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, load_decoder, load_layer, model_of
from edgeattn.models.stream import Prediction, embed_windows, perplexity, run_layer, window_inputs
from edgeattn.text_file import read_text
from edgeattn.transforms.head_router import HeadRouter, recall
from edgeattn.transforms.rotate import hadamard_rotations, rotate
from edgeattn.transforms.sparsify import (
    RoutedLayer,
    Routers,
    in_basis_of,
    sparsify,
    train_routers,
)
from edgeattn.verify.head_sparsity import by_oracle, by_routers, decoding_perplexity

HALF = HeadSparseRequest(Fraction(1, 2))


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> Model:
    """5 layers of 8 heads in 4 KV groups."""
    return model_of(open_checkpoint(stories260k))


@pytest.fixture(scope="module")
def novel(stories260k: Path, shared_dir: Path) -> Tensor:
    text = read_text(shared_dir / "data" / "austen" / "emma.txt")
    tokenizer = open_checkpoint(stories260k).text["tokenizer.json"]
    return token_windows(text, tokenizer, windows=32, length=128, vocab_size=512)


@pytest.fixture(scope="module")
def trained(stories: Model, novel: Tensor) -> Routers:
    return train_routers(stories, novel, HALF, dict.fromkeys(range(1, 5), 4))


@pytest.fixture
def tiny(random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint()))


def random_routers(model: Model, slots: dict[int, int], unit: Unit = "heads") -> Routers:
    shape = model.shape
    layers = {}
    for layer, count in slots.items():
        weight = torch.randn(shape.hidden_size, shape.num_heads)
        layers[layer] = RoutedLayer(HeadRouter(weight, torch.randn(shape.num_heads)), count, 0.5)
    groups = unit == "groups"
    return Routers(layers, shape.num_kv_heads if groups else shape.num_heads, groups)


@torch.inference_mode()
def decoded_loss(model: Model, ids: Tensor) -> float:
    """Mean loss of a window that the decoder reads token by token, one row at a time."""
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    losses = []
    for row in ids:
        past = decoder.empty_cache(1)
        for place in range(len(row) - 1):
            mask = torch.ones(1, place + 1, dtype=torch.int64)
            output = decoder(row[None, place, None], mask, torch.tensor([[place]]), past)
            past = output.present
            losses.append(-output.logits[0, -1].log_softmax(-1)[row[place + 1]])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("unit", "slots"), [("heads", {1: 3, 2: 1}), ("heads", {2: 2}), ("groups", {1: 1, 2: 1})]
)
def test_whole_windows_cost_what_decoding_costs(
    tiny: Model, unit: Unit, slots: dict[int, int]
) -> None:
    """The decoder runs the operator's reference; the whole window masks heads."""
    ids, routers = torch.randint(0, 272, (2, 14)), random_routers(tiny, slots, unit)
    whole = decoding_perplexity(tiny, ids, by_routers(routers))
    assert torch.tensor(whole).log().item() == pytest.approx(
        decoded_loss(sparsify(tiny, routers), ids), rel=1e-5
    )
    dense = decoding_perplexity(tiny, ids)
    assert torch.tensor(dense).log().item() == pytest.approx(decoded_loss(tiny, ids), rel=1e-5)
    assert dense != pytest.approx(whole, rel=1e-3)
    # One active head more is another function.
    more = {n: replace(routed, slots=routed.slots + 1) for n, routed in routers.layers.items()}
    other = decoding_perplexity(tiny, ids, by_routers(replace(routers, layers=more)))
    assert other != pytest.approx(whole, rel=1e-3)


def test_a_sparse_model_says_which_layers_are(tiny: Model) -> None:
    routers = random_routers(tiny, {2: 1}, "groups")
    sparse = sparsify(tiny, routers)
    kinds = [sparse.shape.layer_kind(layer).attention for layer in range(3)]
    assert kinds == [None, None, HeadSparse(slots=1, groups=True)]
    assert sparse.shape.layer_kind(2).rope == tiny.shape.layer_kind(2).rope
    assert set(sparse.tables) == {2}
    assert torch.equal(sparse.tables[2]["router_weight"], routers.layers[2].router.weight)
    assert torch.equal(sparse.tables[2]["router_bias"], routers.layers[2].router.bias)
    assert not tiny.tables


def test_routers_lose_less_than_heads_that_are_always_on(
    stories: Model, novel: Tensor, trained: Routers
) -> None:
    """And no less than the oracle; on windows that no router saw, for 4 of 8 heads."""
    train, judged = novel[:24], novel[24:]
    slots = dict.fromkeys(range(1, 5), 4)
    routers = train_routers(stories, train, HALF, slots)
    constant = {
        layer: replace(
            routed,
            router=HeadRouter(torch.zeros_like(routed.router.weight), usual(stories, train, layer)),
        )
        for layer, routed in routers.layers.items()
    }
    with_routers = decoding_perplexity(stories, judged, by_routers(routers))
    always = decoding_perplexity(stories, judged, by_routers(replace(routers, layers=constant)))
    oracle = decoding_perplexity(stories, judged, by_oracle(slots, 8))
    assert decoding_perplexity(stories, judged) < oracle < with_routers < 0.99 * always


@torch.inference_mode()
def usual(model: Model, windows: Tensor, layer: int) -> Tensor:
    """Mean log length of each head's output."""
    return norms_of(model, windows, layer)[1].log().mean((0, 1))


def norms_of(model: Model, windows: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Normed inputs and lengths of heads in a layer, `[N, L, …]`, all windows at once."""
    hidden = embed_windows(model, windows)
    shared = window_inputs(model.shape, windows.shape[1])[model.shape.layer_kind(0)]
    for before in range(index):
        run_layer(load_layer(model, before, weight_dtype=torch.float32), hidden, shared)
    layer = load_layer(model, index, weight_dtype=torch.float32)
    normed = layer.input_layernorm(hidden)
    past = layer.self_attn.no_past(len(hidden), hidden.dtype)
    mixed, _ = layer.self_attn.mix(normed, shared, past)
    return normed, mixed.unflatten(-1, layer.self_attn.heads).norm(dim=-1)


@torch.inference_mode()
def test_recall_is_on_windows_held_out(stories: Model, novel: Tensor, trained: Routers) -> None:
    """Of 32 windows every 8th, from the 5th on."""
    normed, norms = norms_of(stories, novel[4::8], 3)
    routed = trained.layers[3]
    found = recall(routed.router.scores(normed), norms, units=8, slots=4)
    assert routed.recall == pytest.approx(found, abs=2e-4)
    assert 0.6 < routed.recall < 1
    active = trained.active(3, normed)
    assert active is not None
    shares = active.double().mean(dim=(0, 1)).tolist()
    assert routed.active == pytest.approx(shares, abs=2e-3)


def test_a_classifier_finds_the_longest(stories: Model, novel: Tensor, trained: Routers) -> None:
    slots = {3: 4}
    (classified,) = train_routers(
        stories, novel, HALF, slots, method="classification"
    ).layers.values()
    assert classified.recall > trained.layers[3].recall - 0.05
    constant = HeadRouter(torch.zeros(64, 8), usual(stories, novel, 3))
    normed, norms = norms_of(stories, novel[4::8], 3)
    assert classified.recall > recall(constant.scores(normed), norms, units=8, slots=4) + 0.05


def test_held_out_windows_teach_nothing(stories: Model, novel: Tensor, trained: Routers) -> None:
    other = novel.clone()
    other[4::8] = other[4::8].flip(1)
    again = train_routers(stories, other, HALF, dict.fromkeys(range(1, 5), 4))
    for layer, routed in trained.layers.items():
        assert torch.equal(routed.router.weight, again.layers[layer].router.weight)
        assert routed.recall != again.layers[layer].recall


def test_finished_layers_are_not_trained_again(
    stories: Model, novel: Tensor, trained: Routers
) -> None:
    kept: list[int] = []
    slots = dict.fromkeys(range(1, 5), 4)
    finished = {layer: trained.layers[layer] for layer in (1, 2, 4)}
    again = train_routers(
        stories, novel, HALF, slots, finished=finished, on_layer=lambda n, _: kept.append(n)
    )
    assert kept == [3]
    assert list(again.layers) == [1, 2, 3, 4]
    assert torch.equal(again.layers[3].router.weight, trained.layers[3].router.weight)


def test_one_window_is_too_few(tiny: Model) -> None:
    with pytest.raises(UsageError, match="at least 2 windows"):
        train_routers(tiny, torch.zeros(1, 8, dtype=torch.int64), HALF, {1: 2})


@pytest.mark.parametrize("online", [False, True])
def test_routers_choose_the_same_heads_in_a_rotated_model(
    stories: Model, novel: Tensor, trained: Routers, online: bool
) -> None:
    rotated = rotate(stories, hadamard_rotations(stories.shape, online=online))
    moved = in_basis_of(trained, rotated, stories)
    ungained = replace(rotated, weights=stories.weights)  # as if no norm had been folded
    for layer, routed in moved.layers.items():
        before, after = (norms_of(m, novel, layer)[0] for m in (stories, rotated))
        expected = trained.layers[layer].router.scores(before)
        torch.testing.assert_close(routed.router.scores(after), expected, atol=1e-3, rtol=1e-3)
        for wrong in (trained, in_basis_of(trained, ungained, stories)):
            found = wrong.layers[layer].router.scores(after)
            assert (found - expected).abs().max() > 0.1
    same = in_basis_of(trained, stories, stories)
    for layer, routed in same.layers.items():
        assert torch.equal(routed.router.weight, trained.layers[layer].router.weight)


def test_training_judges_a_sparse_model_as_it_decodes(
    stories: Model, novel: Tensor, trained: Routers
) -> None:
    sparse, few = sparsify(stories, trained), novel[:2]
    expected = decoding_perplexity(stories, few, by_routers(trained))
    assert Prediction(sparse, few, training=True).perplexity() == pytest.approx(expected, rel=1e-4)
    assert perplexity(sparse, few) < 0.99 * expected  # whole windows, all heads
