"""Attention heads of a layer: watched without changing it, and left out as if o_proj had none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from edgeattn.calibration.heads import observe_heads, run_heads
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, load_layer, model_of
from edgeattn.models.stream import BATCH, embed_windows, run_layer, window_inputs

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
        "attn_logit_softcapping": 1.0,
    },
}
ROWS, LENGTH = BATCH + 2, 9


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint(**MODELS[request.param])))


@torch.inference_mode()
def passed(model: Model, run: Callable[..., Any], *, dropped: int | None = None) -> Tensor:
    """The stream behind layer 1, whose output projection may not read one head."""
    shape, hidden = model.shape, embed_windows(model, windows())
    layer = load_layer(model, 1, weight_dtype=torch.float32)
    if dropped is not None:
        columns = slice(dropped * shape.head_dim, (dropped + 1) * shape.head_dim)
        layer.self_attn.o_proj.weight[:, columns] = 0
    run(layer, hidden, window_inputs(shape, LENGTH)[shape.layer_kind(1)])
    return hidden


def windows() -> Tensor:
    return torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 272


def test_a_watched_layer_is_the_layer(model: Model) -> None:
    wanted = passed(model, run_layer)
    torch.testing.assert_close(passed(model, observe_heads), wanted)
    unchanged = passed(model, lambda *parts: run_heads(*parts, lambda normed, heads: None))
    torch.testing.assert_close(unchanged, wanted)


def test_a_head_that_is_not_active_gives_zeros(model: Model) -> None:
    heads = model.shape.num_heads

    def without_two(normed: Tensor, outputs: Tensor) -> Tensor:
        active = torch.ones(outputs.shape[:-1], dtype=torch.bool)
        active[..., 2] = False
        return active

    sparse = passed(model, lambda *parts: run_heads(*parts, without_two))
    torch.testing.assert_close(sparse, passed(model, run_layer, dropped=2))
    assert not torch.allclose(sparse, passed(model, run_layer, dropped=heads - 1), atol=1e-3)
    assert not torch.allclose(sparse, passed(model, run_layer), atol=1e-3)


@torch.inference_mode()
def test_what_a_router_learns_from(model: Model) -> None:
    """Every token in the order of the text, by hand for one of them."""
    shape, hidden = model.shape, embed_windows(model, windows())
    layer = load_layer(model, 1, weight_dtype=torch.float32)
    shared = window_inputs(shape, LENGTH)[shape.layer_kind(1)]
    row = hidden[BATCH + 1 : BATCH + 2].clone()
    normed = layer.input_layernorm(row)
    mixed, _ = layer.self_attn.mix(normed, shared, layer.self_attn.no_past(1, row.dtype))
    activity = observe_heads(layer, hidden, shared)
    assert activity.normed.shape == (ROWS * LENGTH, shape.hidden_size)
    assert activity.norms.shape == (ROWS * LENGTH, shape.num_heads)
    token = (BATCH + 1) * LENGTH + 3
    torch.testing.assert_close(activity.normed[token], normed[0, 3])
    for head in range(shape.num_heads):
        output = mixed[0, 3, head * shape.head_dim : (head + 1) * shape.head_dim]
        assert float(activity.norms[token, head]) == pytest.approx(
            float(output.square().sum().sqrt()), rel=1e-5
        )
