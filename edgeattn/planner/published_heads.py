"""What arXiv 2503.09579 found to be the cheapest heads, by loss and context: its table, read as is.

It holds for decoders trained from nothing with heads 64 wide, 16-bit weights and cache, one row at
a time, at lambda 0.9, alpha 1/2 and beta 1/3; the loss is that on the authors' text. Fewer bits for
weights and more rows make the cache dear, and so favour fewer KV heads than it says.

The table ends at its edges: beyond them nothing is known. A model's own loss on that text is not
known either. With Llama 3's layout of heads, three sizes and their losses are printed; a model
within a factor of 1.5 of one of these sizes is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeattn.planner.cost import Heads

HEAD_WIDTH = 64
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
_ROWS: Mapping[float, Sequence[tuple[int, int]]] = {
    3.0: ((32, 1), (16, 1), (8, 1), (4, 1), (4, 1)),
    2.9: ((32, 1), (16, 1), (16, 1), (8, 1), (4, 1)),
    2.8: ((32, 2), (16, 1), (16, 1), (8, 1), (8, 1)),
    2.7: ((32, 4), (16, 2), (16, 1), (16, 1), (8, 1)),
    2.6: ((32, 8), (16, 4), (16, 2), (16, 2), (8, 1)),
    2.5: ((32, 16), (16, 8), (16, 4), (16, 2), (16, 2)),
    2.4: ((32, 32), (32, 32), (32, 8), (32, 8), (32, 4)),
    2.35: ((32, 32), (32, 32), (32, 32), (32, 16), (32, 8)),
}
LOSSES = tuple(_ROWS)
# Parameters -> loss.
REFERENCE_LOSSES: Mapping[float, float] = {1.2e9: 2.615, 3e9: 2.448, 8e9: 2.362}
_SAME_SIZE = 1.5


@dataclass(frozen=True)
class PublishedHeads:
    """What the table says of a context, and of a loss where one is known.

    Attributes:
        context: of the column that was read, the nearest by ratio.
        column: loss -> the cheapest heads, from the highest loss down.
        loss: of the row that was read; None without a loss, or beyond the table.
    """

    context: int
    column: Mapping[float, Heads]
    loss: float | None

    @property
    def heads(self) -> Heads | None:
        """The cheapest ones for this loss and context; None where no row was read."""
        return None if self.loss is None else self.column[self.loss]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        column = {str(loss): list(heads) for loss, heads in self.column.items()}
        heads = None if self.heads is None else list(self.heads)
        return {"context": self.context, "loss": self.loss, "heads": heads, "column": column}


def published_heads(context: int, loss: float | None = None) -> PublishedHeads | None:
    """Reads the table at its nearest context and loss; None for a context beyond its edges.

    Args:
        context: in tokens.
        loss: on the authors' text; None reads the whole column.
    """
    if not CONTEXTS[0] <= context <= CONTEXTS[-1]:
        return None
    index = min(range(len(CONTEXTS)), key=lambda i: abs(math.log(CONTEXTS[i] / context)))
    column = {row: Heads(*heads[index]) for row, heads in _ROWS.items()}
    row = None
    if loss is not None and LOSSES[-1] <= loss <= LOSSES[0]:
        row = min(LOSSES, key=lambda known: abs(known - loss))
    return PublishedHeads(CONTEXTS[index], column, row)


def reference_size(parameters: float) -> float | None:
    """The size with a printed loss that a model is taken for; None where none is near."""
    size = min(REFERENCE_LOSSES, key=lambda known: abs(math.log(known / parameters)))
    return size if max(size / parameters, parameters / size) <= _SAME_SIZE else None
