"""The plugin of HeadSparseAttention: dtypes of the cache, and room for the splits of all sizes.

test_every_operator.py compares its launches with those from PyTorch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from plugin_commands import create_command, tensor_commands

from edgeattn.ops.head_sparse_attention import SPEC
from edgeattn.ops.spec import Case

CREATE = create_command(SPEC, {})
LARGEST = {"B": 40, "H": 8, "Hkv": 4, "T": 1, "S": 9000, "D": 32, "K": 4}


def case_of(dtype: str = "fp16", cache: str | None = None, **dims: int) -> Case:
    return Case("made", {**LARGEST, **dims}, dtype, dtypes={"C": cache} if cache else {})


def test_a_cache_has_the_dtype_of_q_or_int8(library: Any) -> None:
    def supported(position: int, dtype: str, case: Case) -> bool:
        commands = tensor_commands(SPEC, case)
        answers = library.drive(CREATE, *commands, f"format {position} {dtype}")
        return bool(int(answers["format"]))

    dtypes = ("fp32", "fp16", "bf16", "int8", "int32")
    assert [supported(1, dtype, case_of()) for dtype in dtypes] == [0, 1, 0, 1, 0]
    assert [supported(1, dtype, case_of("bf16")) for dtype in dtypes] == [0, 0, 1, 1, 0]
    for cache in ("fp16", "int8"):  # v_cache as k_cache
        expected = [dtype == cache for dtype in dtypes]
        assert [supported(2, dtype, case_of(cache=cache)) for dtype in dtypes] == expected


@pytest.mark.parametrize("cache", ["fp32", "bf16"])
def test_another_cache_is_refused(library: Any, cache: str) -> None:
    commands = tensor_commands(SPEC, case_of())
    commands[1:3] = [line.replace(" fp16 ", f" {cache} ") for line in commands[1:3]]
    answers = library.drive(CREATE, "device", *commands, "configure", "shape")
    assert (answers["configure"], answers["shape"]) == ("1", "1")
    assert f"k_cache in the dtype of q or one of its own, but it is {cache}" in answers.logged


@pytest.mark.parametrize("cache", ["fp16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_kernels_are_those_for_the_cache(library: Any, rows: int, cache: str) -> None:
    commands = tensor_commands(SPEC, case_of(cache=cache, T=rows))
    answers = library.drive(CREATE, "device", *commands, "workspace", "shape", "enqueue", sm=99)
    assert answers["enqueue"] == "0", answers.logged
    suffix = "_int8" if cache == "int8" else ""
    expected = [f"decode{suffix}", "reduce"] if rows == 1 else [f"prefill{suffix}"]
    assert [launch.kernel for launch in answers.launches] == expected


def test_splits_fit_into_the_workspace_of_larger_sizes(library: Any) -> None:
    """Fewer active heads or sequences have more splits each."""
    from edgeattn.kernels.head_sparse_attention import splits_of, workspaces

    def workspace(case: Case) -> int:
        answers = library.drive(CREATE, *tensor_commands(SPEC, case), "workspace")
        return int(answers["workspace"])

    room = workspace(case_of())
    assert workspace(case_of(T=512)) == room  # it may still decode
    for b, k, s in itertools.product((1, 2, 3, 7, 26, 39, 40), (0, 1, 2, 3, 4), (1, 1300, 9000)):
        dims = {"B": b, "HKV": 4, "G": 2, "S": s, "D": 32, "K": k}
        dims["SPLITS"] = splits_of(dims)
        shapes = workspaces(dims).values()
        needed = sum(math.ceil(4 * math.prod(shape) / 256) * 256 for shape in shapes)
        assert needed <= workspace(case_of(B=b, K=k, S=s)) <= room


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"Hkv": 3}, "query heads in groups of one size per key head, but 8 for 3 came"),
        ({"T": 0}, "at least one row, but 0 came"),
        ({"D": 136}, "multiples of 8 up to 128, but 136 came"),
        ({"D": 12}, "multiples of 8 up to 128, but 12 came"),
        ({"S": 2**25}, "at most 16777216 rows of 32 numbers, but 33554432 came"),
        ({"T": 2**25}, "at most 16777216 rows of 32 numbers, but 33554432 came"),
    ],
    ids=str,
)
def test_sizes_without_a_kernel_are_refused(library: Any, dims: dict, words: str) -> None:
    whole = tensor_commands(SPEC, case_of())
    shapes = SPEC.input_shapes(replace(case_of(), dims={**LARGEST, **dims}))
    for i, shape in enumerate(shapes):
        kind, name, dtype, _, *rest = whole[i].split()
        whole[i] = " ".join([kind, name, dtype, "x".join(map(str, shape)), *rest])
    answers = library.drive(CREATE, "device", *whole, "shape")
    assert answers["shape"] == "1"
    assert words in answers.logged


@pytest.mark.parametrize("attributes", [{"groups": 2}, {"scale": -1.0}], ids=str)
def test_bad_attributes_are_refused(library: Any, attributes: dict) -> None:
    answers = library.drive(create_command(SPEC, attributes))
    assert "HeadSparseAttention" in answers.logged
    assert "expected" in answers.logged
