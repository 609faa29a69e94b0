"""Graphs of models with an attention variant: proven, stamped, and wrong ones found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
import torch
from attention_models import with_fft_rope, with_head_sparse

from edgeattn.attention import FftRope
from edgeattn.devices.registry import parse_target
from edgeattn.errors import ProofError
from edgeattn.exporters.export import export_graph
from edgeattn.exporters.stamp import stamp
from edgeattn.exporters.trace import trace_decoder
from edgeattn.exporters.weights import WeightBinder
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.verify.compare import OPERATOR
from edgeattn.verify.fallbacks import Fallbacks
from edgeattn.verify.verify import Verification, prove

VARIANTS: dict[str, tuple[str, Callable[[Model], Model]]] = {
    "fft-rope": ("fft-rope:sink=1,window=2", with_fft_rope),
    "head-sparse": ("head-sparse:density=0.5", lambda model: with_head_sparse(model, 2)),
    "groups": (
        "head-sparse:density=0.5,unit=groups",
        lambda model: with_head_sparse(model, 1, groups=True),
    ),
}
TARGETS = {"cpu": "fp32", "jetson-orin": "fp16", "jetson-orin@jetpack6.2": "fp16"}


@pytest.fixture(scope="module")
def softmax(tiny_checkpoint: Path, shared_traces: None) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


def lowered(name: str, target: str, model: Model) -> Lowering:
    found = parse_target(target)
    recipe = Recipe(target, attention=(VARIANTS[name][0],), dtype=TARGETS[target])
    return fit_lowering(plan_lowering(recipe, found), model.shape, found)


def written(model: Model, lowering: Lowering, folder: Path) -> Path:
    export_graph(model, lowering, folder / "model.onnx", folder / "model.onnx.data")
    return folder / "model.onnx"


def proven(
    model: Model, lowering: Lowering, file: Path, monkeypatch: pytest.MonkeyPatch
) -> Verification:
    monkeypatch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
    return prove(
        model,
        lowering,
        file,
        file.with_name("golden.npz"),
        tokens=None,
        operators_file=file.with_name("operators.npz"),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_equals_torch(
    softmax: Model, name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a prefill beyond the exact keys, in decoding, ragged, and with several tokens at once."""
    model, lowering = VARIANTS[name][1](softmax), lowered(name, target, softmax)
    assert lowering.kv_cache == "packed"
    file = written(model, lowering, tmp_path)
    nodes = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    operator = "FftRopeAttention" if name == "fft-rope" else "HeadSparseAttention"
    assert nodes.count(operator) == model.shape.num_layers - 1
    (agreement,) = proven(model, lowering, file, monkeypatch).agreements
    names = {row.tensor.partition(".")[0] for row in agreement.comparisons}
    wanted = {"sequence", "ragged", "continued"}
    assert wanted | ({"layer"} if lowering.is_sparse_in_decoding else set()) <= names
    assert any(row.tensor.startswith(OPERATOR) for row in agreement.comparisons)


def test_stamped_layers_equal_a_whole_trace(softmax: Model) -> None:
    """Also where layers differ in what computes their attention."""
    model = with_fft_rope(softmax)
    lowering = lowered("fft-rope", "cpu", softmax)
    stamped, whole = (
        stamp(trace_decoder(model.shape, lowering, whole=whole), WeightBinder(model, lowering))
        for whole in (False, True)
    )
    assert len(model.shape.layer_kinds) == 2
    for one, other in zip(stamped.graph, whole.graph, strict=True):
        assert (one.op_type, one.attributes.keys()) == (other.op_type, other.attributes.keys())
    names = [[v.name for v in m.graph.initializers.values()] for m in (stamped, whole)]
    parameters = [sorted(n for n in found if n and not n.startswith("val_")) for found in names]
    assert parameters[0] == parameters[1]


def _narrower_window(file: Path) -> None:
    _rewrite(file, lambda node: _set(node, "FftRopeAttention", "window", 1))


def _no_compaction(file: Path) -> None:
    """Keys stay where concatenation puts them: wrong for a ragged row alone."""
    model = ir.load(file)
    for node in model.graph:
        if node.op_type == "Reshape" and (node.outputs[0].name or "").startswith("present."):
            joined = node.inputs[0]
            while joined is not None and (producer := joined.producer()) is not None:
                if producer.op_type == "Concat":
                    break
                joined = producer.inputs[0]
            assert joined is not None
            node.replace_input_with(0, joined)
    ir.save(model, file)


def _other_heads(file: Path) -> None:
    """The heads with the smallest logits."""
    _rewrite(file, lambda node: _set(node, "TopK", "largest", 0))


def _set(node: onnx.NodeProto, op_type: str, name: str, value: int) -> bool:
    if node.op_type != op_type:
        return False
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = value
            return True
    node.attribute.append(onnx.helper.make_attribute(name, value))
    return True


def _rewrite(file: Path, change: Callable[[onnx.NodeProto], bool]) -> None:
    proto = onnx.load(file, load_external_data=False)
    assert sum([change(node) for node in proto.graph.node]) > 0
    file.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("target", ["cpu", "jetson-orin"])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("fft-rope", _narrower_window),
        ("head-sparse", _other_heads),
        ("head-sparse", _no_compaction),
        ("fft-rope", _no_compaction),
    ],
)
def test_a_wrong_graph_is_found_out(
    softmax: Model,
    name: str,
    spoil: Callable[[Path], None],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, lowering = VARIANTS[name][1](softmax), lowered(name, target, softmax)
    file = written(model, lowering, tmp_path)
    spoil(file)
    with pytest.raises(ProofError):
        proven(model, lowering, file, monkeypatch)


def test_rows_that_fall_back_are_counted(softmax: Model, tmp_path: Path) -> None:
    from edgeattn.verify.cases import build_cases
    from edgeattn.verify.ort_backend import OrtBackend

    lowering = lowered("fft-rope", "cpu", softmax)
    shares = []
    for bound in (20.0, 0.0):
        model = with_fft_rope(softmax, polynomial_heads=3, bound=bound)
        folder = tmp_path / str(bound)
        folder.mkdir()
        file = written(model, lowering, folder)
        found = Fallbacks.of(file)
        assert found.heads == 3 * 2
        backend = OrtBackend(file, lowering, expose=found.outputs)
        step = build_cases(272, 256)[0].steps[0]
        found.add(backend.step(step, None), step.input_ids.size)
        shares.append(found.share)
        # All rows that have far keys: those behind the first key and the window of two.
        assert found.rows == step.input_ids.size * 6
    assert shares == [0, pytest.approx(1 - 3 / step.input_ids.size)]


def test_kinds_of_layers_are_traced_apart(softmax: Model) -> None:
    """Layers that differ in a number of their variant are different blocks."""
    model = with_fft_rope(softmax)
    shape = model.shape
    other = replace(shape.layer_cycle[2], attention=FftRope(1, 1, 2))
    tables = {**model.tables, 2: {**model.tables[2]}}
    tables[2]["coefficients"] = torch.tensor([[1.0, 0.1]]).repeat(shape.num_heads, 1)
    cycle = (*shape.layer_cycle[:2], other)
    model = replace(model, shape=replace(shape, layer_cycle=cycle), tables=tables)
    trace = trace_decoder(model.shape, lowered("fft-rope", "cpu", softmax))
    assert [trace.block_of(i, model.shape) for i in range(3)] == [0, 1, 2]
