"""Which kernels `FftRopeAttention` takes, how its keys are cut, and how long its FFT is."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any, NamedTuple

from edgeattn.ops.kernel_widths import block_of

# Smaller head dimensions are padded to it too: one width less to compile for.
LEAST_BLOCK = 32
# Higher degrees have too many products of coordinates; their far keys are read like near ones.
HIGHEST_STATE_DEGREE = 2
# Keys of a segment at least; fewer rows, or fewer segments, are not worth the sums over segments.
LEAST_SEGMENT, LEAST_ROWS, LEAST_SEGMENTS = 512, 64, 4
# Points of a line of the FFT, and what it is made for: every feature is a transform of each column.
LINE, MOST_POINTS, MOST_FEATURES = 64, 16_384, 256


class Segments(NamedTuple):
    """The segments of keys of which sums are kept.

    Attributes:
        length: keys of one.
        number: of them; 0 where all keys are read.
        levels: matrices `[D, D]` per segment, D + 1 for degree 2 without a table, else one.
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
        offsets: N; a table of biases is no product of a row's factor and a key's, so that segments
            only serve its heads with the FFT, for the centres of their rows.
    """
    levels = width + 1 if degree == HIGHEST_STATE_DEGREE and offsets == 1 else 1
    length = max(LEAST_SEGMENT, (levels - 1) * width // 2)
    few = rows < LEAST_ROWS or keys < LEAST_SEGMENTS * length
    alone = offsets > 1 and points_of(rows, keys, width, degree, offsets) == 0
    none = few or alone or degree > HIGHEST_STATE_DEGREE
    return Segments(length, 0 if none else -(-keys // length), levels)


def points_of(rows: int, keys: int, width: int, degree: int, offsets: int) -> int:
    """Points of the convolution by which heads with the FFT are computed.

    They are whole lines, each transformed by one product of matrices and all by another.

    Args:
        rows: Tq.
        keys: S.
        width: D.
        degree: of the polynomial.
        offsets: N; without a table of biases, segments do for the FFT.

    Returns:
        At least Tq + S − 1; 0 where the FFT is not worth it, and scores are computed.
    """
    points = -(-(rows + keys - 1) // LINE) * LINE
    none = rows < LEAST_ROWS or offsets == 1 or degree > HIGHEST_STATE_DEGREE
    if none or points > MOST_POINTS or comb(width + degree, degree) > MOST_FEATURES:
        return 0
    return points


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
    degree, offsets = attributes["degree"], dims["N"]
    # Of sizes that are not known, those that take most kernels.
    points = points_of(
        rows if isinstance(rows, int) else LEAST_ROWS,
        keys if isinstance(keys, int) else 1,
        *(width, degree, offsets if isinstance(offsets, int) else 3),
    )
    offsets = offsets if isinstance(offsets, int) else 1
    most = MOST_POINTS // 2 if not known else max(1, MOST_POINTS + 1 - max(known))
    most = 2**31 - 1 if offsets == 1 else most
    rows, keys = (n if isinstance(n, int) else most for n in (rows, keys))
    summed = segments_of(rows, keys, width, degree, offsets).number > 0
    kernels = [("states", {"BLOCK": block}), ("prefix", {})] if summed else []
    kernels += [("spectrum", {}), ("convolve", {})] if points else []
    kernels += [("attend", {"BLOCK": block}), ("count", {})]
    return [(f"fft_rope_attention.{name}", constants) for name, constants in kernels]
