"""BidirectionalLinearAttention against two forms in fp64, and against what is known to be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_cases import case_id, case_inputs, exact_outputs, op_model, relative_error, run_onnx
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.bidirectional_linear_attention import SPEC, reference, variants
from edgeattn.ops.spec import Case

Array = NDArray[np.float64]
LENGTHS = (1, 7, 64, 65, 1000)


def masked(inputs: list[Tensor]) -> tuple[Array, ...]:
    """q, k, v and gates in fp64; of padding k and v are 0 and the gates 1."""
    q, k, v, g = (x.double().numpy() for x in inputs[:4])
    padding = inputs[4].numpy()[:, None] != 0
    k, v = (np.where(padding[..., None], 0, x) for x in (k, v))
    return q, k, v, np.where(padding, 1, np.exp(g))


def quadratic(
    inputs: list[Tensor],
    *,
    gate_shift: int = 1,
    normalise: int = 1,
    scale: float = 0.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """The formula with its whole mask, whose elements are products of gates."""
    q, k, v, gates = masked(inputs)
    length = q.shape[2]
    mask = np.ones((*gates.shape, length))
    for i in range(1, length):
        entering = gates[..., i - 1 if gate_shift else i, None]
        mask[..., i, :i] = mask[..., i - 1, :i] * entering
        mask[..., :i, i] = mask[..., :i, i - 1] * gates[..., i, None]
    weights = mask * (q @ k.swapaxes(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    y = weights @ v
    if normalise:
        y /= weights.sum(-1, keepdims=True) + epsilon
    return torch.from_numpy(y)


def recurrent(
    inputs: list[Tensor],
    *,
    gate_shift: int = 1,
    normalise: int = 1,
    scale: float = 0.0,
    epsilon: float = 1e-6,
    left_out: float = 0.5,
) -> Tensor:
    """Two recurrences added up, each of which leaves half of a row's own key out."""
    q, k, v, gates = masked(inputs)
    q = q * (scale or 1 / math.sqrt(q.shape[-1]))
    rows = range(q.shape[2])
    forward = np.roll(gates, 1, axis=-1) if gate_shift else gates
    y, total = np.zeros((*q.shape[:3], v.shape[-1])), np.zeros((*q.shape[:3], 1))
    for order, entering in ((rows, forward), (rows[::-1], np.roll(gates, -1, axis=-1))):
        state, normaliser = np.zeros((*q.shape[:2], q.shape[-1], v.shape[-1])), 0.0
        for i in order:
            query, key, value = q[:, :, i], k[:, :, i], v[:, :, i]
            gate = entering[:, :, i, None]
            state = gate[..., None] * state + key[..., :, None] * value[..., None, :]
            normaliser = gate * normaliser + key
            own = left_out * (query * key).sum(-1, keepdims=True)
            y[:, :, i] += np.einsum("bhd,bhdv->bhv", query, state) - own * value
            total[:, :, i] += (query * normaliser).sum(-1, keepdims=True) - own
    return torch.from_numpy(y / (total + epsilon) if normalise else y)


def body(case: Case, inputs: list[Tensor]) -> Tensor:
    return run_onnx(op_model(SPEC, case, 21, dynamic=("B", "T")), inputs)[0]


def made(length: int, *, batch: int = 1, **attributes: float) -> tuple[Case, list[Tensor]]:
    """Two heads of 8 x 12, as feature maps give them, with some padding."""
    dims = {"B": batch, "H": 2, "T": length, "Dk": 8, "Dv": 12}
    values = dict.fromkeys(("q", "k"), "non-negative")
    case = Case("made", dims, attributes=attributes, values=values)
    return case, case_inputs(SPEC, case, seed=length)


