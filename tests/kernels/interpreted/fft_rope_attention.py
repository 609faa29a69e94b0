"""The kernels of FftRopeAttention, interpreted: segments, windows, lengths, rows that fall back.

torch_operators.py compares them with the reference in all dtypes, on so few keys that none are
summed over segments.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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
from edgeattn.ops.fft_rope_attention import SPEC, reference
from edgeattn.ops.fft_rope_kernels import Segments, segments_of, variants
from edgeattn.ops.spec import Case

FLOOR = SPEC.tolerance["fp32"].floor
# Half of a tile of keys.
SEGMENT = 32
SUMMED, DIRECT = ["states", "prefix", "attend", "count"], ["attend", "count"]
CONVOLVED = ["states", "prefix", "spectrum", "convolve", "attend", "count"]


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
    """The kernels that ran, where segments have few keys."""
    names: list[str] = []

    def short(rows: int, keys: int, width: int, degree: int, offsets: int) -> Segments:
        many = 2**20 if offsets == 1 else 8000
        usual = segments_of(max(rows, 64), many, width, degree, offsets)
        return usual._replace(length=SEGMENT, number=-(-keys // SEGMENT) if usual.number else 0)

    def noted(dims: dict[str, int], attributes: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
        needed = variants({**dims, "Tq": None, "S": None}, attributes)
        names.extend(name.partition(".")[2] for name, _ in needed)
        return needed

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
    width: int = 8,
    degree: int = 2,
    biases: int = 0,
    dtype: str = "fp32",
    **values: str,
) -> list[Tensor]:
    """Inputs in which no row of any head falls back, of sequences of such lengths."""
    dims = {"B": len(lengths), "H": heads, "Hkv": kv_heads, "Tq": rows, "S": keys, "D": width}
    dims |= {"C": degree + 1, "Hb": biases or 1, "N": 2 * keys - 1 if biases else 1}
    usual = {"q": "unit-norm", "key_mean": "zero", "backend": "1..2"}
    usual["log_bias"] = "any" if biases else "zero"
    inputs = case_inputs(SPEC, Case("made", dims, dtype, values={**usual, **values}), seed=rows)
    inputs[0] /= 4
    inputs[6] = torch.full_like(inputs[6], 0.9)  # degree 1 is positive too
    inputs[8] = torch.tensor(lengths, dtype=torch.int32)
    return inputs


def run(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    """The kernels, in memory that nobody has written to before."""
    degree = inputs[3].shape[1] - 1
    return fft_rope_attention(*inputs, degree=degree, **{"scale": 0.12, **attributes})  # type: ignore[arg-type]


def expected(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    """The reference, likewise."""
    degree = inputs[3].shape[1] - 1
    return reference(*inputs, degree=degree, **{"scale": 0.12, **attributes})  # type: ignore[arg-type]


def agrees(inputs: Sequence[Tensor], **attributes: float) -> list[int]:
    """The kernels' fallback_count, which is the reference's; so is y."""
    (y, count), (right, fallen) = run(inputs, **attributes), expected(inputs, **attributes)
    assert relative_error(y, right) <= FLOOR
    assert count.tolist() == fallen.tolist()
    return count.tolist()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_segments(launched: list[str], degree: int, causal: int) -> None:
    inputs = made([150, 33], rows=150, keys=150, heads=1, degree=degree)
    assert agrees(inputs, causal=causal) == [0]
    assert launched == SUMMED


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("sink", "window"),
    [
        *((0, 1), (4, 0), (31, 32), (32, 33), (33, 31), (64, 16), (0, 2), (1, 34)),
        *((5, 90), (200, 2), (0, 2**31 - 1), (2**31 - 1, 0)),
    ],
)
def test_first_keys_and_window(sink: int, window: int, causal: int) -> None:
    agrees(made([100], heads=1), sink=sink, window=window, causal=causal)


@pytest.mark.parametrize("attribute", ["sink", "window"])
@pytest.mark.parametrize("causal", [0, 1])
def test_one_key_more_or_less_is_seen(attribute: str, causal: int) -> None:
    """Which shows that these tests would find a sum that takes one key too many."""
    inputs = made([100], rows=70)
    found, _ = run(inputs, causal=causal, **{attribute: 33})
    for other in (32, 34):
        wrong, _ = expected(inputs, causal=causal, **{attribute: other})
        assert relative_error(found, wrong) > 10 * FLOOR


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 100), (2, 100), (65, 130), (130, 65), (64, 64), (70, 97)]
)
def test_rows_and_keys(rows: int, keys: int, causal: int) -> None:
    inputs = made([keys, keys // 2, 1], rows=rows, keys=keys, heads=1)
    agrees(inputs, sink=3, window=9, causal=causal)


@pytest.mark.parametrize("width", [16, 24, 40])
def test_widths(width: int) -> None:
    agrees(made([90], rows=90, keys=90, width=width, heads=1), window=5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("row_centre", [0, 1])
def test_heads_in_groups(heads: int, kv_heads: int, row_centre: int) -> None:
    """Some of which are exact."""
    lengths = {"rows": 60, "keys": 60}  # one tile and two segments: heads are what differs
    inputs = made([40, 60], **lengths, heads=heads, kv_heads=kv_heads, key_mean="any")
    inputs[4] /= 4
    inputs[7] = torch.arange(heads, dtype=torch.int32) % 3
    agrees(inputs, sink=2, window=7, row_centre=row_centre)


def test_exact_heads_alone(launched: list[str]) -> None:
    assert agrees(made([70, 100], backend="0..0", q="any")) == [0, 0]
    assert launched == SUMMED


@pytest.mark.parametrize("causal", [0, 1])
def test_rows_that_fall_back(causal: int) -> None:
    """By a long query, or by a long key among their far ones."""
    inputs = made([110, 90], rows=110, keys=110, heads=4, kv_heads=2)
    inputs[0][0, 0, [3, 64, 109]] *= 30
    inputs[0][1, 3, 100] *= 30  # of padding
    inputs[1][0, 1, 40] *= 20
    count = agrees(inputs, sink=4, window=10, causal=causal)
    # The first rows have no far key to see, where later ones are not seen.
    assert count[0] == (2 if causal else 3)
    assert count[1] == 0
    behind, before = 110 - 40 - 10 + 0, 40 - 10 + 1
    assert count[2:] == [behind + (0 if causal else before)] * 2


def test_a_bound_that_is_just_met() -> None:
    inputs = made([40], rows=40, keys=40, heads=1)
    inputs[0], inputs[1] = torch.ones_like(inputs[0]), torch.ones_like(inputs[1])
    # |q|² = |k|² = 8, reach 2: 256 against the bound squared.
    for bound, fallen in ((16.0, 0), (math.nextafter(16.0, 0) - 1e-5, 40)):
        inputs[6][:] = bound
        assert agrees(inputs, scale=1.0) == [fallen]


@pytest.mark.parametrize("degree", [3, 4])
def test_degrees_without_segments(launched: list[str], degree: int) -> None:
    agrees(made([100, 77], degree=degree), sink=3, window=20)
    assert launched == DIRECT


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("biases", [1, 2])
def test_biases(launched: list[str], biases: int, causal: int) -> None:
    """Some of which hide keys, and one all of a row's; toeplitz.py has more."""
    inputs = made([77], biases=biases, degree=1, backend="2..2")
    inputs[5][:, 105:120] = -math.inf
    inputs[5][0, 99:] = -math.inf
    agrees(inputs, sink=3, window=20, causal=causal)
    assert launched == CONVOLVED


