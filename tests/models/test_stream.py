"""A model run layer by layer gives what the whole decoder gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor
from wrapped_weights import CountedWeights, changed

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.families import FINAL_NORM, parameter_names
from edgeattn.models.model import Model, load_decoder, load_layer, model_of
from edgeattn.models.stream import (
    BATCH,
    Head,
    Prediction,
    batches,
    embed_windows,
    final_hidden,
    run_layer,
    window_inputs,
)
from edgeattn.quant.scheme import parse_scheme
from edgeattn.transforms.quantize import quantize
from edgeattn.transforms.rotate import hadamard_rotations, rotate

# Families with something of their own on the way: windows, layers without positions, softcaps.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 5,
        "sliding_window": 4,
        "sliding_window_pattern": 3,
    },
}
TOLERANCE = 1e-5


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint(**MODELS[request.param])))


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (BATCH + 1, 15))  # a full batch of windows, and a rest


def whole(model: Model) -> Decoder:
    return load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)


@torch.inference_mode()
def run_whole(decoder: Decoder, windows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and the residual stream before and behind each layer."""
    rows, length = windows.shape
    positions = torch.arange(length).expand(rows, -1)
    output = decoder(windows, torch.ones_like(windows), positions, decoder.empty_cache(rows))
    return output.logits, output.hidden


def test_layer_by_layer_equals_the_decoder(model: Model, windows: Tensor) -> None:
    logits, hidden = run_whole(whole(model), windows)
    stream = embed_windows(model, windows)
    torch.testing.assert_close(stream, hidden[0])
    shared = window_inputs(model.shape, windows.shape[1])
    for index in range(model.shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        run_layer(layer, stream, shared[model.shape.layer_kind(index)])
        torch.testing.assert_close(stream, hidden[index + 1], atol=TOLERANCE, rtol=1e-5)
    torch.testing.assert_close(Head(model).logits(stream), logits, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("quant", ["w8-rtn", "w4-rtn:group=32"])
def test_quantised_and_rotated_models_too(llama: Model, windows: Tensor, quant: str) -> None:
    rotated = rotate(llama, hadamard_rotations(llama.shape, online=True))
    reads = {
        name: replace(read, scale=0.02 * (i + 1))
        for i, (name, read) in enumerate(rotated.reads.items())
    }
    scheme = parse_scheme(quant)
    model = replace(quantize(rotated, scheme, scale_dtype=torch.float32), reads=reads)
    logits, _ = run_whole(whole(model), windows)
    found = Head(model).logits(final_hidden(model, windows))
    # A number on the other side of a boundary is a step further on.
    assert (found - logits).abs().mean() < 1e-3 * logits.abs().mean()
    other = Head(llama).logits(final_hidden(llama, windows))
    assert (found - other).abs().mean() > 1e-2 * logits.abs().mean()


def test_rows_do_not_influence_each_other(model: Model, windows: Tensor) -> None:
    together = final_hidden(model, windows)
    for row, ids in enumerate(windows):
        alone = final_hidden(model, ids.unsqueeze(0))[0]
        torch.testing.assert_close(together[row], alone, atol=TOLERANCE, rtol=1e-5)


def test_losses_are_the_mean_cross_entropies_of_the_next_token(
    model: Model, windows: Tensor
) -> None:
    logits, _ = run_whole(whole(model), windows)
    found = Head(model).losses(final_hidden(model, windows), windows)
    for row, ids in enumerate(windows.tolist()):
        likely = logits[row].double().log_softmax(-1)
        losses = [-float(likely[place, token]) for place, token in enumerate(ids[1:])]
        assert float(found[row]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_divergence_is_from_the_original_by_its_definition(llama: Model, windows: Tensor) -> None:
    """KL(original || other), in fp64; the other way round is another number."""
    other = changed(llama, lambda name, value: value * 3 if name == FINAL_NORM else value)
    p, q = (
        run_whole(whole(found), windows)[0][:, :-1].double().log_softmax(-1)
        for found in (llama, other)
    )
    original = Prediction(llama, windows)
    found = Prediction(other, windows).divergence(original)
    wanted, reverse = (float((a.exp() * (a - b)).sum(-1).mean()) for a, b in ((p, q), (q, p)))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert abs(reverse - wanted) > 0.01 * wanted
    assert original.divergence(original) == 0


def test_what_is_no_number_is_infinitely_far(llama: Model, windows: Tensor) -> None:
    huge = changed(llama, lambda n, v: v * 1e38 if n.endswith("up_proj.weight") else v)
    found = Prediction(huge, windows)
    assert found.perplexity() == found.divergence(Prediction(llama, windows)) == math.inf


def test_a_layer_changes_the_stream_in_place(llama: Model, windows: Tensor) -> None:
    stream = embed_windows(llama, windows)
    before, place = stream.clone(), stream.data_ptr()
    layer = load_layer(llama, 0, weight_dtype=torch.float32)
    shared = window_inputs(llama.shape, windows.shape[1])
    run_layer(layer, stream, shared[llama.shape.layer_kind(0)])
    assert stream.data_ptr() == place
    assert not torch.equal(stream, before)


def test_batches_are_views_of_a_few_windows_each() -> None:
    stream = torch.zeros(2 * BATCH + 1, 3, 5)
    rows = list(batches(stream))
    assert [len(part) for part in rows] == [BATCH, BATCH, 1]
    rows[1] += 1
    assert stream[BATCH : 2 * BATCH].min() == 1
    assert stream.sum() == rows[1].numel()


def test_progress_counts_layers(llama: Model, windows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    final_hidden(llama, windows, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_every_weight_is_read_once_and_layer_by_layer(
    random_checkpoint: Callable[..., Path], windows: Tensor
) -> None:
    path = random_checkpoint(tie_word_embeddings=False)
    model = model_of(open_checkpoint(path))
    counted = CountedWeights(model.weights)
    watched = replace(model, weights=counted)
    hidden = final_hidden(watched, windows)
    Head(watched).logits(hidden)
    assert counted.seen == list(parameter_names(model.shape))
