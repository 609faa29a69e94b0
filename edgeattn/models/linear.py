"""The linear layer of all blocks."""

from __future__ import annotations

from torch import Tensor, nn

from edgeattn.quant.activation import AS_IT_IS, LinearInput


class Linear(nn.Linear):
    """A linear layer that may rotate and round its input first.

    Attributes:
        reads: how; a traced layer reads its input as it is, the exporter inserts the rest.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.reads: LinearInput = AS_IT_IS

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` -> `[..., outputs]`."""
        return nn.functional.linear(self.reads(x), self.weight, self.bias)


def linear_of(block: nn.Module, name: str) -> Linear:
    """A linear layer of a block by its name, such as "mlp.down_proj"."""
    linear = block.get_submodule(name)
    assert isinstance(linear, Linear)
    return linear
