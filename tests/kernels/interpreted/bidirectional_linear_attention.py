"""The kernels of BidirectionalLinearAttention, interpreted: against the formula in fp64.

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
from op_cases import case_inputs, check_outputs, exact_outputs, relative_error
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.kernels.bidirectional_linear_attention import (
    KERNELS,
    bidirectional_linear_attention,
    complete_constants,
    workspaces,
)
from edgeattn.ops.bidirectional_linear_attention import SPEC, variants
from edgeattn.ops.kernel_widths import BLOCKS
from edgeattn.ops.spec import Case

FLOOR = SPEC.tolerance["fp32"].floor
RULES = [{"gate_shift": shift, "normalise": normalise} for shift in (0, 1) for normalise in (0, 1)]
# Around chunks and spans, and with a second chunk in the last span or none.
LENGTHS = [1, 7, 63, 64, 65, 127, 128, 129, 192, 193, 300]


def case_of(
    length: int,
    *,
    batch: int = 1,
    dtype: str = "fp32",
    values: dict[str, str] | None = None,
    **attributes: float,
) -> Case:
    """Two heads of 16 x 8, with queries and keys as feature maps give them."""
    dims = {"B": batch, "H": 2, "T": length, "Dk": 16, "Dv": 8}
    features = dict.fromkeys(("q", "k"), "non-negative")
    return Case("made", dims, dtype, attributes, {**features, **(values or {})})


def quadratic(
    inputs: Sequence[Tensor],
    *,
    gate_shift: int = 1,
    normalise: int = 1,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """The formula in fp64 with its whole mask, whose elements are products of gates."""
    q, k, v, log_decay = (x.double().numpy() for x in inputs[:4])
    padding = inputs[4].numpy()[:, None] != 0
    k, v = (np.where(padding[..., None], 0, x) for x in (k, v))
    gates = np.where(padding, 1, np.exp(log_decay))
    mask = np.ones((*gates.shape, gates.shape[-1]))
    for i in range(1, gates.shape[-1]):
        entering = gates[..., i - 1 if gate_shift else i, None]
        mask[..., i, :i] = mask[..., i - 1, :i] * entering
        mask[..., :i, i] = mask[..., :i, i - 1] * gates[..., i, None]
    weights = mask * (q @ k.swapaxes(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    y = weights @ v
    return torch.from_numpy(y / (weights.sum(-1, keepdims=True) + epsilon) if normalise else y)


def run(inputs: Sequence[Tensor], **attributes: float) -> Tensor:
    found: Tensor = bidirectional_linear_attention(*inputs, **attributes)
    return found


def error(inputs: Sequence[Tensor], **attributes: float) -> float:
    return relative_error(run(inputs, **attributes), quadratic(inputs, **attributes))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_chunks_and_spans(length: int, rule: dict) -> None:
    assert error(case_inputs(SPEC, case_of(length, **rule), seed=length), **rule) <= FLOOR


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [65, 200])
def test_lengths_in_fp16(length: int, rule: dict) -> None:
    case = case_of(length, batch=2, dtype="fp16", **rule)
    inputs = case_inputs(SPEC, case)
    check_outputs(SPEC, case, [run(inputs, **rule)], [quadratic(inputs, **rule)])


@pytest.mark.parametrize("gate_shift", [0, 1])
def test_weak_decay_over_many_spans(gate_shift: int) -> None:
    """Where most of a row's sum comes from states."""
    inputs = case_inputs(SPEC, case_of(700, gate_shift=gate_shift))
    inputs[3] *= 0.001
    assert error(inputs, gate_shift=gate_shift) <= FLOOR


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("length", [6, 80, 260])
def test_strong_decay_then_weak(length: int, rule: dict) -> None:
    """Differences of cumulative sums are off behind -1000, and NaN behind -inf."""
    inputs = case_inputs(SPEC, case_of(length, **rule))
    inputs[3] = torch.full_like(inputs[3], -0.001)
    inputs[3][:, :, 1 : length // 2 : 3] = -1000.0
    inputs[3][:, :1, length // 2] = -math.inf
    inputs[3][:, 1:, length - 2] = math.log(1e-30)
    assert error(inputs, **rule) <= FLOOR
    inputs[3] = torch.full_like(inputs[3], -math.inf)
    assert error(inputs, **rule) <= FLOOR


@pytest.mark.parametrize("length", [5, 140])
def test_padding_is_not_read(length: int) -> None:
    inputs = case_inputs(SPEC, case_of(length, batch=2))
    inputs[4][0, : length // 2] = -3
    exact = quadratic(inputs)
    for tensor in inputs[1:4]:
        tensor[(inputs[4] != 0)[:, None].expand(tensor.shape[:3])] = math.nan
    assert relative_error(run(inputs), exact) <= FLOOR


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_where_all_keys_are_padding_y_is_0(rule: dict, dtype: str) -> None:
    inputs = case_inputs(SPEC, case_of(150, batch=2, dtype=dtype, **rule))
    inputs[4][1] = 1
    y = run(inputs, **rule)
    assert (y[1] == 0).all()
    assert (y[0] != 0).any()


def test_no_rows_give_no_rows() -> None:
    assert run(case_inputs(SPEC, case_of(0))).shape == (1, 2, 0, 8)


def test_tensors_need_not_be_contiguous() -> None:
    inputs = case_inputs(SPEC, case_of(90, batch=2))
    beside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    assert torch.equal(run([*beside, inputs[4]]), run(inputs))


@pytest.mark.parametrize("length", [7, 200])
def test_wrong_masks_are_found(length: int) -> None:
    """The other convention of gates, and gates a row too early or too late."""
    inputs = case_inputs(SPEC, case_of(length))
    exact = quadratic(inputs)
    assert relative_error(run(inputs, gate_shift=0), exact) > 0.05
    for shift in (-1, 1):
        moved = [*inputs[:3], inputs[3].roll(shift, -1), inputs[4]]
        assert relative_error(run(moved), exact) > 0.05


def test_scores_and_states_may_leave_the_range_of_fp16() -> None:
    case = case_of(150, dtype="fp16", values={"key_padding": "zero"})
    inputs = case_inputs(SPEC, case)
    inputs[0] *= 300
    inputs[1] *= 300
    inputs[3] *= 0.001
    assert (inputs[0].float() @ inputs[1].float().mT).max() > 1e5
    check_outputs(SPEC, case, [run(inputs)], exact_outputs(SPEC, case, inputs))


@given(st.data())
def test_grids(data: st.DataObject) -> None:
    names = ("B", "H", "T", "DK", "DV", "BLOCK", "BLOCK_V", "CHUNK", "SPAN")
    values = {name: data.draw(st.integers(1, 9999)) for name in names}
    heads, blocks = values["B"] * values["H"], math.ceil(values["DV"] / values["BLOCK_V"])
    chunks = math.ceil(values["T"] / values["CHUNK"])
    expected = {"states": 2 * blocks * heads, "outputs": blocks * chunks * heads}
    for kernel in KERNELS:
        assert kernel.blocks(values) == (expected[kernel.name.split(".")[1]], 1, 1)


@given(width=st.sampled_from(range(8, 129, 8)), length=st.integers(0, 300))
def test_constants_fit_together(width: int, length: int) -> None:
    kernels = {kernel.name: kernel for kernel in KERNELS}
    for name, given_constants in variants({"T": length, "Dk": width, "Dv": 8}, {}):
        constants = complete_constants(kernels[name], given_constants)
        assert tuple(constants) == kernels[name].constants
        assert width <= constants["BLOCK"] <= max(2 * width, BLOCKS[0])
        spans = workspaces({"B": 1, "H": 1, "T": length, "DK": width, "DV": 8})["states"][3]
        assert spans == math.ceil(length / constants["SPAN"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: torch.float64}, "q in fp32 or fp16 or bf16 .* but it is torch.float64"),
        ({1: torch.float16}, "k in fp32 like q .* but it is fp16"),
        ({4: torch.bool}, "key_padding in int32 .* but it is bool"),
    ],
)
def test_dtypes_without_a_kernel_are_refused(changed: dict, words: str) -> None:
    inputs = case_inputs(SPEC, case_of(20))
    converted = [x.to(changed.get(i, x.dtype)) for i, x in enumerate(inputs)]
    with pytest.raises(RuntimeInputError, match=words):
        run(converted)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"Dk": 136}, "head dimensions that are multiples of 8 up to 128, but 136 and 8"),
        ({"Dv": 12}, "head dimensions that are multiples of 8 up to 128, but 16 and 12"),
    ],
)
def test_dimensions_without_a_kernel_are_refused(dims: dict, words: str) -> None:
    case = case_of(20)
    inputs = case_inputs(SPEC, replace(case, dims={**case.dims, **dims}))
    with pytest.raises(RuntimeInputError, match=words):
        run(inputs)


def test_tensors_on_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case_inputs(SPEC, case_of(20))
    with pytest.raises(RuntimeInputError, match=r"inputs on one device .*cpu.*meta"):
        run([*inputs[:2], inputs[2].to("meta"), *inputs[3:]])
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(RuntimeInputError, match=r"on an NVIDIA GPU .*, but they are on cpu"):
        run(inputs)
