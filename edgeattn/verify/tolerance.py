"""The tolerance table: how far an implementation may be from the fp32 reference.

    error(x) = max |x - reference| / rms(reference)
    allowed  = 2 * error(plain torch in the bundle's dtype) + floor of that dtype

Twice the error of plain low-precision torch is the rule of the flash-attention tests: a different
order of summation is as inexact as the plain one, never much more. The floor covers what the plain
run gets exactly right by luck. For fp32 the plain run is the reference itself, so the floor alone
counts. Weight-only schemes are compared with torch on the dequantised weights, at the same floors.
No row is loosened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOORS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}


def relative_error(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Largest absolute difference relative to the reference's root mean square.

    NaN or infinity anywhere in `value`, or another shape, is an infinite error.
    """
    if value.shape != reference.shape or not np.isfinite(value).all():
        return float("inf")
    if reference.size == 0:
        return 0.0
    difference = np.abs(value.astype(np.float64) - reference).max()
    rms = np.sqrt(np.mean(np.square(reference, dtype=np.float64)))
    return float(difference / rms) if rms > 0 else (0.0 if difference == 0 else float("inf"))


def allowed_error(dtype: str, low_precision_error: float) -> float:
    """The bound on `relative_error`.

    Args:
        dtype: "fp32", "fp16" or "bf16", the dtype of the bundle.
        low_precision_error: of plain torch in that dtype on the same tensor.
    """
    return 2 * low_precision_error + FLOORS[dtype]