@pytest.mark.parametrize("bias", [-3.0, 2.0, -math.inf])
def test_one_bias(bias: float) -> None:
    """Which changes nothing, or hides everything."""
    inputs = made([100])
    usual, _ = expected(inputs)
    inputs[5][:] = bias
    agrees(inputs)
    wanted = usual if math.isfinite(bias) else torch.zeros_like(usual)
    assert relative_error(run(inputs)[0], wanted) <= FLOOR


def test_scores_far_from_0() -> None:
    """Where the terms of a polynomial in the score would cancel."""
    inputs = made([100])
    inputs[1] += 200
    inputs[4] += 200
    inputs[0] += 0.2
    assert agrees(inputs, window=5, scale=0.1) == [0, 0]


@pytest.mark.parametrize("rows", [1, 80])
def test_what_is_behind_the_last_key_is_not_used(rows: int) -> None:
    inputs = made([75, 40], rows=rows)
    right, fallen = expected(inputs)
    for tensor, no_number in ((inputs[1], math.nan), (inputs[2], math.inf)):
        tensor[0, :, 75:], tensor[1, :, 40:] = no_number, no_number
    y, count = run(inputs)
    assert relative_error(y, right) <= FLOOR
    assert count.tolist() == fallen.tolist()


def test_lengths_and_backends_that_are_wrong_lead_nowhere() -> None:
    """Too many keys are all of them, and a negative number none."""
    inputs = made([100, 1], rows=70, backend="1..1")
    right, _ = expected(inputs)
    inputs[8][:] = torch.tensor([2**31 - 1, -5])
    inputs[7][:] = torch.tensor([-7, 2**31 - 1])
    y, _ = run(inputs)
    assert relative_error(y[0], right[0]) <= FLOOR
    assert (y[1] == 0).all()


