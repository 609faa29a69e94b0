"""fp16 and bf16 in C++ against numpy: every fp16 number, the ties between them, and many others."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeattn.engine.loaded import to_bf16


def test_every_half_and_every_tie(runtime: Any) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    beside = np.concatenate((np.nextafter(ties, 0), np.nextafter(ties, np.float32(1e9))))
    rng = np.random.default_rng(0)
    others = rng.standard_normal(20_000).astype(np.float32)
    others *= np.exp2(rng.integers(-60, 60, others.size)).astype(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e30, 0, 2**-25, 2**-24 * 1.5], np.float32)
    positive = np.concatenate((halves, ties, beside, np.abs(others), edges)).astype(np.float32)
    given = np.concatenate((positive, -positive))

    raw = np.frombuffer(runtime.drive("narrow", given.tobytes()), np.uint16).reshape(-1, 6)
    with np.errstate(over="ignore"):
        half = given.astype(np.float16)
    np.testing.assert_array_equal(raw[:, 0], half.view(np.uint16))
    np.testing.assert_array_equal(raw[:, 1], to_bf16(given))
    wide = np.ascontiguousarray(raw[:, 2:]).view(np.float32)
    np.testing.assert_array_equal(wide[:, 0], half.astype(np.float32))
    upper = to_bf16(given).astype(np.uint32) << 16
    np.testing.assert_array_equal(wide[:, 1], upper.view(np.float32))
