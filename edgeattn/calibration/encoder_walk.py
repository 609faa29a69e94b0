"""One layer of an encoder over all calibration windows, as `LayerWalk` for decoders."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgeattn.calibration.walk import STAGES, Stages
from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.encoder import EncoderLayer, Rotary
from edgeattn.models.linear import linear_of
from edgeattn.models.stream import batches


class EncoderWalk:
    """Runs a layer stage by stage, so that a stage can be changed before the next one reads it.

    To be used in torch's inference mode. For each stage the layer runs anew, up to the linear
    layers that are asked for: whatever stands between them, that is what they read.

    Args:
        layer: whose weights the caller may change between stages.
        hidden: the residual stream before it, `[N, L, hidden]`; becomes the one behind it.
        rotary: cosine and sine of the places; None for a layer without.
        stages: of `encoder_stages`.
    """

    def __init__(
        self, layer: EncoderLayer, hidden: Tensor, rotary: Rotary | None, stages: Stages
    ) -> None:
        self._layer, self._hidden, self._rotary, self._stages = layer, hidden, rotary, stages

    def inputs(self, stage: int) -> Iterator[Tensor]:
        """The input of the linear layers of a stage, `[n, L, K]` for a few windows each."""
        linear = linear_of(self._layer, self._stages[stage][0])
        for rows in batches(self._hidden):
            yield self._input(linear, rows)

    def run(self) -> None:
        """Passes through the whole layer."""
        for rows in batches(self._hidden):
            rows.copy_(self._layer(rows, None, self._rotary))

    def finish(self) -> None:
        """The same, once every stage was asked for."""
        self.run()

    def _input(self, linear: nn.Module, rows: Tensor) -> Tensor:
        handle = linear.register_forward_pre_hook(_stop)
        try:
            self._layer(rows, None, self._rotary)
        except _Reached as reached:
            return reached.input
        finally:
            handle.remove()
        raise AssertionError("the layer does not run this part of it")


def encoder_stages(shape: EncoderShape) -> Stages:
    """Those of a decoder, as far as an encoder has their linear layers."""
    names = shape.linears()
    return tuple(tuple(name for name in stage if name in names) for stage in STAGES)


class _Reached(Exception):
    """Ends a pass through a layer where it is not needed further."""

    def __init__(self, input: Tensor) -> None:
        self.input = input


def _stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(inputs[0])
