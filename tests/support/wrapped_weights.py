"""Weights of a model as a test wants them: changed as they are read, or counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from edgeattn.calibration.walk import STAGES
from edgeattn.models.families import FINAL_NORM
from edgeattn.models.model import Model, ModelWeights
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat

_READERS = (*STAGES[0], *STAGES[2])


@dataclass(frozen=True)
class ChangedWeights:
    """Weights with some of them replaced as they are read."""

    source: ModelWeights
    change: Callable[[str, Tensor], Tensor]

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = self.source.read(name)
        assert isinstance(value, Tensor)
        return self.change(name, value)


def changed(model: Model, change: Callable[[str, Tensor], Tensor]) -> Model:
    """The model with weights that `change` makes of their names and values."""
    return replace(model, weights=ChangedWeights(model.weights, change))


_OUTLIERS = [3, 20, 41]


def with_outlier_channels(model: Model, *, of: str = "inputs") -> Model:
    """The model with a few channels of the residual stream much larger than the others.

    Args:
        model: whose layers write to the stream as it is.
        of: "inputs" of the layers that read it; or their "weights", with the inputs smaller by as
            much, so that the function is the same.
    """

    def planted(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        if name.endswith("layernorm.weight") and name != FINAL_NORM:
            value[_OUTLIERS] *= 12 if of == "inputs" else 1 / 12
        elif of == "weights" and name.removesuffix(".weight").endswith(_READERS):
            value[:, _OUTLIERS] *= 12
        return value

    return changed(model, planted)


@dataclass(frozen=True)
class CountedWeights:
    """Weights that note what is read."""

    source: ModelWeights
    seen: list[str] = field(default_factory=list)

    def format(self, name: str) -> WeightFormat | None:
        return self.source.format(name)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        self.seen.append(name)
        return self.source.read(name)
