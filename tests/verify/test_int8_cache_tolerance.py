"""The bounds of int8 caches in the proof: a right graph is within them, a wrong one is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from edgeattn.devices.registry import parse_target
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import TORCH_DTYPES, Model, load_decoder, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.hadamard import hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.scheme import Scheme, parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.compare import KL, MAX_KL, Agreement, compare
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.golden import Golden
from edgeattn.verify.ort_backend import OrtBackend
from edgeattn.verify.tolerance import FLOORS, rounding_floor
from edgeattn.verify.verify import check_onnxruntime, record_golden

LAYERS = 3
# Weights in floating point: whatever is found wrong is the cache's.
CACHE_ALONE = Scheme("none", kv_bits=8)
TARGETS = {
    "cpu": ("cpu", "fp32"),
    "primitive-fp16": ("jetson-orin@jetpack6.2", "fp16"),
    "standard-fp16": ("jetson-orin@jetpack7.2", "fp16"),
}


@dataclass(frozen=True)
class Proven:
    """A graph with int8 caches, and what it must reproduce."""

    lowering: Lowering
    file: Path
    golden: Golden

    def check(self, file: Path | None = None) -> Agreement:
        return check_onnxruntime(file or self.file, self.golden, self.lowering, num_layers=LAYERS)

    def edited(self, name: str, edit: Callable[[onnx.ModelProto], None]) -> Path:
        """A wrong graph beside the right one, on the same weights."""
        proto = onnx.load(self.file, load_external_data=False)
        edit(proto)
        file = self.file.with_name(f"{name}.onnx")
        file.write_bytes(proto.SerializeToString())
        return file


@pytest.fixture(scope="module", params=TARGETS)
def proven(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Proven:
    name, dtype = TARGETS[request.param]
    target, plain = parse_target(name), model_of(open_checkpoint(tiny_checkpoint))
    planned = plan_lowering(Recipe(name, quant="w8a8:kv=int8", dtype=dtype), target)
    lowering = fit_lowering(replace(planned, scheme=CACHE_ALONE), plain.shape, target)
    model = replace(plain, caches=fitting(plain, TORCH_DTYPES[dtype]))
    file = tmp_path_factory.mktemp("proven") / "model.onnx"
    export_graph(model, lowering, file, file.with_name("model.onnx.data"))
    return Proven(lowering, file, record_golden(model, lowering, tokens=None))


@torch.inference_mode()
def fitting(model: Model, dtype: torch.dtype) -> dict[int, Int8Cache]:
    """Scales from a run in floating point, and a rotation of queries and keys."""
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    ids = torch.randint(0, 272, (4, 32))
    positions = torch.arange(32).expand(4, -1)
    present = decoder(ids, torch.ones_like(ids), positions, decoder.empty_cache(4)).present
    scales = [[float((part.abs().max() / 127).to(dtype)) for part in pair] for pair in present]
    factors = hadamard_factors(model.shape.head_dim)
    return {i: Int8Cache(keys, values, factors) for i, (keys, values) in enumerate(scales)}


def test_the_right_graph_passes(proven: Proven) -> None:
    agreement = proven.check()
    assert agreement.passed
    assert agreement.max_kl is not None
    assert agreement.kl < 0.1 * MAX_KL
    names = {c.tensor for c in agreement.comparisons}
    for case in ("sequence", "ragged", "continued"):
        for layer in range(LAYERS):
            assert {f"{case}.present.{layer}.{part}" for part in ("key", "value")} <= names


def test_caches_are_compared_as_integers(proven: Proven) -> None:
    backend = OrtBackend(proven.file, proven.lowering)
    for tensors in (proven.golden.expected, drive(backend, proven.golden.cases)):
        caches = {name: array for name, array in tensors.items() if ".present." in name}
        assert len(caches) == 3 * 2 * LAYERS
        for array in caches.values():
            assert (array == np.rint(array)).all()
            assert 64 < abs(array).max() <= 128


def other_scale(proto: onnx.ModelProto, name: str, operator: str) -> None:
    """10 % off in the nodes of one kind that read it."""
    (old,) = (t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(old)
    wrong = numpy_helper.from_array((array * 1.1).astype(array.dtype), f"{name}_wrong")
    proto.graph.initializer.append(wrong)
    changed = 0
    for node in proto.graph.node:
        if node.op_type == operator and node.input[1] == name:
            node.input[1], changed = wrong.name, changed + 1
    assert changed == 1


def roundings(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    """What rounds the new keys or values of a cache."""
    (join,) = (node for node in proto.graph.node if value in node.output)
    found: onnx.NodeProto
    (found,) = (node for node in proto.graph.node if join.input[1] in node.output)
    assert found.op_type == "QuantizeLinear"
    return found


@pytest.mark.parametrize("part", ["key", "value"])
def test_a_scale_that_is_off_when_rounding_is_found_in_its_layer(proven: Proven, part: str) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        name = roundings(proto, f"present.1.{part}").input[1]
        other_scale(proto, name, "QuantizeLinear")

    agreement = proven.check(proven.edited(f"rounding-{part}", edit))
    assert not agreement.passed
    assert agreement.first_bad == "layer 1"
    bad = {c.tensor for c in agreement.comparisons if not c.passed}
    assert {f"{case}.present.1.{part}" for case in ("sequence", "ragged", "continued")} <= bad


def test_a_key_scale_that_is_off_when_converting_back_is_found_in_its_layer(
    proven: Proven,
) -> None:
    """Integers of this layer are right then; what the attention gives is not."""

    def edit(proto: onnx.ModelProto) -> None:
        (name,) = (
            node.input[1]
            for node in proto.graph.node
            if node.op_type == "DequantizeLinear" and reads(proto, node, "present.1.key")
        )
        other_scale(proto, name, "DequantizeLinear")

    agreement = proven.check(proven.edited("converting-key", edit))
    assert not agreement.passed
    assert agreement.first_bad == "layer 1"
    assert all(c.passed for c in agreement.comparisons if ".present.1." in c.tensor)


def reads(proto: onnx.ModelProto, node: onnx.NodeProto, value: str) -> bool:
    """Whether a node reads a value, or what rearranges it."""
    name = node.input[0]
    while name != value:
        makers = [other for other in proto.graph.node if name in other.output]
        if not makers or makers[0].op_type not in ("Unsqueeze", "Transpose"):
            return False
        name = makers[0].input[0]
    return True


@pytest.mark.parametrize("rotated", ["queries", "keys"])
def test_a_rotation_of_one_side_alone_is_found_in_its_layer(proven: Proven, rotated: str) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        rounded = roundings(proto, "present.1.key").input[0]
        rotations = [n for n in proto.graph.node if n.op_type == "HadamardTransform"]
        place = next(i for i, node in enumerate(rotations) if rounded in node.output)
        # Those of a layer follow each other: one is of its keys, the other of its queries.
        dropped = rotations[place if rotated == "queries" else place ^ 1]
        for node in proto.graph.node:
            for index, name in enumerate(node.input):
                if name == dropped.output[0]:
                    node.input[index] = dropped.input[0]

    agreement = proven.check(proven.edited(f"only-{rotated}", edit))
    assert not agreement.passed
    assert agreement.first_bad == "layer 1"
    keys = [c for c in agreement.comparisons if c.tensor.endswith("present.1.key")]
    assert all(c.passed for c in keys) == (rotated == "keys")


# The bounds without a graph: one step of six tokens, in two cases.
STEP = StepInputs(np.zeros((1, 6), np.int64), np.ones((1, 6), np.int64), np.zeros((1, 6), np.int64))
CASES = tuple(Case(name, (STEP,)) for name in ("sequence", "ragged"))
ROWS = np.sign(np.random.default_rng(0).normal(size=(6, 32))).astype(np.float32)
EXPECTED = {
    f"{case.name}.{rest}": ROWS
    for case in CASES
    for rest in ("0.logits", "present.0.key", "present.1.key", "0.hidden.1")
}
ALL = (*EXPECTED, *(f"{case.name}.{rest}" for case in CASES for rest in ("logits", "hidden.1")))


def lowering_of(quant: str) -> Lowering:
    return plan_lowering(Recipe("cpu", quant=quant, dtype="fp16"), parse_target("cpu"))


def golden(errors: dict[str, float]) -> Golden:
    return Golden(CASES, EXPECTED, {name: errors.get(name, 0.0) for name in (*ALL, KL)})


def off_by(share: float, name: str) -> Tensors:
    noise = np.sign(np.random.default_rng(99).normal(size=EXPECTED[name].shape))
    rms = np.sqrt(np.square(EXPECTED[name]).mean())
    return {**EXPECTED, name: (EXPECTED[name] + share * rms * noise).astype(np.float32)}


ROUNDED, WEIGHTS_ONLY = "w4a16-gptq:kv=int8", "w4a16-gptq"


def test_the_largest_error_of_a_kind_stands_for_all_of_it() -> None:
    """Which number is on the other side of a boundary is chance here too."""
    plain = golden({"ragged.present.1.key": 0.2})
    other = off_by(0.4, "sequence.present.1.key")
    assert compare("other", other, plain, lowering_of(ROUNDED)).passed
    assert not compare("other", other, plain, lowering_of(WEIGHTS_ONLY)).passed
    for name in ("sequence.present.0.key", "sequence.0.logits", "sequence.0.hidden.1"):
        assert not compare("other", off_by(0.4, name), plain, lowering_of(ROUNDED)).passed


@pytest.mark.parametrize("name", EXPECTED)
def test_more_than_twice_the_largest_never_passes(name: str) -> None:
    plain, bound = golden(dict.fromkeys(ALL, 0.01)), 2 * 0.01 + FLOORS["fp16"]
    bound += rounding_floor(ROWS) if ".present." in name else 0.0
    low = lowering_of(ROUNDED)
    assert not compare("other", off_by(1.05 * bound, name), plain, low).passed
    assert compare("other", off_by(0.9 * bound, name), plain, low).passed


def test_two_numbers_of_a_token_may_be_a_step_off() -> None:
    """And not four, whatever plain torch met."""
    for steps, expected in ((2, True), (4, False)):
        found = {name: 40 * value for name, value in EXPECTED.items()}
        plain = Golden(CASES, found, dict.fromkeys((*ALL, KL), 0.0))
        wrong = found["sequence.present.0.key"].copy()
        wrong[:, :steps] += 1
        found = {**found, "sequence.present.0.key": wrong}
        assert compare("other", found, plain, lowering_of(ROUNDED)).passed == expected


@pytest.mark.parametrize(
    ("quant", "bounded"),
    [
        (ROUNDED, True),
        ("w8a8:kv=int8", True),
        ("w8a8", True),
        (WEIGHTS_ONLY, False),
        ("w4a16-gptq:kv=float", False),
        ("none", False),
    ],
)
def test_schemes_that_round_at_run_time_have_a_bound_on_the_distribution(
    quant: str, bounded: bool
) -> None:
    assert parse_scheme(quant).rounds_at_run_time == bounded
    agreement = compare("other", dict(EXPECTED), golden({KL: 0.3}), lowering_of(quant))
    assert agreement.max_kl == (pytest.approx(2 * 0.3 + MAX_KL) if bounded else None)
