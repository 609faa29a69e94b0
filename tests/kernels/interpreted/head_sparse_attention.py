"""The kernels of HeadSparseAttention, interpreted: heads, lengths, splits, errors.

torch_operators.py compares them with the reference in all dtypes.

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
from torch.nn.functional import scaled_dot_product_attention

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels import head_sparse_attention as module
from edgeattn.kernels.head_sparse_attention import (
    KERNELS,
    MOST_SPLITS,
    complete_constants,
    head_sparse_attention,
    splits_of,
    workspaces,
)
from edgeattn.ops.head_sparse_attention import INT8_SUFFIX, SPEC, reference, variants
from edgeattn.ops.spec import Case

FLOOR = SPEC.tolerance["fp32"].floor
# Around tiles of 64 keys and the fewest of a split.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 300]


def made(
    index: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rows: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    capacity: int = 300,
    dtype: str = "fp32",
) -> list[Tensor]:
    """Inputs of head dimension 16 with such indices and lengths, one of each per sequence."""
    dims = {"B": len(lengths), "H": heads, "Hkv": kv_heads, "T": rows, "S": capacity, "D": 16}
    case = Case("made", {**dims, "K": len(index[0])}, dtype)
    inputs = case_inputs(SPEC, case, seed=sum(lengths) % 99)
    inputs[5] = torch.tensor(index, dtype=torch.int32).reshape(len(lengths), -1)
    inputs[6] = torch.tensor(lengths, dtype=torch.int32)
    return inputs


def run(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    """The kernels, in memory that nobody has written to before."""
    y, errors = head_sparse_attention(*inputs, **attributes)
    return y, errors


def agrees(inputs: Sequence[Tensor], **attributes: float) -> Tensor:
    """The kernels' y, which is the reference's."""
    y, errors = run(inputs, **attributes)
    right, wrong = reference(*inputs, **attributes)
    assert relative_error(y, right) <= FLOOR
    assert errors.tolist() == wrong.tolist()
    return y


@pytest.fixture(autouse=True)
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what is no result."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = new_empty(self, *shape, **options)
        return made.fill_(math.nan if made.is_floating_point() else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [0, 1])
def test_all_heads_are_dense_attention(groups: int, length: int) -> None:
    inputs = made([[1, 0] if groups else [1, 0, 3, 2]], [length])
    y, errors = run(inputs, groups=groups)
    q, k, v, k_scale, v_scale = inputs[:5]
    k, v = (
        (x[:, :, :length] * scales[:, None, None]).repeat_interleave(2, 1)
        for x, scales in ((k, k_scale), (v, v_scale))
    )
    assert relative_error(y, scaled_dot_product_attention(q, k, v)) <= FLOOR
    assert errors.tolist() == [0]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (17, 1), (40, 2)])
@pytest.mark.parametrize("groups", [0, 1])
def test_heads_in_groups_of_any_size(groups: int, heads: int, kv_heads: int) -> None:
    count = kv_heads if groups else heads
    index = [[count - 1, -1, 0], [-1, count // 2, -1], [-1, -1, -1]]
    inputs = made(index, [150, 90, 300], heads=heads, kv_heads=kv_heads)
    y = agrees(inputs, groups=groups)
    assert (y[2] == 0).all()
    active = (y != 0).any(-1).squeeze(-1).sum(1).tolist()
    size = heads // kv_heads if groups else 1
    assert active == [size * len({0, count - 1}), size, 0]


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 17, MOST_SPLITS])
def test_any_number_of_splits(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Also more than there are tiles of keys."""
    monkeypatch.setattr(module, "splits_of", lambda dims: splits)
    agrees(made([[0, 3], [2, -1], [1, 0], [1, 2]], [300, 129, 1, 0]))


@pytest.mark.parametrize("rows", [2, 3, 64, 65, 150])
def test_prefill_of_ragged_lengths(rows: int) -> None:
    y = agrees(made([[-1], [0], [5], [-1]], [300, rows, max(rows - 5, 0), 0], rows=rows))
    assert (y[0] != 0).any(-1).all()
    assert (y[3] == 0).all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("groups", [0, 1])
def test_wrong_indices_and_lengths_are_counted(groups: int, rows: int) -> None:
    slots = 70  # more than are read at once
    index = [
        [-1] * slots,
        [0] * slots,
        [2**31 - 1, -(2**31), *[-2] * (slots - 2)],
        [-1, 1, *[-1] * (slots - 3), 1],
        [*range(slots)],
        [*range(slots)][::-1],
    ]
    inputs = made(index, [300, 301, -1, 2**31 - 1, -(2**31), 0], rows=rows)
    agrees(inputs, groups=groups)
    count = 2 if groups else 4
    errors = run(inputs, groups=groups)[1].tolist()
    assert errors == [0, slots - 1 + 1, slots + 1, 2, slots - count + 1, slots - count]


@pytest.mark.parametrize("rows", [1, 70])
def test_what_is_behind_the_last_key_is_not_used(rows: int) -> None:
    inputs = made([[0, 1, 2, 3]] * 3, [75, 0, 128], rows=rows)
    right, _ = reference(*inputs)
    for cache in inputs[1:3]:
        cache[0, :, 75:], cache[1], cache[2, :, 128:] = math.nan, math.inf, math.nan
    assert relative_error(run(inputs)[0], right) <= FLOOR


