"""What happens to the input of a linear layer before the product: a rotation, rounding to int8."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgeattn.quant.hadamard import HadamardFactors, transform

INT8_LOW, INT8_HIGH = -128, 127


@dataclass(frozen=True, eq=False)
class LinearInput:
    """How a linear layer reads its input; by default as it is.

    Attributes:
        rotation: the online rotation R4 (SpinQuant), first; the weights hold its inverse.
        scale: of static int8 activations, one for the whole tensor; None keeps floating point.
    """

    rotation: HadamardFactors | None = None
    scale: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., K]` -> `[..., K]`, the numbers the product sees (QDQ of ONNX when rounded)."""
        if self.rotation is not None:
            x = transform(x, self.rotation)
        return x if self.scale is None else round_to_int8(x, self.scale)


AS_IT_IS = LinearInput()


def round_to_int8(x: Tensor, scale: float) -> Tensor:
    """DequantizeLinear(QuantizeLinear(x, scale)) of ONNX with int8 and zero point 0."""
    return int8_steps(x, scale).mul_(scale)


def int8_steps(x: Tensor, scale: float) -> Tensor:
    """QuantizeLinear(x, scale) of ONNX with zero point 0: the integers, in the dtype of x."""
    return (x / scale).round_().clamp_(INT8_LOW, INT8_HIGH)
