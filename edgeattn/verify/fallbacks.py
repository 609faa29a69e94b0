"""How many rows of polynomial attention were computed exactly after all, counted by the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.ops.fft_rope_attention import EXACT, SPEC

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto

_BACKEND = [tensor.name for tensor in SPEC.inputs].index("backend")
_COUNT = [tensor.name for tensor in SPEC.outputs].index("fallback_count")


@dataclass
class Fallbacks:
    """Rows of heads that have a polynomial.

    Attributes:
        outputs: names of the graph's counters.
        heads: with a polynomial, of all layers together.
        exact: rows of them that were computed exactly, so far.
        rows: of them, so far.
    """

    outputs: tuple[str, ...]
    heads: int
    exact: int = 0
    rows: int = 0

    @classmethod
    def of(cls, model_file: Path) -> Fallbacks:
        """Of a graph that has not run; without `outputs` where it has no such attention."""
        import onnx

        proto = onnx.load(model_file, load_external_data=False)
        nodes = [node for node in proto.graph.node if node.op_type == SPEC.name]
        heads = sum(
            int((_constant(proto, node.input[_BACKEND], model_file.parent) != EXACT).sum())
            for node in nodes
        )
        return cls(tuple(node.output[_COUNT] for node in nodes), heads)

    def add(self, values: Mapping[str, object], tokens: int) -> None:
        """Counts a step of `tokens` tokens, padding left out."""
        self.exact += sum(int(np.sum(np.asarray(values[name]))) for name in self.outputs)
        self.rows += tokens * self.heads

    @property
    def share(self) -> float | None:
        """Of the rows; None where there were none."""
        return self.exact / self.rows if self.rows else None


def _constant(proto: ModelProto, name: str, folder: Path) -> NDArray[np.generic]:
    import onnx

    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor, str(folder))
