"""A decoder or an encoder as quantising on windows walks through it, one layer after the other."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from edgeattn.calibration.encoder_walk import EncoderWalk, encoder_stages
from edgeattn.calibration.walk import STAGES, LayerWalk, Stages
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.encoder import EncoderLayer
from edgeattn.models.encoder_model import (
    EncoderModel,
    embed_inputs,
    load_encoder_layer,
    window_rotary,
)
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.model import Model, ModelWeights, load_layer
from edgeattn.models.stream import embed_windows, window_inputs
from edgeattn.shape import LayerKind


class Walk(Protocol):
    """A layer over all windows; see `LayerWalk`, whose words these are."""

    def inputs(self, stage: int) -> Iterator[Tensor]:
        """What the linear layers of a stage read."""
        ...

    def run(self) -> None:
        """Passes through the whole layer at once."""
        ...

    def finish(self) -> None:
        """Passes behind the layer, once every stage was asked for."""
        ...


class Network(Protocol):
    """A model and the windows that pass through it."""

    @property
    def stages(self) -> Stages:
        """Linear layers of a block that read the same input, in the order they run."""
        ...

    def embedded(self, weights: ModelWeights) -> Tensor:
        """The residual stream before layer 0, `[N, L, hidden]` fp32, with tables of `weights`."""
        ...

    def layer(self, index: int) -> nn.Module:
        """A block with its weights, in fp32."""
        ...

    def walk(self, layer: nn.Module, index: int, hidden: Tensor) -> Walk:
        """The walk of all windows through a block of `layer`, from `hidden`, which it changes."""
        ...


def network_of(model: Model | EncoderModel, windows: Tensor) -> Network:
    """How to walk through a model.

    Args:
        model: any.
        windows: token ids `[N, L]`, or pixels `[N, C, height, width]`.
    """
    if isinstance(model, EncoderModel):
        return _EncoderNetwork(model, windows)
    return _DecoderNetwork(model, windows)


@dataclass(frozen=True)
class _DecoderNetwork:
    model: Model
    windows: Tensor
    stages: Stages = STAGES

    def embedded(self, weights: ModelWeights) -> Tensor:
        return embed_windows(replace(self.model, weights=weights), self.windows)

    def layer(self, index: int) -> DecoderLayer:
        return load_layer(self.model, index, weight_dtype=torch.float32)

    def walk(self, layer: nn.Module, index: int, hidden: Tensor) -> LayerWalk:
        assert isinstance(layer, DecoderLayer)
        shape = self.model.shape
        return LayerWalk(layer, hidden, self._shared[shape.layer_kind(index)], shape)

    @functools.cached_property
    def _shared(self) -> dict[LayerKind, LayerInputs]:
        return window_inputs(self.model.shape, self.windows.shape[1])


@dataclass(frozen=True)
class _EncoderNetwork:
    model: EncoderModel
    windows: Tensor

    @property
    def stages(self) -> Stages:
        return encoder_stages(self.model.shape)

    def embedded(self, weights: ModelWeights) -> Tensor:
        return embed_inputs(replace(self.model, weights=weights), self.windows)

    def layer(self, index: int) -> EncoderLayer:
        return load_encoder_layer(self.model, index)

    def walk(self, layer: nn.Module, index: int, hidden: Tensor) -> EncoderWalk:
        assert isinstance(layer, EncoderLayer)
        rope = self.model.shape.layer_kind(index).rope
        rotary = None if rope is None else window_rotary(rope, hidden.shape[1])
        return EncoderWalk(layer, hidden, rotary, self.stages)