def test_heads_that_are_not_active_are_not_used() -> None:
    inputs = made([[2, -1]], [200])
    right, _ = reference(*inputs)
    for tensor, others in ((inputs[0], [0, 1]), (inputs[1], [0]), (inputs[2], [0])):
        tensor[:, others] = math.nan
    inputs[0][:, 3] = 100.0
    assert relative_error(run(inputs)[0], right) <= FLOOR


@pytest.mark.parametrize("rows", [1, 70])
def test_large_scores_in_fp16(rows: int) -> None:
    case = Case("made", {}, "fp16")
    inputs = made([[0, 1, 2, 3]], [300], rows=rows, dtype="fp16")
    inputs[0] *= 300
    inputs[1] *= 300
    check_outputs(SPEC, case, run(inputs), exact_outputs(SPEC, case, inputs))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("rows", [1, 70])
def test_int8_caches(rows: int, dtype: str) -> None:
    """In which every number is exact in 16 bits, also the outermost."""
    inputs = made([[0, 1, 3]] * 3, [300, 129, 0], rows=rows, dtype=dtype)
    for i in (1, 2):
        inputs[i] = (30 * inputs[i].float()).round().clamp(-128, 127).to(torch.int8)
        inputs[i][:, :, ::50] = -128
        inputs[i][:, :, 1::50] = 127
        inputs[i + 2] = torch.tensor([0.03, 0.01])
    case = Case("made", {}, dtype, dtypes={"C": "int8"})
    check_outputs(SPEC, case, run(inputs), exact_outputs(SPEC, case, inputs))


@pytest.mark.parametrize(("k", "capacity"), [(0, 300), (3, 0), (0, 0)])
def test_nothing_to_do(k: int, capacity: int) -> None:
    inputs = made([[0] * k] * 2, [0, 0], capacity=capacity)
    assert (agrees(inputs) == 0).all()


def test_tensors_need_not_be_contiguous() -> None:
    inputs = made([[1, 2]] * 2, [200, 130])
    beside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    assert torch.equal(run([*beside, *inputs[3:]])[0], run(inputs)[0])


SIZES = {"B": 1, "HKV": 8, "G": 4, "S": 8192, "D": 128, "K": 8}


@pytest.mark.parametrize(
    ("changed", "splits"),
    [
        ({}, 64),
        ({"S": 1}, 1),
        ({"S": 0}, 1),
        ({"S": 1000}, 8),
        ({"B": 64}, 2),
        ({"B": 64, "K": 4}, 4),  # half of the heads: twice the splits
        ({"B": 64, "K": 99}, 2),
        ({"B": 5000}, 1),
        ({"K": 0}, 64),
    ],
    ids=str,
)
def test_splits_follow_the_active_heads(changed: dict, splits: int) -> None:
    assert splits_of({**SIZES, **changed}) == splits


@given(st.data())
def test_grids(data: st.DataObject) -> None:
    names = ("B", "HKV", "G", "T", "D", "SPLITS", "BLOCK", "MEMBERS", "CHUNK", "ROWS")
    values = {name: data.draw(st.integers(1, 99)) for name in names}
    kv_heads = values["B"] * values["HKV"]
    heads = kv_heads * values["G"]
    expected = {
        "decode": math.ceil(values["G"] / values["MEMBERS"]) * values["SPLITS"] * kv_heads,
        "reduce": math.ceil(values["D"] / values["BLOCK"]) * heads,
        "prefill": math.ceil(values["T"] / values["CHUNK"]) * heads,
    }
    for kernel in KERNELS:
        name = kernel.name.split(".")[1].removesuffix(INT8_SUFFIX)
        assert kernel.blocks(values) == (expected[name], 1, 1)


@given(width=st.sampled_from(range(8, 129, 8)))
def test_constants_fit_together(width: int) -> None:
    kernels = {kernel.name: kernel for kernel in KERNELS}
    for name, given_constants in variants({"T": None, "S": None, "D": width}, {}):
        constants = complete_constants(kernels[name], given_constants)
        assert tuple(constants) == kernels[name].constants
        if not name.endswith("reduce"):
            assert width <= constants["BLOCK"] <= max(2 * width, 32)
    shapes = workspaces({**SIZES, "D": width, "SPLITS": 7})
    assert shapes == {"means": (1, 8, 4, 7, width), "weights": (1, 8, 4, 7)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: torch.float64}, "q in fp32 or fp16 or bf16 .* but it is torch.float64"),
        ({1: torch.float16}, "v_cache in fp16 like k_cache .* but it is fp32"),
        ({5: torch.int64}, "head_index in int32 .* but it is torch.int64"),
        ({6: torch.int64}, "kv_len in int32 .* but it is torch.int64"),
    ],
)
def test_dtypes_without_a_kernel_are_refused(changed: dict, words: str) -> None:
    inputs = made([[0]], [9])
    with pytest.raises(RuntimeInputError, match=words):
        run([x.to(changed.get(i, x.dtype)) for i, x in enumerate(inputs)])


@pytest.mark.parametrize("width", [12, 136])
def test_dimensions_without_a_kernel_are_refused(width: int) -> None:
    case = SPEC.cases[0]
    inputs = case_inputs(SPEC, replace(case, dims={**case.dims, "D": width}))
    with pytest.raises(RuntimeInputError, match=f"multiples of 8 up to 128, but {width} came"):
        run(inputs)
