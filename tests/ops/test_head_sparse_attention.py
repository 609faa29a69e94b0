"""`HeadSparseAttention` against loops in fp64 and dense attention; sets of heads and lengths.

test_implementations.py compares all implementations in all dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    case_id,
    case_inputs,
    exact_outputs,
    op_model,
    relative_error,
    run_onnx,
    torch_op,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edgeattn.engine.plugins import plugin_nodes
from edgeattn.errors import RuntimeInputError
from edgeattn.ops.head_sparse_attention import SPEC, reference, variants
from edgeattn.ops.spec import Case

H, HKV, S, D = 6, 3, 40, 16


def loops(
    inputs: Sequence[Tensor], *, groups: int = 0, scale: float = 0.0
) -> tuple[Tensor, list[int]]:
    """The formula in fp64, number by number, and the errors found on the way."""
    q, k, v, k_scale, v_scale = (x.double().numpy() for x in inputs[:5])
    (batch, heads, rows, width), (_, kv_heads, capacity, _) = q.shape, k.shape
    y, errors = np.zeros(q.shape), []
    for b in range(batch):
        active: set[int] = set()
        wrong = 0
        for index in inputs[5][b].tolist():
            if index == -1:
                continue
            if index in active or not 0 <= index < (kv_heads if groups else heads):
                wrong += 1
                continue
            active.add(index)
        length = int(inputs[6][b])
        errors.append(wrong + (not 0 <= length <= capacity))
        length = min(max(length, 0), capacity)
        for h in range(heads):
            kv_head = h * kv_heads // heads
            if rows == 1 and (kv_head if groups else h) not in active:
                continue
            for t in range(rows):
                weights, total = [], np.zeros(width)
                for j in range(length - rows + t + 1):
                    score = (q[b, h, t] * k[b, kv_head, j]).sum() * k_scale[kv_head]
                    weights.append(math.exp(score * (scale or 1 / math.sqrt(width))))
                    total += weights[-1] * v[b, kv_head, j] * v_scale[kv_head]
                if weights:
                    y[b, h, t] = total / sum(weights)
    return torch.from_numpy(y), errors


def body(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    (b, h, t, d), (_, kv, s, _) = inputs[0].shape, inputs[1].shape
    dims = {"B": b, "H": h, "Hkv": kv, "T": t, "S": s, "D": d, "K": inputs[5].shape[1]}
    dtypes = {"C": "int8"} if inputs[1].dtype == torch.int8 else {}
    case = Case("made", dims, attributes=attributes, dtypes=dtypes)
    y, errors = run_onnx(op_model(SPEC, case, 21, dynamic=("B", "T", "S")), inputs)
    return y, errors


def definition(inputs: Sequence[Tensor], **attributes: float) -> tuple[Tensor, Tensor]:
    return reference(*inputs, **attributes)


IMPLEMENTATIONS = pytest.mark.parametrize("run", [definition, body])


def made(
    index: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    rows: int = 1,
    kv_heads: int = HKV,
    seed: int = 0,
) -> list[Tensor]:
    """Inputs with such indices and lengths, one of each per sequence."""
    dims = {"B": len(lengths), "H": H, "Hkv": kv_heads, "T": rows, "S": S, "D": D}
    case = Case("made", {**dims, "K": len(index[0])})
    inputs = case_inputs(SPEC, case, seed=seed)
    inputs[5] = torch.tensor(index, dtype=torch.int32).reshape(len(lengths), -1)
    inputs[6] = torch.tensor(lengths, dtype=torch.int32)
    return inputs


def dense(inputs: Sequence[Tensor], sequence: int, length: int) -> Tensor:
    """One sequence in torch's own attention, all heads: `[H, T, D]`."""
    q, k, v, k_scale, v_scale = inputs[:5]
    rows, q_per_kv = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (
        (x[sequence, :, :length] * scales[:, None, None]).repeat_interleave(q_per_kv, 0)
        for x, scales in ((k, k_scale), (v, v_scale))
    )
    mask = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    return scaled_dot_product_attention(q[sequence], k, v, attn_mask=mask)


