"""The bandwidth model of head sparsity against figures worked out by hand."""

from __future__ import annotations

import pytest

from edgeattn.planner.head_sparsity import cache_share, decode_speedup

# Weights in 4 bits with a scale of 16 bits for 64 of them, keys and values in fp16.
BYTES = {"1B": 1.24e9 * 4.25 / 8, "8B": 8.03e9 * 4.25 / 8}
TOKEN = {"1B": 16 * 2 * 8 * 64 * 2, "8B": 32 * 2 * 8 * 128 * 2}


@pytest.mark.parametrize(
    ("model", "batch", "context", "share", "speedups"),
    [
        ("1B", 1, 2048, 0.09, {0.625: 1.03, 0.5: 1.05}),
        ("1B", 1, 8192, 0.29, {0.625: 1.12, 0.5: 1.17}),
        ("8B", 1, 2048, 0.06, {0.625: 1.02, 0.5: 1.03}),
        ("8B", 1, 32768, 0.50, {0.625: 1.23, 0.5: 1.33}),
        ("8B", 32, 8192, 0.89, {0.625: 1.50, 0.5: 1.80}),
    ],
)
def test_llamas(
    model: str, batch: int, context: int, share: float, speedups: dict[float, float]
) -> None:
    found = cache_share(BYTES[model], TOKEN[model], context, batch)
    assert found == pytest.approx(share, abs=0.02)
    for density, expected in speedups.items():
        assert decode_speedup(found, density) == pytest.approx(expected, abs=0.02)


def test_limits() -> None:
    assert decode_speedup(0.7, 1.0) == 1
    assert decode_speedup(1.0, 0.25) == 4
    assert decode_speedup(0.0, 0.25) == 1
