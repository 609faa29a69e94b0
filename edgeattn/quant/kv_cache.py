"""How a layer holds the keys and values of earlier tokens as int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeattn.quant.activation import int8_steps
from edgeattn.quant.hadamard import HadamardFactors, transform


@dataclass(frozen=True, eq=False)
class Int8Cache:
    """A static int8 format, one scale for all keys of the layer and one for all values.

    Attributes:
        key_scale: of rotated keys.
        value_scale: of values.
        rotation: R3 of SpinQuant, applied to queries and keys behind the rotary positions: scores
            are as before, while no channel of the keys stands out. None leaves both as they are.
    """

    key_scale: float
    value_scale: float
    rotation: HadamardFactors | None = None

    @property
    def scales(self) -> tuple[float, float]:
        """Of keys and of values."""
        return self.key_scale, self.value_scale

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys, `[B, heads, T, D]`, as the scores see them."""
        return x if self.rotation is None else transform(x, self.rotation)


def to_int8(x: Tensor, scale: float) -> Tensor:
    """QuantizeLinear(x, scale) of ONNX with zero point 0, int8."""
    return int8_steps(x, scale).to(torch.int8)