@pytest.mark.parametrize("case", SPEC.cases, ids=case_id)
def test_reference_is_the_formula_in_fp64(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    y, errors = exact_outputs(SPEC, case, inputs)
    exact, wrong = loops(inputs, **case.attributes)
    assert relative_error(y, exact) < 1e-5
    assert errors.tolist() == wrong


@IMPLEMENTATIONS
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("groups", [0, 1])
def test_all_heads_are_dense_attention(run, groups: int, kv_heads: int) -> None:
    listed = range(kv_heads if groups else H)
    inputs = made([[*listed], [*listed][::-1]], [S, 7], kv_heads=kv_heads)
    y, errors = run(inputs, groups=groups)
    for b, length in enumerate((S, 7)):
        assert relative_error(y[b], dense(inputs, b, length)) < 1e-5
    assert errors.tolist() == [0, 0]


@given(data=st.data(), groups=st.integers(0, 1), kv_heads=st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=30, deadline=None)
def test_active_heads_are_dense_attention_and_others_0(data, groups: int, kv_heads: int) -> None:
    count = kv_heads if groups else H
    slots = st.permutations([*range(count), *[-1] * 4])
    index = [data.draw(slots)[:5] for _ in range(2)]
    lengths = [data.draw(st.integers(1, S)) for _ in range(2)]
    inputs = made(index, lengths, kv_heads=kv_heads, seed=data.draw(st.integers(0, 99)))
    for y, errors in (reference(*inputs, groups=groups), body(inputs, groups=groups)):
        assert errors.tolist() == [0, 0]
        for b, length in enumerate(lengths):
            right = dense(inputs, b, length)
            for h in range(H):
                if (h * kv_heads // H if groups else h) in index[b]:
                    assert relative_error(y[b, h], right[h]) < 1e-5
                else:
                    assert (y[b, h] == 0).all()


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("rows", [2, 7, S])
def test_prefill_is_dense_and_causal_over_all_heads(rows: int, kv_heads: int) -> None:
    inputs = made([[0, -1], [-1, -1]], [S, max(rows, 9)], rows=rows, kv_heads=kv_heads)
    for y, errors in (reference(*inputs), body(inputs)):
        for b, length in enumerate(inputs[6].tolist()):
            assert relative_error(y[b], dense(inputs, b, length)) < 1e-5
        assert errors.tolist() == [0, 0]


def test_prefill_and_decode_are_one() -> None:
    inputs = made([[*range(H)]], [S], rows=5)
    whole, _ = reference(*inputs)
    for t in range(5):
        step = [inputs[0][:, :, t : t + 1], *inputs[1:6], torch.tensor([S - 4 + t])]
        assert relative_error(whole[:, :, t : t + 1], reference(*step)[0]) < 1e-6


@pytest.mark.parametrize("rows", [1, 3])
def test_only_sentinels_are_zeros_and_no_error(rows: int) -> None:
    inputs = made([[-1, -1, -1], [-1, -1, -1]], [9, S], rows=rows)
    for y, errors in (reference(*inputs), body(inputs)):
        assert bool((y == 0).all()) == (rows == 1)
        assert errors.tolist() == [0, 0]


@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        ([0, 0, 1], 1),
        ([2, 2, 2], 2),
        ([-2, 0, -1], 1),
        ([2**31 - 1, -(2**31), 1], 2),
        ([99, 99, 99], 3),
        ([-1, 2, -1], 0),
    ],
    ids=str,
)
def test_wrong_indices_are_counted_and_skipped(index: list[int], wrong: int, groups: int) -> None:
    inputs = made([index, [0, 1, 2]], [S, 5])
    exact, errors = loops(inputs, groups=groups)
    assert errors == [wrong, 0]
    for y, found in (reference(*inputs, groups=groups), body(inputs, groups=groups)):
        assert found.tolist() == [wrong, 0]
        assert relative_error(y, exact) < 1e-5


