"""Operators judged alone: samples from a graph, a wrong node named, kernels compared with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx
import torch
from op_cases import case_sample

from edgeattn.calibration.store import LayerStore
from edgeattn.devices.registry import parse_target
from edgeattn.engine.plugins import PluginNode
from edgeattn.errors import BundleError, MissingDependencyError, ProofError
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import TORCH_DTYPES, Model, model_of
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.transforms.calibrate import quantize_on_text
from edgeattn.transforms.fuse import fuse_projections
from edgeattn.transforms.rotate import hadamard_rotations, rotate
from edgeattn.verify.cases import PREFILL_TOKENS, build_cases
from edgeattn.verify.operators import (
    Sample,
    _sample,
    check_operators,
    first_wrong_operator,
    load_samples,
    sample_operators,
    save_samples,
)
from edgeattn.verify.triton_backend import check_triton
from edgeattn.verify.verify import prove

TARGETS = {"cpu": "fp32", "jetson-orin": "fp16"}


@pytest.fixture(scope="module", params=TARGETS)
def exported(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory, shared_traces: None
) -> tuple[Model, Lowering, Path]:
    """A graph with a HadamardTransform before each of three down projections."""
    name, dtype = request.param, TARGETS[request.param]
    model, target = model_of(open_checkpoint(tiny_checkpoint)), parse_target(name)
    planned = plan_lowering(Recipe(name, quant="w8a8-spinquant:keep=0", dtype=dtype), target)
    lowering = fit_lowering(planned, model.shape, target)
    folder = tmp_path_factory.mktemp("operators")
    model = quantize_on_text(
        rotate(model, hadamard_rotations(model.shape, online=True)),
        lowering.scheme,
        torch.randint(0, 272, (4, 64), generator=torch.Generator().manual_seed(0)),
        LayerStore(folder / "work", {}),
        scale_dtype=TORCH_DTYPES[dtype],
    )
    if lowering.attention == "group-query":
        model = fuse_projections(model)
    file = folder / "model.onnx"
    export_graph(model, lowering, file, folder / "model.onnx.data")
    return model, lowering, file


def samples_of(exported: tuple[Model, Lowering, Path], file: Path | None = None) -> list[Sample]:
    model, lowering, right = exported
    case = build_cases(model.shape.vocab_size, model.shape.max_context)[0]
    return sample_operators(file or right, lowering, case, every=True)


def wrong_body(file: Path) -> Path:
    """The graph with a function body that forgets the scale of the transform."""
    proto = onnx.load(file, load_external_data=False)
    (body,) = proto.functions
    (root,) = (node for node in body.node if node.op_type == "Sqrt")
    root.op_type = "Identity"
    wrong = file.with_name("wrong.onnx")
    wrong.write_bytes(proto.SerializeToString())
    return wrong


def test_every_node_is_sampled_and_right(exported: tuple[Model, Lowering, Path]) -> None:
    model, lowering, file = exported
    samples = samples_of(exported)
    assert len(samples) == 2 * model.shape.num_layers  # in a prefill and in a step behind it
    assert {sample.inputs[0].shape[1] for sample in samples} == {PREFILL_TOKENS, 1}
    for sample in samples:
        assert (sample.op, sample.dtype) == ("HadamardTransform", lowering.dtype)
        assert sample.inputs[0].shape[-1] == model.shape.intermediate_size
        assert all(row.passed for row in sample.compare(sample.found))
    assert first_wrong_operator(samples) is None
    case = build_cases(model.shape.vocab_size, model.shape.max_context)[0]
    assert len(sample_operators(file, lowering, case)) == 2


def test_a_wrong_node_is_named(exported: tuple[Model, Lowering, Path]) -> None:
    samples = samples_of(exported)
    for i, sample in enumerate(samples):
        wrong = replace(sample, found=tuple(1.05 * x for x in sample.found))
        named = first_wrong_operator([*samples[:i], wrong, *samples[i + 1 :]])
        assert named == f"operator {sample.node} (HadamardTransform)"


def test_the_proof_names_the_operator(exported: tuple[Model, Lowering, Path], tmp_path) -> None:
    model, lowering, file = exported
    with pytest.raises(ProofError, match=r"the first error is in operator .*HadamardTransform"):
        prove(model, lowering, wrong_body(file), tmp_path / "golden.npz", tokens=None)


def test_a_proof_keeps_samples(exported: tuple[Model, Lowering, Path], tmp_path) -> None:
    model, lowering, file = exported
    kept = tmp_path / "golden" / "operators.npz"
    arguments = (model, lowering, file, tmp_path / "golden.npz")
    verification = prove(*arguments, tokens=None, operators_file=kept)
    assert "operators alone" in verification.agreements[0].worst_per_group()
    sample, _ = load_samples(kept)
    (first, *_) = samples_of(exported)
    assert (sample.node, sample.attributes) == (first.node, first.attributes)
    for ours, theirs in zip(sample.inputs, first.inputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(BundleError, match="none of its nodes has one"):
        check_triton([])


def recurrent_sample() -> Sample:
    """One of an operator with a kernel, which no exported model has yet."""
    case = next(c for c in SPEC.cases if c.name == "odd-length-delta")
    return case_sample(SPEC, replace(case, dtype="fp16"), "mixer")


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_inputs_without_a_meaning_are_told_with_the_node(value: float) -> None:
    """Kernels and plugins do not look at the numbers: this proof is where a model is refused."""
    sample = recurrent_sample()
    inputs = [x.copy() for x in sample.inputs]
    inputs[3][..., -1] = value  # of the log-decays
    shapes = tuple(x.shape for x in inputs)
    node = PluginNode("mixer", sample.op, sample.dtype, shapes, sample.attributes)
    with pytest.raises(
        ProofError, match=f"log-decays of at most 0 in node mixer, but {value} came"
    ):
        _sample(node, tuple(inputs), sample.found)


def test_samples_survive_a_file(tmp_path: Path) -> None:
    sample = recurrent_sample()
    save_samples([sample, sample], tmp_path / "operators.npz")
    for loaded in load_samples(tmp_path / "operators.npz"):
        assert loaded.attributes == sample.attributes
        for kind in ("inputs", "expected"):
            for ours, theirs in zip(getattr(loaded, kind), getattr(sample, kind), strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "operators.npz").write_bytes(content)
    with pytest.raises(BundleError, match="samples of operators"):
        load_samples(tmp_path / "operators.npz")


def test_another_implementation_is_compared() -> None:
    samples = [recurrent_sample()]

    def reference(sample):
        tensors = map(torch.from_numpy, sample.inputs)
        return [y.numpy() for y in SPEC.reference(*tensors, **sample.attributes)]

    def late(sample):
        inputs = [*sample.inputs[:3], np.roll(sample.inputs[3], 1, axis=2), *sample.inputs[4:]]
        return reference(replace(sample, inputs=tuple(inputs)))

    assert check_operators("right", samples, reference).passed
    agreement = check_operators("late", samples, late)
    assert not agreement.passed
    assert agreement.first_bad == "operator mixer (RecurrentLinearAttention)"


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"GPU|Triton"):
        check_triton([recurrent_sample()])