@pytest.mark.parametrize("causal", [0, 1])
def test_fp16_with_segments(causal: int) -> None:
    attributes = {"scale": 0.12, "sink": 3, "window": 9, "causal": causal}
    inputs = made([100, 77], dtype="fp16")
    case = Case("made", {}, "fp16", attributes)
    check_outputs(SPEC, case, run(inputs, **attributes), exact_outputs(SPEC, case, inputs))


def test_tensors_need_not_be_contiguous() -> None:
    inputs = made([40], rows=40, keys=40, kv_heads=2)
    beside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    assert torch.equal(run([*beside, *inputs[3:]])[0], run(inputs)[0])


@given(st.data())
def test_grids(data: st.DataObject) -> None:
    names = ("B", "HKV", "G", "TQ", "D", "LEVELS", "SEGMENTS", "CHUNK", "NUMBERS")
    values = {name: data.draw(st.integers(1, 99)) for name in names}
    kv_heads = values["B"] * values["HKV"]
    levels, width = values["LEVELS"], values["D"]
    grids = {
        "states": levels * values["SEGMENTS"] * kv_heads,
        "prefix": math.ceil((levels * (width + 1) + 1) * width / values["NUMBERS"]) * kv_heads,
        "spectrum": values["HKV"] * values["G"],
        "convolve": math.ceil((width + 2) / 2) * kv_heads * values["G"],
        "attend": math.ceil(values["TQ"] / values["CHUNK"]) * kv_heads * values["G"],
        "count": values["HKV"] * values["G"],
    }
    for kernel in KERNELS:
        assert kernel.blocks(values) == (grids[kernel.name.partition(".")[2]], 1, 1)


@given(width=st.sampled_from(range(8, 129, 8)), degree=st.integers(0, 4))
def test_constants_and_room_fit_together(width: int, degree: int) -> None:
    kernels = {kernel.name: kernel for kernel in KERNELS}
    dims = {"Tq": None, "S": None, "D": width, "N": 1}
    needed = variants(dims, {"degree": degree})
    assert [name.partition(".")[2] for name, _ in needed] == (SUMMED if degree < 3 else DIRECT)
    for name, given_constants in needed:
        constants = complete_constants(kernels[name], given_constants)
        assert tuple(constants) == kernels[name].constants
        assert width <= constants.get("BLOCK", width) <= max(2 * width, 32)
    length, number, levels = segments_of(2**16, 2**16, width, degree, 1)
    sizes = {"B": 1, "HKV": 1, "G": 1, "TQ": 2**16, "D": width, "C": degree + 1, "POINTS": 0}
    shapes = workspaces({**sizes, "SEGMENTS": number, "LEVELS": levels})
    keys_and_values = 2 * 2**16 * width
    assert math.prod(shapes["sums"]) <= 1.3 * keys_and_values
    assert (number - 1) * length < 2**16 <= number * length or not number


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: torch.float64}, "q in fp32 or fp16 or bf16 .* but it is torch.float64"),
        ({2: torch.float16}, "v in fp32 like q .* but it is fp16"),
        ({7: torch.int64}, "backend in int32 .* but it is torch.int64"),
    ],
)
def test_dtypes_without_a_kernel_are_refused(changed: dict, words: str) -> None:
    inputs = made([9], rows=9, keys=9)
    with pytest.raises(RuntimeInputError, match=words):
        run([x.to(changed.get(i, x.dtype)) for i, x in enumerate(inputs)])


@pytest.mark.parametrize("width", [12, 136])
def test_dimensions_without_a_kernel_are_refused(width: int) -> None:
    case = SPEC.cases[0]
    inputs = case_inputs(SPEC, replace(case, dims={**case.dims, "D": width}))
    with pytest.raises(RuntimeInputError, match=f"multiples of 8 up to 128, but {width} came"):
        run(inputs)
