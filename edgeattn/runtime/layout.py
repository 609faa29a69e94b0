"""Where the tokens of a run lie among the slots of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Layout:
    """What a graph is told of T new tokens behind P slots.

    Attributes:
        attention_mask: `[B, P + T]`, 1 at tokens and 0 at padding.
        position_ids: `[B, T]`; those of padding mean nothing.
    """

    attention_mask: NDArray[np.int64]
    position_ids: NDArray[np.int64]

    @classmethod
    def dense(cls, batch: int, past: int, length: int) -> Layout:
        """That of `length` tokens behind `past`, without padding."""
        slots = past + length
        positions = np.arange(past, slots)[None].repeat(batch, axis=0)
        return cls(np.ones((batch, slots), np.int64), positions)

    @classmethod
    def of_mask(cls, attention_mask: NDArray[np.int64], length: int) -> Layout:
        """That of a mask `[B, P + T]` with `length` = T: padding takes no position."""
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
        return cls(attention_mask, positions[:, -length:])

    def is_dense(self) -> bool:
        """Whether it is that of tokens without padding."""
        (batch, slots), length = self.attention_mask.shape, self.position_ids.shape[1]
        dense = Layout.dense(batch, slots - length, length)
        return np.array_equal(self.attention_mask, dense.attention_mask) and np.array_equal(
            self.position_ids, dense.position_ids
        )
