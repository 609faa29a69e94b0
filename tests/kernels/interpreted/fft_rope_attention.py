"""The kernels of FftRopeAttention, interpreted: segments, windows, lengths, rows that fall back.

torch_operators.py compares them with the reference in all dtypes, on so few keys that none are
summed over segments.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import case_inputs, check_outputs, exact_outputs, relative_error
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels import fft_rope_attention as module
from edgeattn.kernels.fft_rope_attention import (
    KERNELS,
    complete_constants,
    fft_rope_attention,
    workspaces,
)
from edgeattn.ops.fft_rope_attention import SPEC, reference, variants
from edgeattn.ops.fft_rope_kernels import Segments, segments_of
from edgeattn.ops.spec import Case

# Sums over segments are of hundreds of products whose terms cancel.
FLOOR = 2 * SPEC.tolerance["fp32"].floor
SEGMENT = 32


@pytest.fixture(autouse=True)
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what is no result."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = new_empty(self, *shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Segments of a few keys, and the kernels that ran."""

    def short(rows: int, keys: int, width: int, degree: int, offsets: int) -> Segments:
        usual = segments_of(2**20, 2**20, width, degree, offsets)
        count = -(-keys // SEGMENT) if usual.count and rows > 1 else 0
        return Segments(SEGMENT, count, usual.levels)

    def noted(*arguments: Any) -> list[tuple[str, dict[str, int]]]:
        dims, attributes = arguments
        dims = {**dims, "Tq": None, "S": None} if dims["Tq"] > 1 else dims
        needed = variants(dims, attributes)
        names.extend(name.partition(".")[2] for name, _ in needed)
        return needed

    names: list[str] = []
    monkeypatch.setattr(module, "segments_of", short)
    monkeypatch.setattr(module, "variants", noted)
    return names


def made(
    lengths: Sequence[int],
    *,
    rows: int = 100,
    keys: int = 100,
    heads: int = 2,
    kv_heads: int = 1,
    width: int = 16,
    degree: int = 2,
    dtype: str = "fp32",
    backend: int = 1,
    **values: str,
) -> list[Tensor]:
    """Inputs in which all rows are approximated, of sequences of such lengths."""
    dims = {"B": len(lengths), "H": heads, "Hkv": kv_heads, "Tq": rows, "S": keys, "D": width}
    dims |= {"C": degree + 1, "Hb": 1, "N": 1}
    usual = {"q": "unit-norm", "key_mean": "zero", "log_bias": "zero", "score_bound": "large"}
    inputs = case_inputs(SPEC, Case("made", dims, dtype, values={**usual, **values}), seed=rows)
    # With scores so small, degree 1 is positive too.
    inputs[6] = torch.full_like(inputs[6], 0.9)
    inputs[0] /= 4
    inputs[7] = torch.full_like(inputs[7], backend)
    inputs[8] = torch.tensor(lengths, dtype=torch.int32)
    return inputs


def agrees(inputs: Sequence[Tensor], **attributes: float) -> Tensor:
    """The kernels' fallback_count, which is the reference's, as y is."""
    attributes = {"scale": 0.12, **attributes}
    y, count = fft_rope_attention(*inputs, **attributes)  # type: ignore[arg-type]
    right, fallen = reference(*inputs, **attributes)  # type: ignore[arg-type]
    assert relative_error(y, right) <= FLOOR
    assert count.tolist() == fallen.tolist()
    return count


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_segments(launched: list[str], degree: int, causal: int) -> None:
    count = agrees(made([150, 64, 33, 1], rows=150, keys=150, degree=degree), causal=causal, degree=degree)
    assert launched == ["states", "prefix", "attend", "count"]
    assert count.tolist() == [0, 0]


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("sink", "window"), [(0, 1), (4, 0), (31, 32), (32, 33), (33, 31), (64, 16), (5, 90), (200, 2), (0, 2**31 - 1)]
)
def test_first_keys_and_window(sink: int, window: int, causal: int) -> None:
    agrees(made([100, 77]), sink=sink, window=window, causal=causal)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(("rows", "keys"), [(1, 100), (2, 100), (65, 130), (130, 65), (64, 64), (70, 97)])
def test_rows_and_keys(rows: int, keys: int, causal: int) -> None:
    agrees(made([keys, keys // 2, 1], rows=rows, keys=keys), sink=3, window=9, causal=causal)


@pytest.mark.parametrize("width", [8, 24, 40])
def test_widths(width: int) -> None:
    agrees(made([90], rows=90, keys=90, width=width), window=5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("row_centre", [0, 1])
def test_heads_in_groups(heads: int, kv_heads: int, row_centre: int) -> None:
    inputs = made([70, 100], heads=heads, kv_heads=kv_heads, key_mean="any")
    inputs[4] /= 4
    inputs[7] = torch.arange(heads, dtype=torch.int32) % 3
    agrees(inputs, sink=2, window=7, row_centre=row_centre)
