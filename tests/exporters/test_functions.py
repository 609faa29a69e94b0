"""Operators of domain edgeattn from torch to a file, and the lint of their functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper
from op_cases import case_inputs, op_model, relative_error
from torch.export import Dim

from edgeattn.exporters.check import lint
from edgeattn.exporters.functions import attach_functions, translations
from edgeattn.ops.recurrent_linear_attention import SPEC, reference

CASE = next(case for case in SPEC.cases if case.name == "odd-length-delta")


class Layer(torch.nn.Module):
    def forward(self, q, k, v, log_decay, beta, state, normaliser):
        operator = torch.ops.edgeattn.recurrent_linear_attention
        y, state, _ = operator(q, k, v, log_decay, beta, state, normaliser, delta=1, scale=0.5)
        return y * 2, state


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own exporter, about its own trees
@pytest.mark.parametrize("opset", [21, 23])
def test_a_torch_module_becomes_one_node_with_a_body(opset: int) -> None:
    inputs = tuple(case_inputs(SPEC, CASE))
    rows, state = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    program = torch.onnx.export(
        Layer().eval(),
        inputs,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=translations(),
        dynamic_shapes=(rows,) * 5 + (state,) * 2,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    attach_functions(program.model)
    proto = ir.to_proto(program.model)
    onnx.checker.check_model(proto, full_check=True)
    assert list(lint(proto)) == []
    (node,) = (n for n in proto.graph.node if n.domain == "edgeattn")
    assert {a.name for a in node.attribute} >= {"delta", "scale", "epsilon", "plugin_namespace"}
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    short = [x[:1, :, :40] for x in inputs[:5]] + [x[:1] for x in inputs[5:]]
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), short, strict=True)}
    y, state = map(torch.from_numpy, session.run(None, feeds))
    exact = reference(*short, delta=1, scale=0.5)
    assert relative_error(y, 2 * exact[0]) < 2e-6
    assert relative_error(state, exact[1]) < 2e-6


def other_opset(model: onnx.ModelProto) -> None:
    model.functions[0].opset_import[0].version = 22


def initialiser(model: onnx.ModelProto) -> None:
    (scan,) = (n for n in model.functions[0].node if n.op_type == "Scan")
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    body.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]))


def omitted_in_body(model: onnx.ModelProto) -> None:
    (slice_,) = (n for n in model.functions[0].node if n.op_type == "Slice")
    slice_.input.append("")


def omitted(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[4] = ""


def no_plugin(model: onnx.ModelProto) -> None:
    kept = [a for a in model.graph.node[0].attribute if a.name != "plugin_namespace"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)


def no_body(model: onnx.ModelProto) -> None:
    del model.functions[:]


def builtin_name(model: onnx.ModelProto) -> None:
    model.functions[0].name = model.graph.node[0].op_type = "LinearAttention"


def too_few_inputs(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[-1]


def appended(op_type: str, **attributes: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        inputs = ["q", "rows"] if op_type.startswith("Reduce") else ["q", "q", "q"]
        model.functions[0].node.append(helper.make_node(op_type, inputs, ["out"], **attributes))

    return edit


def truths(op_type: str, **attributes: int) -> Callable[[onnx.ModelProto], None]:
    """The largest of truth values, which TensorRT does not take."""

    def edit(model: onnx.ModelProto) -> None:
        inputs = ["q"] if op_type == "Cast" else ["q", "q"]
        body = model.functions[0].node
        body.append(helper.make_node(op_type, inputs, ["truths"], **attributes))
        body.append(helper.make_node("ReduceMax", ["truths"], ["out"]))

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (other_opset, "is of opset 22, the model of 21"),
        (initialiser, "initialisers in a subgraph of Scan"),
        (omitted_in_body, "omits an input of Slice"),
        (omitted, "omits an input"),
        (no_plugin, "lacks the attributes"),
        (no_body, "has no function body"),
        (builtin_name, "name of a built-in"),
        (too_few_inputs, "has 6 inputs, its function 7"),
        (appended("ScatterND", reduction="add"), "ScatterND with a reduction"),
        (appended("NonZero"), "uses NonZero"),
        (appended("ReduceSum"), "computes the axes of ReduceSum"),
        (truths("Equal"), "ReduceMax on truth values"),
        (truths("Cast", to=onnx.TensorProto.BOOL), "ReduceMax on truth values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_trap_is_named(edit: Callable[[onnx.ModelProto], None], words: str) -> None:
    model = op_model(SPEC, CASE, 21)
    assert list(lint(model)) == []
    edit(model)
    assert any(words in problem for problem in lint(model)), list(lint(model))
