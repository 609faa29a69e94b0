"""The FFT of FftRopeAttention, interpreted: its sums, what is made of them, and that it is taken.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from op_cases import case_inputs, relative_error
from torch import Tensor

from edgeattn.kernels import fft_rope_attention as module
from edgeattn.kernels import toeplitz
from edgeattn.kernels.chunks import jit
from edgeattn.kernels.fft_rope_attention import (
    KERNELS,
    complete_constants,
    fft_rope_attention,
    workspaces,
)
from edgeattn.kernels.kernel import Kernel
from edgeattn.ops.fft_rope_attention import SPEC, reference
from edgeattn.ops.fft_rope_kernels import points_of, segments_of, variants
from edgeattn.ops.polynomial_sums import plain_symbols, toeplitz_fft
from edgeattn.ops.spec import Case

FLOOR = SPEC.tolerance["fp32"].floor
SCALE = 0.12


@pytest.fixture(autouse=True)
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what is no result."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = new_empty(self, *shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran."""
    names: list[str] = []
    launch = Kernel.launch

    def noted(kernel: Kernel, values: dict[str, Any]) -> None:
        names.append(kernel.name.partition(".")[2])
        launch(kernel, values)

    monkeypatch.setattr(Kernel, "launch", noted)
    return names


@pytest.fixture
def recalled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First rows of the tiles that took the sums, as those of padding alone do."""
    tiles: list[int] = []

    def noted(*arguments: Any) -> Any:
        tiles.append(int(arguments[3].handle.data[0]))
        return toeplitz.recall_convolved(*arguments)

    monkeypatch.setattr(module, "recall_convolved", noted)
    return tiles


def made(
    lengths: Sequence[int],
    *,
    rows: int = 64,
    keys: int = 64,
    heads: int = 1,
    kv_heads: int = 1,
    degree: int = 1,
    width: int = 8,
    dtype: str = "fp32",
    **values: str,
) -> list[Tensor]:
    """Inputs with a table of biases per head, in which no row falls back."""
    dims = {"B": len(lengths), "H": heads, "Hkv": kv_heads, "Tq": rows, "S": keys, "D": width}
    dims |= {"C": degree + 1, "Hb": heads, "N": 2 * keys - 1}
    usual = {"q": "unit-norm", "key_mean": "zero", "backend": "2..2"}
    inputs = case_inputs(SPEC, Case("made", dims, dtype, values={**usual, **values}), seed=rows)
    inputs[0] /= 4
    inputs[6] = torch.full_like(inputs[6], 0.9)
    inputs[8] = torch.tensor(lengths, dtype=torch.int32)
    return inputs


def both(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    """What the kernels and the reference give, which count the same rows."""
    settings: Any = {"degree": inputs[3].shape[1] - 1, "scale": SCALE, **attributes}
    (y, count), (right, fallen) = (f(*inputs, **settings) for f in (fft_rope_attention, reference))
    assert count.tolist() == fallen.tolist()
    return y, right


def far_sums(inputs: Sequence[Tensor], **attributes: int) -> Tensor:
    """Y of all orders from the kernels, `[B, H, C, D + 2, Tq]`."""
    (batch, heads, rows, width), (_, kv_heads, keys, _) = inputs[0].shape, inputs[1].shape
    (biases, offsets), count = inputs[5].shape, inputs[3].shape[1]
    dims = {"B": batch, "HKV": kv_heads, "G": heads // kv_heads, "TQ": rows, "S": keys, "D": width}
    dims |= {"C": count, "HB": biases, "N": offsets, "SEGMENTS": 0, "LEVELS": 1}
    dims["POINTS"] = points_of(rows, keys, width, count - 1, offsets)
    names = (tensor.name for tensor in SPEC.inputs)
    values = {**dict(zip(names, inputs, strict=True)), **dims, "scale": SCALE}
    values |= {"sink": 0, "window": 0, "causal": 1, **attributes}
    values |= {name: inputs[4].new_empty(shape) for name, shape in workspaces(dims).items()}
    for kernel in KERNELS:
        if kernel.function in (toeplitz.spectrum, toeplitz.convolve):
            kernel.launch(values | complete_constants(kernel, {}))
    # Divided by the largest T, which the kernels do not know to be that of the definition.
    peak = values["norms"].reshape(heads, 2)[:, 0]
    sums: Tensor = values["far_sums"].reshape(batch, heads, count, width + 2, rows)
    return sums * peak.exp().reshape(-1, 1, 1, 1)


def expected_sums(inputs: Sequence[Tensor], **attributes: int) -> Tensor:
    """The same of one sequence and head by `polynomial_sums.toeplitz_fft`, in fp64."""
    q, k, v = (x[0, 0].double() for x in inputs[:3])
    rows, keys = len(q), len(k)
    length = int(inputs[8][0])
    before = max(length - rows, 0)
    settings = {"sink": 0, "window": 0, "causal": 1, **attributes}
    # Offsets of T from −(S − 1) to Tq − 1, counted from the first row's position.
    offsets = torch.arange(rows + keys - 1) - (keys - 1) + before
    distance = offsets if settings["causal"] else offsets.abs()
    column = (offsets + inputs[5].shape[1] // 2).clamp(0, inputs[5].shape[1] - 1)
    kernel = inputs[5][0, column].double().exp()
    kernel = torch.where(distance >= settings["window"], kernel, 0.0)
    u = torch.cat([v, torch.ones(keys, 1)], dim=1)
    u[: settings["sink"]], u[length:] = 0, 0
    shifted = k - inputs[4][0].double()
    symbols = plain_symbols(q.shape[1], kernel)
    orders = torch.eye(inputs[3].shape[1], dtype=torch.float64).unsqueeze(1)
    sums = [toeplitz_fft(q * SCALE, shifted, u, order, kernel, symbols) for order in orders]
    return torch.stack(sums).mT


def error_of_sums(inputs: Sequence[Tensor], **attributes: int) -> float:
    """The largest, against the largest sum of each order."""
    length, rows, width = int(inputs[8][0]), inputs[0].shape[2], inputs[0].shape[3]
    are_rows = min(rows, length)
    found = far_sums(inputs, **attributes)[0, 0, :, : width + 1, :are_rows]
    right = expected_sums(inputs, **attributes)[..., :are_rows]
    scales = right.abs().amax((1, 2), keepdim=True)
    return float(((found - right).abs() / scales).max())


@pytest.mark.parametrize(
    ("rows", "keys", "length", "attributes"),
    [
        (64, 64, 64, {}),
        (64, 65, 65, {"window": 9}),
        (70, 200, 200, {"causal": 0, "window": 3, "sink": 5}),
        (70, 200, 131, {"sink": 2}),
        (200, 70, 70, {"causal": 0}),
        (130, 90, 33, {"causal": 0, "window": 2**31 - 1}),
        (1000, 1100, 1050, {"window": 40}),
    ],
)
def test_sums_of_one_feature(rows: int, keys: int, length: int, attributes: dict) -> None:
    inputs = made([length], rows=rows, keys=keys, degree=0)
    if attributes.get("window") == 2**31 - 1:
        assert not far_sums(inputs, **attributes)[..., :length].any()
    else:
        assert error_of_sums(inputs, **attributes) <= 2e-6


@pytest.mark.parametrize("degree", [1, 2])
def test_sums_of_every_order(degree: int) -> None:
    inputs = made([75], rows=65, keys=80, degree=degree, width=6, key_mean="any")
    assert error_of_sums(inputs, window=7, causal=degree - 1) <= 2e-6


@jit
def turned_back(
    real: tl.tensor,
    imaginary: tl.tensor,
    rows: tl.tensor,
    sign: tl.constexpr,
    POINTS: tl.tensor,
) -> tl.tensor:
    """As `turn`, of another power of the root in one place."""
    power = (rows[:, None] * tl.arange(0, 64)[None, :] + (rows[:, None] == 1)) % POINTS
    cosine, sine = toeplitz.root(power, POINTS)
    return real * cosine - imaginary * sign * sine, real * sign * sine + imaginary * cosine


def test_a_wrong_power_of_the_root_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = made([64], degree=0)
    monkeypatch.setattr(toeplitz, "turn", turned_back)
    assert error_of_sums(inputs) > 1e-3


def test_biases_one_place_beside_are_found() -> None:
    inputs = made([64], degree=0)
    beside = [*inputs[:5], inputs[5].roll(1, dims=1), *inputs[6:]]
    right = expected_sums(inputs)
    wrong = far_sums(beside)[0, 0, :, :9]
    assert float((wrong - right).abs().max() / right.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("lengths", "sizes", "attributes", "tiles"),
    [
        ([130, 40], {"rows": 130, "keys": 130}, {"window": 3}, [64, 128] * 2),
        (
            *([140, 30], {"rows": 70, "keys": 140, "heads": 2}),
            *({"sink": 3, "window": 20}, [0, 64, 0, 64, 64, 64]),
        ),
        (
            *([100, 80], {"rows": 70, "keys": 100, "dtype": "fp16"}),
            *({"causal": 0, "window": 2}, [0, 64] * 2),
        ),
        ([30], {"rows": 70, "keys": 40}, {"causal": 0, "row_centre": 0}, [0, 64]),
        ([128], {"rows": 64, "keys": 128, "degree": 2}, {"window": 5}, [0]),
    ],
)
def test_rows(
    launched: list[str],
    recalled: list[int],
    lengths: list[int],
    sizes: dict,
    attributes: dict,
    tiles: list[int],
) -> None:
    inputs = made(lengths, **sizes)
    if sizes.get("heads") == 2:
        inputs[5][:, 40:60] = -math.inf  # hides later keys, and of the second head
        inputs[5][1, 139:] = -0.05 * torch.arange(140)  # more and more of earlier ones
    y, right = both(inputs, **attributes)
    assert relative_error(y, right) <= SPEC.tolerance[sizes.get("dtype", "fp32")].floor
    assert launched == ["spectrum", "convolve", "attend", "count"]
    assert recalled == tiles


def test_rows_are_made_of_these_sums(recalled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong transform changes them, but not those of other heads."""
    inputs = made([128], keys=128, heads=3)
    inputs[7] = torch.tensor([0, 1, 2], dtype=torch.int32)
    y, right = both(inputs, window=2)
    assert relative_error(y, right) <= FLOOR
    monkeypatch.setattr(toeplitz, "turn", turned_back)
    wrong, _ = both(inputs, window=2)
    assert torch.equal(wrong[:, :2], y[:, :2])
    assert relative_error(wrong[:, 2], right[:, 2]) > 10 * FLOOR
    assert recalled == [0, 0]


