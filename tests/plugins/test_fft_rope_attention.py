"""The plugin of FftRopeAttention: segments of keys, and room for the sums over them.

test_every_operator.py compares its launches with those from PyTorch for few keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("torch")

from plugin_commands import create_command, tensor_commands

from edgeattn.ops.fft_rope_attention import SPEC
from edgeattn.ops.fft_rope_kernels import points_of, segments_of
from edgeattn.ops.spec import Case

CREATE = create_command(SPEC, {})
USUAL = {"B": 2, "H": 8, "Hkv": 4, "Tq": 9000, "S": 9000, "D": 64, "C": 3, "Hb": 1, "N": 1}


def case_of(degree: int = 2, **dims: int) -> Case:
    return Case("made", {**USUAL, "C": degree + 1, **dims}, "fp16", {"degree": degree})


def workspace(library: Any, case: Case) -> int:
    create = create_command(SPEC, case.attributes)
    answers = library.drive(create, *tensor_commands(SPEC, case), "workspace")
    return int(answers["workspace"])


def sizes_of(case: Case) -> dict[str, int]:
    """As kernels call them."""
    dims: Mapping[str, Any] = case.dims
    rows, keys, width, offsets = (dims[name] for name in ("Tq", "S", "D", "N"))
    segments = segments_of(rows, keys, width, dims["C"] - 1, offsets)
    sizes = {"B": dims["B"], "HKV": dims["Hkv"], "G": dims["H"] // dims["Hkv"], "TQ": rows}
    sizes |= {"S": keys, "D": width, "C": dims["C"], "LEVELS": segments.levels}
    sizes["POINTS"] = points_of(rows, keys, width, dims["C"] - 1, offsets)
    return sizes | {"SEGMENT": segments.length, "SEGMENTS": segments.number}


CUT = [
    case_of(),
    case_of(S=8191),
    case_of(Tq=63),
    case_of(degree=0, Tq=64, S=2048),
    case_of(degree=1, S=2047),
    case_of(degree=1, D=128, S=70_000),
    case_of(degree=2, D=128, S=40_000),
    case_of(degree=2, D=72, S=40_000, H=4),
    case_of(degree=2, D=8, S=5000),
    case_of(degree=3),
    case_of(N=2 * 9000 - 1),
    case_of(degree=2, D=16, Tq=6000, N=2 * 9000 - 1),
    case_of(degree=1, D=128, Tq=64, S=65, N=129),
    case_of(degree=2, D=24, Tq=6000, N=2 * 9000 - 1),
    case_of(degree=3, D=8, Tq=6000, N=2 * 9000 - 1),
    case_of(degree=1, Tq=7386, N=2 * 9000 - 1),
]


@pytest.mark.parametrize("case", CUT, ids=lambda case: f"{case.dims}")
def test_segments_are_those_of_pytorch(library: Any, case: Case) -> None:
    sizes = sizes_of(case)
    create = create_command(SPEC, case.attributes)
    commands = (create, "device", *tensor_commands(SPEC, case), "workspace", "shape", "enqueue")
    answers = library.drive(*commands, sm=99)
    assert answers["enqueue"] == "0", answers.logged
    summed = ["states", "prefix"] if sizes["SEGMENTS"] else []
    convolved = ["spectrum", "convolve"] if sizes["POINTS"] else []
    kernels = [launch.kernel for launch in answers.launches]
    assert kernels == [*summed, *convolved, "attend", "count"]
    for launch in answers.launches:
        passed = {name: launch.arguments[name] for name in sizes.keys() & launch.arguments.keys()}
        assert passed == {name: sizes[name] for name in passed}


def test_some_cases_have_segments_and_some_have_none() -> None:
    counts = [sizes_of(case)["SEGMENTS"] for case in CUT]
    assert counts == [5, 0, 0, 4, 0, 137, 5, 16, 10, 0, 0, 18, 0, 0, 0, 0]
    assert [sizes_of(case)["POINTS"] for case in CUT] == [0] * 11 + [15_040, 128, 0, 0, 0]


def test_sums_fit_into_the_workspace_of_larger_sizes(library: Any) -> None:
    from edgeattn.kernels.fft_rope_attention import workspaces

    room = workspace(library, case_of())
    assert workspace(library, case_of(N=2 * 9000 - 1)) == room
    for b, rows, keys in itertools.product((1, 2), (1, 64, 9000), (1, 8192, 8193, 9000)):
        case = case_of(B=b, Tq=rows, S=keys)
        shapes = workspaces(sizes_of(case)).values()
        needed = sum(math.ceil(4 * math.prod(shape) / 256) * 256 for shape in shapes)
        assert needed == workspace(library, case) <= room


@pytest.mark.parametrize(("degree", "width"), [(2, 16), (1, 64), (0, 8)])
def test_transforms_fit_into_the_workspace_of_larger_sizes(
    library: Any, degree: int, width: int
) -> None:
    """Which may be too large for the transform."""
    from edgeattn.kernels.fft_rope_attention import workspaces

    offsets = {"C": degree + 1, "D": width, "N": 2 * 20_000 - 1}
    room = workspace(library, case_of(degree, Tq=20_000, S=20_000, **offsets))
    for rows, keys in itertools.product((63, 64, 500, 16_000), (1, 385, 2049, 16_321)):
        case = case_of(degree, Tq=rows, S=keys, **offsets)
        shapes = workspaces(sizes_of(case)).values()
        needed = sum(math.ceil(4 * math.prod(shape) / 256) * 256 for shape in shapes)
        assert needed <= workspace(library, case) <= room


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"Hkv": 3}, "query heads in groups of one size per key head, but 8 for 3 came"),
        ({"C": 4}, "3 coefficients per head for degree 2, but 4 came"),
        ({"Hb": 3}, "one log_bias for all heads or one for each of 8, but 3 came"),
        ({"N": 17_997}, "an odd number of them from 17999 on, for 9000 keys, but 17997 came"),
        ({"N": 18_000}, "an odd number of them from 17999 on, for 9000 keys, but 18000 came"),
        ({"D": 136}, "multiples of 8 up to 128, but 136 came"),
        ({"D": 12}, "multiples of 8 up to 128, but 12 came"),
        ({"S": 2**25}, "at most 8388608 rows of 64 numbers, but 33554432 came"),
        ({"Tq": 2**25}, "at most 8388608 rows of 64 numbers, but 33554432 came"),
    ],
    ids=str,
)
def test_sizes_without_a_kernel_are_refused(library: Any, dims: dict, words: str) -> None:
    whole = tensor_commands(SPEC, case_of())
    symbols = {**USUAL, **dims}
    for i, tensor in enumerate(SPEC.inputs):
        kind, name, dtype, _, *rest = whole[i].split()
        shape = "x".join(str(symbols[str(symbol)]) for symbol in tensor.shape)
        whole[i] = " ".join([kind, name, dtype, shape, *rest])
    answers = library.drive(CREATE, "device", *whole, "shape")
    assert answers["shape"] == "1"
    assert words in answers.logged


@pytest.mark.parametrize(
    "attributes",
    [
        *({"degree": 5}, {"degree": -1}, {"sink": -1}, {"window": -1}, {"causal": 2}),
        *({"row_centre": 2}, {"scale": -1.0}),
    ],
    ids=str,
)
def test_bad_attributes_are_refused(library: Any, attributes: dict) -> None:
    answers = library.drive(create_command(SPEC, attributes))
    assert "FftRopeAttention" in answers.logged
    assert "expected" in answers.logged
