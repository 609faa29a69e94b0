"""Which head dimensions and how many rows the kernels of linear attention are made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgeattn.ops.spec import refused

# Head dimensions are padded to one of these at run time; vectors of `ALIGNMENT` numbers are loaded
# at once, so that no row may end within one.
BLOCKS = (16, 32, 64, 128)
ALIGNMENT = 8
# Rows times the larger head dimension: kernels count within a head in int32, also the states that
# they write down every 64 rows or more, which have up to twice as many numbers as the rows.
MOST_NUMBERS = 2**29


def block_of(operator: str, widths: Sequence[int], length: Any) -> int:
    """The width to which both head dimensions are padded.

    Args:
        operator: its name, for the error.
        widths: of keys and values.
        length: rows, or a symbol.

    Raises:
        RuntimeInputError: no kernel is made for such head dimensions, or for so many rows.
    """
    widest = max(widths)
    if widest > BLOCKS[-1] or any(width < 1 or width % ALIGNMENT for width in widths):
        expected = f"head dimensions that are multiples of {ALIGNMENT} up to {BLOCKS[-1]}"
        raise refused(operator, expected, " and ".join(map(str, widths)))
    if isinstance(length, int) and length * widest > MOST_NUMBERS:
        expected = f"at most {MOST_NUMBERS // widest} rows of {widest} numbers"
        raise refused(operator, expected, f"{length}")
    return next(block for block in BLOCKS if block >= widest)
