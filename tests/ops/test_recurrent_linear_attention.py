"""RecurrentLinearAttention against ONNX Runtime's own operator, fp64 and known-wrong variants."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from op_cases import case_id, case_inputs, exact_outputs, op_model, relative_error, run_onnx
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.recurrent_linear_attention import SPEC, reference
from edgeattn.ops.spec import Case

# Rule of ONNX's LinearAttention -> whether keys decay, `delta`.
RULES = {"linear": (False, 0), "gated": (True, 0), "delta": (False, 1), "gated_delta": (True, 1)}


def loop(inputs: list[Tensor], *, late: bool = False, **attributes: float) -> list[np.ndarray]:
    """The formula head by head and row by row in fp64; `late` decays a step after it should."""
    q, k, v, g, beta, state, z = (x.double().numpy() for x in inputs)
    batch, heads, length, width = q.shape
    scale = attributes.get("scale") or 1 / math.sqrt(width)
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    new_state, new_z = state.copy(), z.copy()
    group = heads // k.shape[1]
    for b in range(batch):
        for h in range(k.shape[1]):
            s, total = state[b, h].copy(), z[b, h].copy()
            for t in range(length):
                step = max(t - 1, 0) if late else t
                decay = np.exp(np.broadcast_to(g[b, h, step], (width,)))
                s, total = decay[:, None] * s, decay * total + k[b, h, t]
                value = v[b, h, t]
                if attributes.get("delta"):
                    value = beta[b, h, t] * (value - k[b, h, t] @ s)
                s = s + np.outer(k[b, h, t], value)
                for i in range(h * group, (h + 1) * group):
                    row = scale * (q[b, i, t] @ s)
                    if attributes.get("normalise"):
                        row /= scale * (q[b, i, t] @ total) + attributes.get("epsilon", 1e-6)
                    y[b, i, t] = row
            new_state[b, h] = s
            if attributes.get("normalise"):
                new_z[b, h] = total
    return [y, new_state, new_z]


def case_named(name: str) -> Case:
    return next(case for case in SPEC.cases if case.name == name)


def body(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return run_onnx(op_model(SPEC, case, 21, dynamic=("B", "T")), inputs)


@pytest.mark.parametrize("case", SPEC.cases, ids=case_id)
def test_reference_is_the_formula_in_fp64(case: Case) -> None:
    inputs = case_inputs(SPEC, case)
    for found, right in zip(
        exact_outputs(SPEC, case, inputs), loop(inputs, **case.attributes), strict=True
    ):
        assert relative_error(found, torch.from_numpy(right)) < 1e-5


@pytest.mark.parametrize("name", ["odd-length", "odd-length-delta", "channels"])
def test_a_decay_applied_one_step_late_fails(name: str) -> None:
    case = case_named(name)
    inputs = case_inputs(SPEC, case)
    wrong = loop(inputs, late=True, **case.attributes)
    y, state, _ = exact_outputs(SPEC, case, inputs)
    assert relative_error(y, torch.from_numpy(wrong[0])) > 0.05
    assert relative_error(state, torch.from_numpy(wrong[1])) > 0.05


def contrib_model(rule: str, case: Case) -> onnx.ModelProto:
    """One node of com.microsoft::LinearAttention, which holds heads beside each other."""
    d = case.dims
    rows = {"query": d["H"] * d["Dk"], "key": d["Hkv"] * d["Dk"], "value": d["Hkv"] * d["Dv"]}
    gated, delta = RULES[rule]
    inputs = {name: (d["B"], d["T"], width) for name, width in rows.items()}
    inputs["past_state"] = (d["B"], d["Hkv"], d["Dk"], d["Dv"])
    names = [*inputs, "", ""]
    if gated:
        inputs["decay"] = (d["B"], d["T"], d["Hkv"] * d["Dg"])
        names[4] = "decay"
    if delta:
        inputs["beta"] = (d["B"], d["T"], d["Hkv"])
        names[5] = "beta"
    call = helper.make_node(
        "LinearAttention",
        names if delta else names[:5] if gated else names[:4],
        ["output", "present_state"],
        domain="com.microsoft",
        q_num_heads=d["H"],
        kv_num_heads=d["Hkv"],
        update_rule=rule,
    )
    floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in call.output]
    graph = helper.make_graph([call], "model", floats, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("channels", [False, True], ids=["scalar", "channels"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 5, 40])
def test_equal_to_onnxruntimes_own_operator(rule: str, channels: bool, length: int) -> None:
    gated, delta = RULES[rule]
    dims = {"B": 3, "H": 4, "Hkv": 2, "T": length, "Dk": 16, "Dv": 24, "Dg": 16 if channels else 1}
    case = Case("rule", dims, attributes={"delta": delta}, values={"k": "unit-norm"})
    inputs = case_inputs(SPEC, case)
    q, k, v, decay, beta, state, _ = inputs
    if not gated:
        inputs[3] = torch.zeros_like(decay)
    session = onnxruntime.InferenceSession(
        contrib_model(rule, case).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    beside = {
        "query": q,
        "key": k,
        "value": v,
        "decay": decay,
        "beta": beta.unsqueeze(-1),
    }
    feeds = {n: x.transpose(1, 2).flatten(2).numpy() for n, x in beside.items()}
    feeds["past_state"] = state.numpy()
    names = {i.name for i in session.get_inputs()}
    theirs = session.run(None, {n: x for n, x in feeds.items() if n in names})
    heads = torch.from_numpy(theirs[0]).unflatten(-1, (4, 24)).transpose(1, 2)
    for ours in (reference(*inputs, delta=delta), body(case, inputs)):
        assert relative_error(ours[0], heads) < 1e-5
        assert relative_error(ours[1], torch.from_numpy(theirs[1])) < 1e-5


@pytest.mark.parametrize("name", ["odd-length", "odd-length-delta", "channels-normalised"])
@pytest.mark.parametrize("split", [1, 16, 20])
def test_a_state_carried_over_a_split_equals_one_pass(name: str, split: int) -> None:
    case = replace(case_named(name), dtype="fp32")
    inputs = case_inputs(SPEC, case)
    whole = body(case, inputs)
    first = body(case, [*(x[:, :, :split] for x in inputs[:5]), *inputs[5:]])
    second = body(case, [*(x[:, :, split:] for x in inputs[:5]), *first[1:]])
    assert relative_error(torch.cat([first[0], second[0]], dim=2), whole[0]) < 2e-6
    for found, right in zip(second[1:], whole[1:], strict=True):
        assert relative_error(found, right) < 2e-6


def strong(decays: list[float], length: int, *, delta: int) -> tuple[Case, list[Tensor]]:
    dims = {"B": 1, "H": 1, "Hkv": 1, "T": length, "Dk": 8, "Dv": 8, "Dg": 1}
    case = Case("strong", dims, attributes={"delta": delta}, values={"k": "unit-norm"})
    inputs = case_inputs(SPEC, case)
    parts = torch.tensor(decays).repeat_interleave(-(-length // len(decays)))[:length]
    inputs[3] = parts.reshape(1, 1, length, 1).float()
    return case, inputs


@pytest.mark.parametrize("delta", [0, 1])
@pytest.mark.parametrize(
    "decays", [[-1000.0, -0.001], [-20.0], [-math.inf, -0.1], [-1e-4]], ids=str
)
def test_strong_decay_is_exact(decays: list[float], delta: int) -> None:
    case, inputs = strong(decays, 64, delta=delta)
    right = loop(inputs, delta=delta)
    for found, exact in zip(body(case, inputs), right, strict=True):
        assert relative_error(found, torch.from_numpy(exact)) < 1e-5


def by_difference(inputs: list[Tensor]) -> Tensor:
    """The same chunk with decays between rows as differences of cumulative sums: known wrong."""
    q, k, v, g, _, _, _ = (x[0, 0] for x in inputs)
    total = g.squeeze(-1).cumsum(0)
    between = (total[:, None] - total).exp().tril()
    return ((q @ k.T) * between) @ v / math.sqrt(q.shape[-1])


def test_differences_of_cumulative_sums_would_not_be() -> None:
    """Percents where half of 4096 rows decay strongly, and NaN at -inf, where the body is exact."""
    case, inputs = strong([-1000.0, -0.001], 4096, delta=0)
    inputs[5].zero_()
    exact = torch.from_numpy(loop(inputs)[0])
    assert relative_error(by_difference(inputs), exact[0, 0]) > 0.02
    assert relative_error(body(case, inputs)[0], exact) < 1e-5
    _, inputs = strong([-math.inf, -0.1], 64, delta=0)
    assert by_difference(inputs).isnan().any()


@given(
    b=st.integers(1, 2),
    kv=st.integers(1, 2),
    group=st.integers(1, 3),
    t=st.integers(1, 50),
    dk=st.integers(1, 20),
    dv=st.integers(1, 20),
    channels=st.booleans(),
    delta=st.integers(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(b, kv, group, t, dk, dv, channels, delta) -> None:
    dims = {"B": b, "H": kv * group, "Hkv": kv, "T": t, "Dk": dk, "Dv": dv}
    dims["Dg"] = dk if channels else 1
    case = Case("any", dims, attributes={"delta": delta}, values={"k": "unit-norm"})
    inputs = case_inputs(SPEC, case, seed=t)
    for found, exact in zip(body(case, inputs), loop(inputs, delta=delta), strict=True):
        assert relative_error(found, torch.from_numpy(exact)) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, 0.5])
def test_log_decays_that_are_none_are_refused(bad: float) -> None:
    inputs = case_inputs(SPEC, case_named("one-chunk"))
    inputs[3][0, 0, 3] = bad
    with pytest.raises(RuntimeInputError, match="log-decays of at most 0"):
        reference(*inputs)


@pytest.mark.parametrize(
    ("change", "attributes", "words"),
    [
        ({"H": 3}, {}, "query heads in groups"),
        ({"Dg": 5}, {}, "one log-decay per row or one per each of 16"),
        ({}, {"delta": 2}, "delta of 0 or 1"),
        ({}, {"delta": 1, "normalise": 1}, "delta rule without normaliser"),
        ({}, {"scale": math.nan}, "finite scale"),
        ({}, {"epsilon": -1.0}, "finite epsilon"),
    ],
    ids=str,
)
def test_refused_shapes_and_attributes(change: dict, attributes: dict, words: str) -> None:
    dims = {**case_named("one-chunk").dims, **change}
    shapes = SPEC.input_shapes(Case("bad", dims))
    with pytest.raises(RuntimeInputError, match=words):
        SPEC.output_shapes(*shapes, **attributes)


def test_a_state_of_another_shape_is_refused() -> None:
    shapes = list(SPEC.input_shapes(case_named("one-chunk")))
    shapes[5] = (1, 2, 16, 8)
    with pytest.raises(RuntimeInputError, match="past_state"):
        SPEC.output_shapes(*shapes)