@pytest.mark.parametrize("case", SPEC.cases, ids=case_id)
def test_reference_is_both_forms_in_fp64(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    (found,) = exact_outputs(SPEC, case, inputs)
    for form in (quadratic, recurrent):
        assert relative_error(found, form(inputs, **case.attributes)) < 1e-5


@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("gate_shift", [0, 1])
@pytest.mark.parametrize("length", LENGTHS)
def test_both_conventions_at_all_lengths(length: int, gate_shift: int, normalise: int) -> None:
    attributes = {"gate_shift": gate_shift, "normalise": normalise}
    case, inputs = made(length, **attributes)
    exact = quadratic(inputs, **attributes)
    assert relative_error(recurrent(inputs, **attributes), exact) < 1e-9
    for found in (reference(*inputs, **attributes), body(case, inputs)):
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_diagonal_counted_twice_fails(length: int, normalise: int) -> None:
    _, inputs = made(length, normalise=normalise)
    wrong = recurrent(inputs, normalise=normalise, left_out=0)
    assert relative_error(reference(*inputs, normalise=normalise), wrong) > 0.05


@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_the_other_gate_convention_fails(length: int, normalise: int) -> None:
    _, inputs = made(length, normalise=normalise)
    for right in (0, 1):
        found = reference(*inputs, normalise=normalise, gate_shift=right)
        wrong = quadratic(inputs, normalise=normalise, gate_shift=1 - right)
        assert relative_error(found, wrong) > 0.05


def test_no_decay_is_linear_attention_and_one_per_head_a_power_of_the_distance() -> None:
    _, inputs = made(70, normalise=0, scale=1.0)
    inputs[4].zero_()
    q, k, v = inputs[:3]
    inputs[3] = torch.zeros_like(inputs[3])
    scores = q @ k.mT
    assert relative_error(reference(*inputs, normalise=0, scale=1.0), scores @ v) < 1e-5
    inputs[3] = torch.tensor([0.9, 0.5]).log().reshape(1, 2, 1).expand_as(inputs[3])
    rows = torch.arange(70)
    powers = torch.tensor([0.9, 0.5]).reshape(2, 1, 1) ** (rows[:, None] - rows).abs()
    for gate_shift in (0, 1):
        found = reference(*inputs, normalise=0, scale=1.0, gate_shift=gate_shift)
        assert relative_error(found, (scores * powers) @ v) < 1e-5


@pytest.mark.parametrize("gate_shift", [0, 1])
@pytest.mark.parametrize(
    "decays",
    [[-1000.0, -0.001], [math.log(1e-30)], [-math.inf, -0.1], [-math.inf], [-1e-4]],
    ids=str,
)
def test_strong_decay_is_exact(decays: list[float], gate_shift: int) -> None:
    case, inputs = made(130, gate_shift=gate_shift)
    inputs[3] = torch.tensor(decays).repeat(130)[:130].expand(1, 2, 130).contiguous()
    exact = quadratic(inputs, gate_shift=gate_shift)
    for found in (reference(*inputs, gate_shift=gate_shift), body(case, inputs)):
        assert relative_error(found, exact) < 1e-5


@pytest.mark.parametrize("normalise", [0, 1])
def test_where_all_keys_are_padding_y_is_0(normalise: int) -> None:
    case, inputs = made(80, batch=2, normalise=normalise)
    inputs[4][0] = -1
    for found in (reference(*inputs, normalise=normalise), body(case, inputs)):
        assert (found[0] == 0).all()
        assert (found[1] != 0).any()


@pytest.mark.parametrize("gate_shift", [0, 1])
def test_padding_is_as_if_the_keys_were_not_there(gate_shift: int) -> None:
    case, inputs = made(150, gate_shift=gate_shift)
    inputs[4][:, :3] = 1
    kept = inputs[4][0] == 0
    for tensor in inputs[1:4]:  # whatever stands there, and of any sign
        tensor[:, :, ~kept] = math.nan
    found = reference(*inputs, gate_shift=gate_shift)
    assert relative_error(body(case, inputs), found.double()) < 1e-5
    removed = [x[:, :, kept] for x in inputs[:4]]
    alone = reference(*removed, torch.zeros(1, int(kept.sum())), gate_shift=gate_shift)
    assert relative_error(found[:, :, kept], alone) < 1e-6


def test_no_rows_give_no_rows() -> None:
    case, inputs = made(0)
    for found in (reference(*inputs), body(case, inputs)):
        assert found.shape == (1, 2, 0, 12)


@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    t=st.integers(1, 140),
    dk=st.integers(1, 20),
    dv=st.integers(1, 20),
    gate_shift=st.integers(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(b, h, t, dk, dv, gate_shift, seed) -> None:
    dims = {"B": b, "H": h, "T": t, "Dk": dk, "Dv": dv}
    attributes = {"gate_shift": gate_shift, "normalise": 0}
    case = Case("any", dims, attributes=attributes)
    inputs = case_inputs(SPEC, case, seed=seed)
    assert relative_error(body(case, inputs), quadratic(inputs, **attributes)) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, 0.5])
def test_log_decays_that_are_none_are_refused(bad: float) -> None:
    _, inputs = made(7)
    inputs[4].zero_()
    inputs[3][0, 0, 3] = bad
    with pytest.raises(RuntimeInputError, match="log-decays of at most 0"):
        reference(*inputs)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({1: (1, 3, 7, 8)}, r"k \[B, H, T, Dk\] with H = 2"),
        ({2: (1, 2, 6, 12)}, r"v \[B, H, T, Dv\] with T = 7"),
        # One per head, and one per channel as RecurrentLinearAttention has them.
        ({3: (2,)}, r"log_decay \[B, H, T\], but its shape is \[2\]"),
        ({3: (1, 2, 7, 8)}, r"log_decay \[B, H, T\], but its shape is \[1, 2, 7, 8\]"),
        ({4: (7,)}, r"key_padding \[B, T\], but"),
        ({4: (1, 8)}, r"key_padding \[B, T\] with T = 7"),
    ],
    ids=str,
)
def test_refused_shapes(changed: dict, words: str) -> None:
    case, _ = made(7)
    shapes = [changed.get(i, shape) for i, shape in enumerate(SPEC.input_shapes(case))]
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*shapes)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"gate_shift": 2}, "gate_shift of 0 or 1"),
        ({"normalise": -1}, "normalise of 0 or 1"),
        ({"scale": math.inf}, "finite scale of at least 0"),
        ({"epsilon": -1.0, "normalise": 0}, "finite epsilon of at least 0"),
        ({"epsilon": 0.0}, "finite epsilon of at least 1e-37"),
    ],
    ids=str,
)
def test_refused_attributes(attributes: dict, words: str) -> None:
    case, _ = made(7)
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*SPEC.input_shapes(case), **attributes)


def test_kernels_that_a_node_needs() -> None:
    dims = {"T": None, "Dk": 72, "Dv": 64}
    names = [f"bidirectional_linear_attention.{name}" for name in ("states", "outputs")]
    assert variants(dims, {}) == [(name, {"BLOCK": 128}) for name in names]
    assert variants({**dims, "Dk": None}, {}) == []
    with pytest.raises(RuntimeInputError, match="multiples of 8 up to 128, but 72 and 136"):
        variants({**dims, "Dv": 136}, {})
    with pytest.raises(RuntimeInputError, match="at most 7456540 rows of 72 numbers"):
        variants({**dims, "T": 2**23}, {})