@pytest.mark.parametrize("groups", [0, 1])
def test_the_first_index_out_of_range(groups: int) -> None:
    count = HKV if groups else H
    inputs = made([[count - 1, count]], [S])
    for y, found in (reference(*inputs, groups=groups), body(inputs, groups=groups)):
        assert found.tolist() == [1]
        assert (y[0, -1] != 0).any()
        assert (y[0, 0] == 0).all()


@pytest.mark.parametrize("rows", [1, 4])
def test_lengths_that_are_none(rows: int) -> None:
    lengths = [0, -1, -(2**31), S + 1, 2**31 - 1, S]
    inputs = made([[0, 2]] * 6, lengths, rows=rows)
    for y, errors in (reference(*inputs), body(inputs)):
        assert errors.tolist() == [0, 1, 1, 1, 1, 0]
        assert (y[:3] == 0).all()
        for b in (3, 4):  # as if they were S
            alone = [x[b : b + 1] if x.shape[0] == 6 else x for x in inputs[:6]]
            right, _ = reference(*alone, torch.tensor([S]))
            assert relative_error(y[b : b + 1], right) < 1e-5


def test_rows_before_the_first_key_are_0() -> None:
    inputs = made([[-1]], [3], rows=5)
    for y, errors in (reference(*inputs), body(inputs)):
        assert (y[0, :, :2] == 0).all()
        assert relative_error(y, loops(inputs)[0]) < 1e-5
        assert errors.tolist() == [0]


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_behind_the_last_key_is_not_used(rows: int) -> None:
    inputs = made([[*range(H)]] * 2, [9, 0], rows=rows)
    exact, _ = loops(inputs)
    for cache in inputs[1:3]:
        cache[0, :, 9:], cache[1] = math.nan, math.inf
    for y, _ in (reference(*inputs), body(inputs)):
        assert relative_error(y, exact) < 1e-5


def test_scores_may_be_large() -> None:
    inputs = made([[*range(H)]], [S])
    inputs[0] *= 1e4
    exact = torch.cat([dense(inputs, 0, S)[None]])
    for y, _ in (reference(*inputs), body(inputs)):
        assert relative_error(y, exact) < 1e-5


@pytest.mark.parametrize("groups", [0, 1])
def test_the_other_meaning_of_an_index_fails(groups: int) -> None:
    inputs = made([[1, 2]], [S])
    right, _ = loops(inputs, groups=groups)
    assert relative_error(reference(*inputs, groups=1 - groups)[0], right) > 0.3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({1: (2, 4, 40, 16), 2: (2, 4, 40, 16), 3: (4,), 4: (4,)}, "groups of one size .* 6 for 4"),
        ({0: (2, 6, 0, 16)}, "at least one row.* 0 came"),
        ({2: (2, 3, 41, 16)}, r"v_cache \[B, Hkv, S, D\] with S = 40"),
        ({3: (6,)}, r"k_scale \[Hkv\] with Hkv = 3"),
        ({5: (2,)}, r"head_index \[B, K\], but"),
        ({6: (3,)}, r"kv_len \[B\] with B = 2"),
    ],
    ids=str,
)
def test_refused_shapes(changed: dict, words: str) -> None:
    shapes = [tuple(x.shape) for x in made([[0], [1]], [1, 1])]
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*(changed.get(i, shape) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize(
    ("attributes", "words"),
    [({"groups": 2}, "groups of 0 or 1"), ({"scale": -1.0}, "finite scale of at least 0")],
    ids=str,
)
def test_refused_attributes(attributes: dict, words: str) -> None:
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*SPEC.input_shapes(SPEC.cases[0]), **attributes)