def test_small_sums_are_not_left_to_the_transform(recalled: list[int]) -> None:
    """Of biases that grow, those of the first 128 rows are below e^-20 of the largest."""
    inputs = made([180], rows=180, keys=180)
    inputs[5][:] = 0.4 * torch.arange(-179, 180)
    y, right = both(inputs, window=2)
    for rows in (slice(0, 64), slice(64, 128), slice(128, 180)):
        assert relative_error(y[:, :, rows], right[:, :, rows]) <= FLOOR
    assert recalled == []


def test_rows_that_fall_back(recalled: list[int]) -> None:
    inputs = made([200], rows=130, keys=200)
    inputs[0][0, 0, 90] *= 30
    y, right = both(inputs, window=2)
    assert relative_error(y, right) <= FLOOR
    assert recalled == [0, 128]


def test_where_the_fft_is_taken() -> None:
    """Of many rows with a table, few features and few keys."""
    assert points_of(64, 64, 16, 2, 127) == 128
    assert points_of(8192, 8193, 64, 1, 16_385) == 16_384
    for rows, keys, width, degree, offsets in [
        (63, 64, 16, 2, 127),
        (64, 64, 16, 2, 1),
        (64, 64, 24, 2, 127),
        (64, 64, 8, 3, 127),
        (8192, 8194, 64, 1, 16_387),
    ]:
        assert points_of(rows, keys, width, degree, offsets) == 0
    assert segments_of(4096, 4096, 16, 2, 8191).levels == 1
    assert segments_of(4096, 4096, 24, 2, 8191).number == 0
    for unknown in ({"Tq": None}, {"S": None}, {"N": None}):
        dims = {"Tq": 4096, "S": 4096, "D": 16, "N": 8191, **unknown}
        names = [name.partition(".")[2] for name, _ in variants(dims, {"degree": 2})]
        assert names == ["states", "prefix", "spectrum", "convolve", "attend", "count"]
