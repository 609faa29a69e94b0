"""The kernels of RecurrentLinearAttention, interpreted: against the formula in fp64.

torch_operators.py compares them with the reference in all dtypes.

Run by test_interpreted.py, with TRITON_INTERPRET=1 set before Triton is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_cases import case_id, case_inputs, check_outputs, exact_outputs, relative_error
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels.recurrent_linear_attention import (
    KERNELS,
    complete_constants,
    launch,
    recurrent_linear_attention,
)
from edgeattn.ops.kernel_widths import BLOCKS
from edgeattn.ops.recurrent_linear_attention import SPEC, variants
from edgeattn.ops.spec import Case

ATTRIBUTES = {"delta": 0, "normalise": 0, "scale": 0.0, "epsilon": 1e-6}
RULES = [{}, {"delta": 1}, {"normalise": 1}]
FLOOR = SPEC.tolerance["fp32"].floor


def case_of(
    length: int, *, batch: int = 1, dg: int = 1, dtype: str = "fp32", **attributes: float
) -> Case:
    """Two query heads on one key head of 16 x 8, with keys as the rule wants them."""
    dims = {"B": batch, "H": 2, "Hkv": 1, "T": length, "Dk": 16, "Dv": 8, "Dg": dg}
    values = {"k": "unit-norm"}
    if attributes.get("normalise"):
        values = dict.fromkeys(("q", "k", "past_normaliser"), "non-negative")
    return Case("made", dims, dtype, attributes, values)


def loop(
    inputs: Sequence[Tensor],
    *,
    delta: int = 0,
    normalise: int = 0,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> list[Tensor]:
    """The formula row by row in fp64, every query head with a state of its own."""
    q, *rest = (x.double().numpy() for x in inputs)
    group = q.shape[1] // rest[0].shape[1]
    k, v, log_decay, beta, state, normaliser = (np.repeat(x, group, axis=1) for x in rest)
    q = q * (scale or 1 / math.sqrt(q.shape[-1]))
    rows: list[NDArray[np.float64]] = []
    for t in range(q.shape[2]):
        decay, key, value = np.exp(log_decay[:, :, t]), k[:, :, t], v[:, :, t]
        state = decay[..., None] * state
        if delta:
            known = np.einsum("bhd,bhdv->bhv", key, state)
            value = beta[:, :, t, None] * (value - known)
        state = state + key[..., :, None] * value[..., None, :]
        row = np.einsum("bhd,bhdv->bhv", q[:, :, t], state)
        if normalise:
            normaliser = decay * normaliser + key
            weight = np.einsum("bhd,bhd->bh", q[:, :, t], normaliser)
            row = row / (weight + epsilon)[..., None]
        rows.append(row)
    y = np.stack(rows, axis=2)
    return [torch.from_numpy(x) for x in (y, state[:, ::group], normaliser[:, ::group])]


def assert_exact(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for value, right in zip(found, exact, strict=True):
        assert relative_error(value, right) <= FLOOR


# Triton's interpreter computes bf16 wrongly.
CASES = [case for case in SPEC.cases if case.dtype != "bf16"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_cases(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    found = recurrent_linear_attention(*inputs, **case.attributes)
    check_outputs(SPEC, case, found, loop(inputs, **case.attributes))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 128, 129, 193])
def test_lengths_around_chunks_and_spans(length: int, rule: dict) -> None:
    inputs = case_inputs(SPEC, case_of(length, **rule))
    assert_exact(recurrent_linear_attention(*inputs, **rule), loop(inputs, **rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [15, 16, 17, 65])
def test_lengths_with_a_decay_per_channel(length: int, rule: dict) -> None:
    inputs = case_inputs(SPEC, case_of(length, batch=2, dg=16, **rule))
    assert_exact(recurrent_linear_attention(*inputs, **rule), loop(inputs, **rule))


def test_no_rows_leave_the_state() -> None:
    inputs = case_inputs(SPEC, case_of(0))
    y, state, normaliser = recurrent_linear_attention(*inputs)
    assert y.shape == (1, 2, 0, 8)
    assert torch.equal(state, inputs[5])
    assert torch.equal(normaliser, inputs[6])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dg", [1, 16])
@pytest.mark.parametrize("length", [6, 80])
def test_strong_decay_then_weak(length: int, dg: int, rule: dict) -> None:
    """Differences of cumulative sums are 12 % off behind -1000, and NaN behind -inf."""
    inputs = case_inputs(SPEC, case_of(length, dg=dg, **rule))
    log_decay = torch.full_like(inputs[3], -0.001)
    log_decay[:, :, 1 : length // 2 : 3] = -1000.0
    log_decay[..., length // 2, :1] = -math.inf  # of one channel, where each has its own
    inputs[3] = log_decay
    assert_exact(recurrent_linear_attention(*inputs, **rule), loop(inputs, **rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dg", [1, 16])
def test_state_carried_over_a_split(dg: int, rule: dict) -> None:
    inputs = case_inputs(SPEC, case_of(45, dg=dg, **rule))
    parts, carried = [], inputs[5:]
    for rows in (slice(0, 5), slice(5, 45)):
        part = [x[:, :, rows] for x in inputs[:5]]  # not contiguous
        y, *carried = recurrent_linear_attention(*part, *carried, **rule)
        parts.append(y)
    assert_exact((torch.cat(parts, 2), *carried), recurrent_linear_attention(*inputs, **rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("length", [2, 18])
def test_state_in_place(length: int, width: int, rule: dict) -> None:
    case = case_of(length, **rule)
    inputs = case_inputs(SPEC, replace(case, dims={**case.dims, "Dk": width, "Dv": width}))
    exact = recurrent_linear_attention(*inputs, **rule)
    tensors = {tensor.name: x for tensor, x in zip(SPEC.inputs, inputs, strict=True)}
    tensors["y"] = torch.empty_like(exact[0])
    tensors["present_state"] = tensors["past_state"]
    tensors["present_normaliser"] = tensors["past_normaliser"]
    launch(tensors, {**ATTRIBUTES, **rule})
    for value, right in zip(("y", "past_state", "past_normaliser"), exact, strict=True):
        assert torch.equal(tensors[value], right)


@pytest.mark.parametrize("length", [7, 40])
@pytest.mark.parametrize("dg", [1, 16])
def test_a_decay_one_step_late_is_found(dg: int, length: int) -> None:
    inputs = case_inputs(SPEC, case_of(length, dg=dg))
    exact = loop(inputs)
    assert_exact(recurrent_linear_attention(*inputs), exact)
    inputs[3] = torch.cat([torch.zeros_like(inputs[3][:, :, :1]), inputs[3][:, :, :-1]], 2)
    for value, right in zip(recurrent_linear_attention(*inputs)[:2], exact[:2], strict=True):
        assert relative_error(value, right) > 0.1


@pytest.mark.parametrize("dg", [1, 16])
def test_scores_and_states_may_leave_the_range_of_fp16(dg: int) -> None:
    case = case_of(80 if dg > 1 else 150, dg=dg, dtype="fp16", normalise=1)
    inputs = case_inputs(SPEC, case)
    inputs[0] *= 300
    inputs[1] *= 300
    inputs[3] *= 0.001
    inputs[5] *= 1e6
    found = recurrent_linear_attention(*inputs, **case.attributes)
    exact = exact_outputs(SPEC, case, inputs)
    assert exact[1].abs().max() > 1e5
    check_outputs(SPEC, case, found, exact)


@given(st.data())
def test_grids(data: st.DataObject) -> None:
    names = ("B", "HKV", "T", "DK", "DV", "BLOCK", "BLOCK_V", "CHUNK", "CHANNELS", "SPAN")
    values = {name: data.draw(st.integers(1, 9999)) for name in (*names, "H", "DG")}

    def parts(whole: str, part: str) -> int:
        return math.ceil(values[whole] / values[part])

    key_heads, heads = values["B"] * values["HKV"], values["B"] * values["H"]
    blocks, chunks = parts("DV", "BLOCK_V"), parts("T", "CHUNK")
    expected = {
        "decode": blocks * key_heads,
        "prepare": chunks * key_heads,
        "states": blocks * key_heads,
        "outputs": blocks * chunks * heads,
    }
    for kernel in KERNELS:
        assert kernel.blocks(values) == (expected[kernel.name.split(".")[1]], 1, 1)


@given(
    width=st.sampled_from(range(8, 129, 8)),
    length=st.integers(1, 300),
    channels=st.booleans(),
    normalise=st.booleans(),
)
def test_constants_fit_together(width: int, length: int, channels: bool, normalise: bool) -> None:
    dims = {"T": length, "Dk": width, "Dv": 8, "Dg": width if channels else 1}
    attributes = {**ATTRIBUTES, "normalise": int(normalise)}
    kernels = {kernel.name: kernel for kernel in KERNELS}
    for name, given_constants in variants(dims, attributes):
        constants = complete_constants(kernels[name], given_constants)
        assert tuple(constants) == kernels[name].constants
        assert constants["BLOCK"] in BLOCKS
        assert width <= constants["BLOCK"] <= max(2 * width, BLOCKS[0])
        assert constants.get("SPAN", 0) % constants.get("CHUNK", 1) == 0
        if name.endswith("decode") and normalise:
            assert constants["BLOCK_V"] == constants["BLOCK"]  # the normaliser may be in place


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: torch.float64}, "q in fp32 or fp16 or bf16 .* but it is torch.float64"),
        ({1: torch.float16}, "k in fp32 like q .* but it is fp16"),
        ({5: torch.float16}, "past_state in fp32 .* but it is fp16"),
    ],
)
def test_dtypes_without_a_kernel_are_refused(changed: dict, words: str) -> None:
    inputs = case_inputs(SPEC, case_of(20))
    converted = [x.to(changed.get(i, x.dtype)) for i, x in enumerate(inputs)]
    with pytest.raises(RuntimeInputError, match=words):
        recurrent_linear_attention(*converted)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"Dk": 136}, "head dimensions that are multiples of 8 up to 128, but 136 and 8"),
        ({"Dv": 12}, "head dimensions that are multiples of 8 up to 128, but 16 and 12"),
        ({"Dg": 8}, "one log-decay per row or one per each of 16 channels, but 8"),
        ({"H": 3, "Hkv": 2}, "query heads in groups of one size"),
    ],
)
def test_dimensions_without_a_kernel_are_refused(dims: dict, words: str) -> None:
    case = case_of(20)
    inputs = case_inputs(SPEC, replace(case, dims={**case.dims, **dims}))
    with pytest.raises(RuntimeInputError, match=words):
        recurrent_linear_attention(*inputs)


def test_tensors_on_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case_inputs(SPEC, case_of(20))
    with pytest.raises(RuntimeInputError, match=r"inputs on one device .*cpu.*meta"):
        recurrent_linear_attention(*inputs[:2], inputs[2].to("meta"), *inputs[3:])
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(RuntimeInputError, match=r"on an NVIDIA GPU .*, but they are on cpu"):
        recurrent_linear_attention(*inputs)