def in_int8(inputs: Sequence[Tensor]) -> list[Tensor]:
    """With a cache in int8 and a scale per key head, as far as the cache is filled."""
    caches, scales = [], []
    for cache in inputs[1:3]:
        scale = cache.abs().amax((0, 2, 3)) / 127
        caches.append((cache / scale[:, None, None]).round().to(torch.int8))
        scales.append(scale)
    return [inputs[0], *caches, *scales, *inputs[5:]]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("groups", [0, 1])
def test_an_int8_cache_is_its_numbers_times_the_scales(groups: int, rows: int) -> None:
    inputs = made([[2, 0, -1]] * 2, [S, 9], rows=rows)
    inputs[3:5] = [torch.ones(HKV)] * 2
    quantised = in_int8(inputs)
    exact, errors = loops(quantised, groups=groups)
    assert errors == [0, 0]
    for run in (definition, body):
        y, _ = run(quantised, groups=groups)
        assert relative_error(y, exact) < 1e-5
    # Half a step of 1 / 127 of the largest number, in keys and values.
    assert relative_error(exact, loops(inputs, groups=groups)[0]) < 0.02


@pytest.mark.parametrize(
    ("q", "cache", "words"),
    [
        (torch.float16, torch.float32, "k_cache in fp16 or int8, like q .* but it is fp32"),
        (torch.float32, torch.bfloat16, "k_cache in fp32 or int8, like q .* but it is bf16"),
        (torch.float32, torch.int32, "k_cache in fp32 or fp16 or bf16 or int8 .* it is int32"),
    ],
    ids=str,
)
def test_other_caches_are_refused(q: torch.dtype, cache: torch.dtype, words: str) -> None:
    inputs = made([[0]], [9])
    inputs = [inputs[0].to(q), *(x.to(cache) for x in inputs[1:3]), *inputs[3:]]
    with pytest.raises(RuntimeInputError, match=words):
        torch_op(SPEC)(*inputs)


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_node_knows_the_dtype_of_its_cache(cache: str) -> None:
    case = next(case for case in SPEC.cases if case.name == "decode")
    model = op_model(SPEC, replace(case, dtypes={"C": cache}), 21)
    (found,) = plugin_nodes(model)
    assert found.dtypes == {"C": cache}


def test_kernels_that_a_node_needs() -> None:
    def names(**dims: int | str | None) -> list[tuple[str, dict[str, int]]]:
        found = variants({"T": 1, "S": 4096, "D": 64, **dims}, {})
        return [(name.partition(".")[2], constants) for name, constants in found]

    decode, reduce, prefill = ("decode", {"BLOCK": 64}), ("reduce", {}), ("prefill", {"BLOCK": 64})
    assert names() == [decode, reduce]
    assert names(T=2) == [prefill]
    assert names(C="fp16") == names()
    assert names(C="int8") == [("decode_int8", {"BLOCK": 64}), reduce]
    assert names(T=2, C="int8") == [("prefill_int8", {"BLOCK": 64})]
    assert names(T=None, S=None) == [decode, reduce, prefill]
    assert names(T=None, D=None) == []
    assert names(D=8)[0] == ("decode", {"BLOCK": 32})
    for dims, words in (
        ({"D": 136}, "multiples of 8 up to 128, but 136 came"),
        ({"D": 12}, "multiples of 8 up to 128, but 12 came"),
        ({"S": 2**24}, "at most 8388608 rows of 64 numbers, but 16777216 came"),
        ({"T": 2**24}, "at most 8388608 rows of 64 numbers, but 16777216 came"),
    ):
        with pytest.raises(RuntimeInputError, match=words):
            names(**dims)


def test_cases_hold_what_they_are_for() -> None:
    """Random indices and lengths: all kinds of errors, heads that are active and that are not."""
    counts = []
    for case in SPEC.cases:
        y, errors = exact_outputs(SPEC, case, case_inputs(SPEC, replace(case, dtype="fp32")))
        counts += errors.tolist()
        if case.name in ("decode", "decode-groups", "no-groups", "odd-width"):
            assert (y == 0).all(-1).any()
            assert (y != 0).any()
    assert {0, 1, 2, 3} <= set(counts)
