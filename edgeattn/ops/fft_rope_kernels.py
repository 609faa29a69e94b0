"""Which kernels `FftRopeAttention` takes, and how its far keys are cut into segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgeattn.ops.kernel_widths import block_of

# Smaller head dimensions are padded to it too: one width less to compile for.
LEAST_BLOCK = 32
# Higher degrees have too many products of coordinates; their far keys are read like near ones.
HIGHEST_STATE_DEGREE = 2
# Keys of a segment at least; fewer rows, or fewer segments, are not worth the sums over segments.
LEAST_SEGMENT, LEAST_ROWS, LEAST_SEGMENTS = 512, 64, 4


class Segments(NamedTuple):
    """The segments of keys of which sums are kept.

    Attributes:
        length: keys of one.
        number: of them; 0 where all keys are read.
        levels: matrices `[D, D]` per segment, one for degree 1 and D + 1 for degree 2.
    """

    length: int
    number: int
    levels: int


def segments_of(rows: int, keys: int, width: int, degree: int, offsets: int) -> Segments:
    """How the keys of a head are cut.

    Segments are so long that their sums take about as much room as their keys and values in fp32.

    Args:
        rows: Tq.
        keys: S.
        width: D.
        degree: of the polynomial.
        offsets: N; a table of biases is no product of a row's factor and a key's.
    """
    levels = width + 1 if degree == HIGHEST_STATE_DEGREE else 1
    length = max(LEAST_SEGMENT, (levels - 1) * width // 2)
    few = rows < LEAST_ROWS or keys < LEAST_SEGMENTS * length
    none = few or degree > HIGHEST_STATE_DEGREE or offsets > 1
    return Segments(length, 0 if none else -(-keys // length), levels)


def variants(
    dims: Mapping[str, Any], attributes: Mapping[str, Any]
) -> list[tuple[str, dict[str, int]]]:
    """The kernels a node needs, as far as its lengths are known.

    Raises:
        RuntimeInputError: no kernel is made for such a head dimension, or for so many rows.
    """
    rows, keys, width = dims["Tq"], dims["S"], dims["D"]
    if not isinstance(width, int):
        return []
    known = [n for n in (rows, keys) if isinstance(n, int)]
    block = max(block_of("FftRopeAttention", (width,), max(known, default=None)), LEAST_BLOCK)
    # Of sizes that are not known, those that take most kernels.
    rows, keys = (n if isinstance(n, int) else 2**31 - 1 for n in (rows, keys))
    offsets = dims["N"] if isinstance(dims["N"], int) else 1
    summed = segments_of(rows, keys, width, attributes["degree"], offsets).number > 0
    kernels = [("states", {"BLOCK": block}), ("prefix", {})] if summed else []
    kernels += [("attend", {"BLOCK": block}), ("count", {})]
    return [(f"fft_rope_attention.{name}", constants) for name, constants in kernels]
