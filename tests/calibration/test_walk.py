"""A layer run stage by stage: unchanged it is the layer, changed it shows what it then gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from edgeattn.calibration.walk import STAGES, LayerWalk
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.linear import Linear, linear_of
from edgeattn.models.model import Model, load_layer, model_of
from edgeattn.models.stream import BATCH, embed_windows, run_layer, window_inputs
from edgeattn.quant.activation import LinearInput
from edgeattn.transforms.rotate import hadamard_rotations, rotate

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
        "attn_logit_softcapping": 1.0,
    },
}
LENGTH = 11


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint(**MODELS[request.param])))


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


class Setting:
    """Layer 1 of a model before some windows, with fresh copies of all that changes."""

    def __init__(self, model: Model) -> None:
        self.shape = model.shape
        self.hidden = embed_windows(model, torch.randint(0, 272, (BATCH + 2, LENGTH)))
        self.shared = window_inputs(model.shape, LENGTH)[model.shape.layer_kind(1)]
        self._model = model

    def layer(self) -> DecoderLayer:
        return load_layer(self._model, 1, weight_dtype=torch.float32)

    def behind(self, layer: DecoderLayer) -> Tensor:
        """The stream behind the layer, the usual way."""
        stream = self.hidden.clone()
        run_layer(layer, stream, self.shared)
        return stream

    def walk(
        self, layer: DecoderLayer, change: Callable[[int], None] = lambda stage: None
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs of every stage, and the stream behind; `change` comes after each stage."""
        stream, found = self.hidden.clone(), []
        walk = LayerWalk(layer, stream, self.shared, self.shape)
        for stage in range(len(STAGES)):
            found.append(torch.cat([inputs.clone() for inputs in walk.inputs(stage)]))
            change(stage)
        walk.finish()
        return found, stream

    def captured(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """The inputs of every linear layer, by hooks."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(part: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                found[name] = arguments[0]

            return hook

        for name, part in layer.named_modules():
            if isinstance(part, Linear):
                part.register_forward_pre_hook(keep(name))
        past = layer.self_attn.no_past(len(self.hidden), torch.float32)
        layer(self.hidden.clone(), self.shared, past)
        return found


def test_the_stages_are_all_linear_layers(llama: Model) -> None:
    assert [name for names in STAGES for name in names] == list(llama.shape.linears())


@torch.inference_mode()
def test_an_unchanged_layer_gives_exactly_what_it_gives(model: Model) -> None:
    setting = Setting(model)
    expected = setting.behind(setting.layer())
    _, found = setting.walk(setting.layer())
    assert torch.equal(found, expected)
    assert not torch.equal(found, setting.hidden)


@torch.inference_mode()
def test_inputs_are_those_of_the_linear_layers(model: Model) -> None:
    setting = Setting(model)
    captured = setting.captured(setting.layer())
    inputs, _ = setting.walk(setting.layer())
    for found, names in zip(inputs, STAGES, strict=True):
        for name in names:
            torch.testing.assert_close(found, captured[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", range(4))
@torch.inference_mode()
def test_later_stages_feel_what_was_changed_and_earlier_ones_do_not(
    model: Model, stage: int
) -> None:
    setting = Setting(model)
    plain, _ = setting.walk(setting.layer())
    layer = setting.layer()

    def change(after: int) -> None:
        if after == stage:
            for name in STAGES[stage]:
                linear_of(layer, name).weight.mul_(1.5)

    inputs, stream = setting.walk(layer, change)
    for number, (found, before) in enumerate(zip(inputs, plain, strict=True)):
        assert torch.equal(found, before) == (number <= stage)
    assert torch.equal(stream, setting.behind(layer)), "as the changed layer gives it"


@torch.inference_mode()
def test_roundings_of_inputs_are_felt_too(llama: Model) -> None:
    """Inputs are shown as they come, before rotation and rounding."""
    rotated = rotate(llama, hadamard_rotations(llama.shape, online=True))
    setting = Setting(rotated)
    layer = setting.layer()

    def change(after: int) -> None:
        for name in STAGES[after]:
            part = linear_of(layer, name)
            part.reads = LinearInput(part.reads.rotation, scale=0.05)

    inputs, stream = setting.walk(layer, change)
    assert linear_of(layer, "mlp.down_proj").reads.rotation is not None
    assert torch.equal(stream, setting.behind(layer))
    captured = setting.captured(layer)
    for found, names in zip(inputs, STAGES, strict=True):
        # A number near a boundary may be rounded to the other side in another batch.
        difference = (found - captured[names[0]]).abs()
        assert difference.mean() < 1e-3 * found.abs().mean()


@torch.inference_mode()
def test_a_few_windows_come_at_once(llama: Model) -> None:
    setting = Setting(llama)
    walk = LayerWalk(setting.layer(), setting.hidden, setting.shared, setting.shape)
    for stage, names in enumerate(STAGES):
        sizes = [tuple(inputs.shape) for inputs in walk.inputs(stage)]
        width = setting.shape.linears()[names[0]][1]
        assert sizes == [(BATCH, LENGTH, width), (2, LENGTH, width)]
    walk.finish()
