"""Rotated and rounded inputs in the graph: as nodes, and as numbers against torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx import numpy_helper as numpy_tensor

from edgeattn.calibration.store import LayerStore
from edgeattn.devices.registry import parse_target
from edgeattn.exporters.export import export_graph
from edgeattn.exporters.inserter import Inserter
from edgeattn.exporters.reads import insert_reads
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import TORCH_DTYPES, Model, load_decoder, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.hadamard import hadamard_factors
from edgeattn.recipe import Recipe
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.transforms.calibrate import quantize_on_text
from edgeattn.transforms.fuse import fuse_projections
from edgeattn.transforms.rotate import hadamard_rotations, rotate

LAYERS = 3
FORMS = {
    "cpu": ("cpu", "fp32"),
    "cpu-fp16": ("cpu", "fp16"),
    "jetson-primitive-fp32": ("jetson-orin@jetpack6.2", "fp32"),
    "jetson-standard-fp16": ("jetson-orin@jetpack7.2", "fp16"),
}
# Of the logits' root mean square. In fp32 few numbers fall on the other side of a boundary; in fp16
# so many do that rounding noise is another noise altogether, each linear layer for itself is right.
ALLOWED = {"fp32": 1e-4, "fp16": 0.04}


@dataclass(frozen=True)
class Exported:
    """A graph of a tiny model whose linear layers all round their input.

    Attributes:
        model: what was exported.
        lowering: how.
        file: the graph, its weights beside it.
        proto: the same, without weights.
    """

    model: Model
    lowering: Lowering
    file: Path
    proto: onnx.ModelProto

    @property
    def allowed(self) -> float:
        """Error of the logits."""
        return ALLOWED[self.lowering.dtype]

    def count(self, op_type: str) -> int:
        return sum(node.op_type == op_type for node in self.proto.graph.node)

    def readers(self) -> dict[str, onnx.NodeProto]:
        """The MatMul of every linear layer by the name of its weight."""
        found = {}
        for node in self.proto.graph.node:
            name = node.input[1].removesuffix("_dequantized") if node.op_type == "MatMul" else ""
            if name.endswith("_proj.weight"):
                found[name] = node
        return found

    def producer(self, value: str) -> onnx.NodeProto:
        return next(node for node in self.proto.graph.node if value in node.output)

    def initializer(self, name: str) -> onnx.TensorProto:
        return next(t for t in self.proto.graph.initializer if t.name == name)


@pytest.fixture(scope="module", params=FORMS)
def exported(
    request: pytest.FixtureRequest,
    random_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Exported:
    name, dtype = FORMS[request.param]
    model = model_of(open_checkpoint(random_checkpoint()))
    target, recipe = (
        parse_target(name),
        Recipe(name, quant="w8a8-spinquant:range=max,refit=off", dtype=dtype),
    )
    lowering = fit_lowering(plan_lowering(recipe, target), model.shape, target)
    folder = tmp_path_factory.mktemp("reads")
    model = quantize_on_text(
        rotate(model, hadamard_rotations(model.shape, online=True)),
        lowering.scheme,
        torch.from_numpy(tokens(4, 16)),
        LayerStore(folder / "work", {}),
        scale_dtype=TORCH_DTYPES[dtype],
    )
    if lowering.attention == "group-query":
        model = fuse_projections(model)
        assert model.shape.fused
    file = folder / "model.onnx"
    export_graph(model, lowering, file, folder / "model.onnx.data")
    proto = onnx.load(file, load_external_data=False)
    return Exported(model, lowering, file, proto)


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 272, (rows, length), dtype=np.int64)


def run_torch(exported: Exported, model: Model) -> np.ndarray:
    """Logits of a prefill and a decode step, computed in fp32 on the weights that are stored."""
    form = exported.lowering.attention
    decoder = load_decoder(
        model,
        weight_dtype=TORCH_DTYPES[exported.lowering.dtype],
        compute_dtype=torch.float32,
        form="standard" if form == "group-query" else form,
    )
    ids, found, past = torch.from_numpy(tokens(2, 12)), [], decoder.empty_cache(2)
    with torch.inference_mode():
        for begin, end in ((0, 11), (11, 12)):
            mask = torch.ones(2, end, dtype=torch.int64)
            positions = torch.arange(begin, end).expand(2, -1)
            output = decoder(ids[:, begin:end], mask, positions, past)
            past = output.present
            found.append(output.logits)
    return torch.cat(found, dim=1).numpy()


def feeds(exported: Exported, begin: int, end: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": tokens(2, 12)[:, begin:end],
        "attention_mask": np.ones((2, end), np.int64),
        "position_ids": np.tile(np.arange(begin, end, dtype=np.int64), (2, 1)),
    }


def no_past(exported: Exported, session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    number = np.float32 if exported.lowering.dtype == "fp32" else np.float16
    return {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), number)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }


def run_onnx(exported: Exported) -> np.ndarray:
    """As `run_torch`, in ONNX Runtime."""
    session, found = open_onnxruntime(exported.file, threads=1, exact=True), []
    names = [value.name for value in session.get_outputs()]
    past = no_past(exported, session)
    for begin, end in ((0, 11), (11, 12)):
        values = session.run(names, {**feeds(exported, begin, end), **past})
        outputs = dict(zip(names, values, strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append(outputs["logits"].astype(np.float32))
    return np.concatenate(found, axis=1)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The lower quartile of the tokens' errors: a number that is rounded otherwise spoils few."""
    squares = np.square(found.astype(np.float64) - expected).mean(-1)
    scale = np.square(expected.astype(np.float64)).mean()
    return float(np.quantile(np.sqrt(squares / scale), 0.25))


def test_onnxruntime_equals_the_decoder(exported: Exported) -> None:
    assert error(run_onnx(exported), run_torch(exported, exported.model)) < exported.allowed


def _scales_of(model: Model, ending: str, factor: float) -> Model:
    reads = {
        name: replace(read, scale=(read.scale or 0) * factor) if name.endswith(ending) else read
        for name, read in model.reads.items()
    }
    return replace(model, reads=reads)


def _no_rotation(model: Model) -> Model:
    reads = {name: replace(read, rotation=None) for name, read in model.reads.items()}
    return replace(model, reads=reads)


def _no_rounding(model: Model) -> Model:
    reads = {name: replace(read, scale=None) for name, read in model.reads.items()}
    return replace(model, reads=reads)


MISTAKES: Mapping[str, Callable[[Model], Model]] = {
    "scale-of-o-doubled": lambda model: _scales_of(model, "layers.1.self_attn.o_proj.weight", 2),
    "scale-of-down-doubled": lambda model: _scales_of(model, "layers.1.mlp.down_proj.weight", 2),
    "scale-of-o-halved": lambda model: _scales_of(model, "layers.1.self_attn.o_proj.weight", 0.5),
    "all-scales-doubled": lambda model: _scales_of(model, "", 2),
    "no-rotation": _no_rotation,
    "no-rounding": _no_rounding,
}
COARSE_MISTAKES = ("all-scales-doubled", "no-rotation")


def test_a_wrong_read_differs(exported: Exported) -> None:
    """The comparison above is only worth something if these mistakes exceed what it allows."""
    right = run_torch(exported, exported.model)
    for name, mistake in MISTAKES.items():
        if exported.lowering.dtype == "fp32" or name in COARSE_MISTAKES:
            wrong = run_torch(exported, mistake(exported.model))
            assert error(wrong, right) > 1.2 * exported.allowed, name


def test_every_linear_layer_reads_the_numbers_it_should(exported: Exported) -> None:
    """Each for itself, on the inputs that it has in the graph."""
    readers, reads = exported.readers(), exported.model.reads
    values: dict[str, tuple[str, str]] = {}
    for name, reader in readers.items():
        before = exported.producer(exported.producer(reader.input[0]).input[0])
        if exported.producer(before.input[0]).op_type == "HadamardTransform":
            before = exported.producer(before.input[0])
        values[name] = before.input[0], reader.input[0]
    found = shown(exported, {value for pair in values.values() for value in pair})
    for name, (before, after) in values.items():
        read, x = reads[name], torch.from_numpy(found[before]).float()
        assert read.scale is not None
        steps = (torch.from_numpy(found[after]).float() - read(x)) / read.scale
        # Rotated in fp16, many a number lies on the other side of a boundary, and just there.
        rough = exported.lowering.dtype == "fp16" and read.rotation is not None
        near = steps.abs() < 0.1
        if read.rotation is None:
            # As close to a boundary as the quotient is exact (fp16: two roundings of 2^-11), either
            # side of it is right.
            quotient = x / read.scale
            exact = 2.0**-10 if exported.lowering.dtype == "fp16" else 2.0**-22
            near |= (quotient.remainder(1) - 0.5).abs() < exact * quotient.abs()
        assert near.float().mean() > (0.9 if rough else 0.999), name
        assert steps.abs().max() < 1.2, name
        doubled = replace(read, scale=2 * read.scale)
        assert ((doubled(x) - read(x)).abs() > 0.9 * read.scale).float().mean() > 0.3, name


def shown(exported: Exported, values: set[str]) -> dict[str, np.ndarray]:
    """Inner values of the graph in a prefill."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exported.proto)
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[exported.lowering.dtype]
    names = sorted(values)
    proto.graph.output.extend(helper.make_tensor_value_info(n, kind, None) for n in names)
    session = open_onnxruntime(
        proto.SerializeToString(), weights_dir=exported.file.parent, threads=1, exact=True
    )
    arrays = session.run(names, {**feeds(exported, 0, 12), **no_past(exported, session)})
    return dict(zip(names, arrays, strict=True))


def test_layers_that_read_one_input_share_its_rounding(exported: Exported) -> None:
    readers = exported.readers()
    assert set(readers) == {
        f"layers.{i}.{name}.weight"
        for i in range(LAYERS)
        for name in exported.model.shape.linears()
    }
    groups = Counter(node.input[0] for node in readers.values())
    shared = {"fused": [1, 1, 1, 1], "apart": [1, 1, 2, 3]}
    kind = "fused" if exported.model.shape.fused else "apart"
    assert sorted(groups.values()) == sorted(shared[kind] * LAYERS)
    assert exported.count("QuantizeLinear") == 4 * LAYERS


def test_every_linear_layer_reads_int8_with_its_scale(exported: Exported) -> None:
    """Zero points are spelled out: without one QuantizeLinear gives uint8."""
    wide = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[exported.lowering.dtype]
    for name, reader in exported.readers().items():
        back = exported.producer(reader.input[0])
        to_int8 = exported.producer(back.input[0])
        assert (back.op_type, to_int8.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert list(back.input[1:]) == list(to_int8.input[1:])
        scale, zero_point = (exported.initializer(part) for part in to_int8.input[1:])
        assert (zero_point.data_type, list(zero_point.dims)) == (TensorProto.INT8, [])
        assert numpy_tensor.to_array(zero_point) == 0
        assert (scale.data_type, list(scale.dims)) == (wide, [])
        assert float(numpy_tensor.to_array(scale)) == exported.model.reads[name].scale


def test_the_rotation_is_before_down_projections_alone(exported: Exported) -> None:
    readers = exported.readers()
    rotated = set()
    for name, reader in readers.items():
        to_int8 = exported.producer(exported.producer(reader.input[0]).input[0])
        before = exported.producer(to_int8.input[0])
        if before.op_type == "HadamardTransform":
            assert before.domain == "edgeattn"
            rotated.add(name)
    assert rotated == {f"layers.{i}.mlp.down_proj.weight" for i in range(LAYERS)}
    assert exported.count("HadamardTransform") == LAYERS


def test_the_operator_is_described_once(exported: Exported) -> None:
    functions = [(f.domain, f.name) for f in exported.proto.functions]
    assert functions.count(("edgeattn", "HadamardTransform")) == 1
    (body,) = (f for f in exported.proto.functions if f.name == "HadamardTransform")
    opsets = {entry.domain: entry.version for entry in exported.proto.opset_import}
    assert opsets["edgeattn"] == 1
    assert {entry.domain: entry.version for entry in body.opset_import} == {"": opsets[""]}


def test_the_factors_are_there_once(exported: Exported) -> None:
    factors = hadamard_factors(128)
    names = [t.name for t in exported.proto.graph.initializer if t.name.startswith("hadamard_")]
    assert len(names) == len(set(names)) == 2
    for name, matrix in zip(sorted(names), (factors.left, factors.right), strict=True):
        stored = numpy_tensor.to_array(exported.initializer(name))
        np.testing.assert_array_equal(stored, matrix.numpy())
    zeros = [t for t in exported.proto.graph.initializer if t.name == "int8_zero_point"]
    assert len(zeros) == 1


def test_names_are_unique_and_the_checker_takes_it(exported: Exported) -> None:
    nodes = exported.proto.graph.node
    for names in ([n.name for n in nodes], [o for n in nodes for o in n.output if o]):
        assert [name for name, count in Counter(names).items() if count > 1] == []
    onnx.checker.check_model(str(exported.file), full_check=True)


# The smallest graphs: three linear layers, two of them on one input.
WIDTH = 12


def graph_of_three() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """y, z = x A, x B; u = (x B) C."""
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for n in "abc"}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"]),
        helper.make_node("MatMul", ["x", "b"], ["z"]),
        helper.make_node("MatMul", ["z", "c"], ["u"]),
    ]
    values = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "xyzu"
    }
    graph = helper.make_graph(
        nodes,
        "three",
        [values["x"]],
        [values[n] for n in "yzu"],
        [numpy_tensor.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model), weights


READS: dict[str, dict[str, LinearInput]] = {
    "nothing": {},
    "unknown": {"d": LinearInput(scale=0.1)},
    "as-it-is": {"a": LinearInput()},
    "one": {"a": LinearInput(scale=0.1)},
    "shared": {"a": LinearInput(scale=0.1), "b": LinearInput(scale=0.1)},
    "one-behind-the-other": {"b": LinearInput(scale=0.1), "c": LinearInput(scale=0.5)},
    "rotated": {"c": LinearInput(hadamard_factors(WIDTH))},
    "rotated-and-not": {
        "a": LinearInput(hadamard_factors(WIDTH), 0.1),
        "b": LinearInput(scale=0.1),
    },
}


@pytest.mark.parametrize("name", READS)
def test_each_layer_reads_as_it_is_told(name: str) -> None:
    reads = READS[name]
    model, weights = graph_of_three()
    insert_reads(model, reads, Inserter(model, ir.DataType.FLOAT))
    x = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)

    def product(value: torch.Tensor, weight: str) -> torch.Tensor:
        return reads.get(weight, LinearInput())(value) @ torch.from_numpy(weights[weight])

    y, z = (product(torch.from_numpy(x), weight) for weight in "ab")
    for found, expected in zip(run_ir(model, x), (y, z, product(z, "c")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def run_ir(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(["y", "z", "u"], {"x": x})
    return found


@pytest.mark.parametrize(
    ("name", "rotations", "roundings"),
    [
        ("nothing", 0, 0),
        ("unknown", 0, 0),
        ("as-it-is", 0, 0),
        ("one", 0, 1),
        ("shared", 0, 1),
        ("one-behind-the-other", 0, 2),
        ("rotated", 1, 0),
        ("rotated-and-not", 1, 2),
    ],
)
def test_no_more_nodes_than_needed(name: str, rotations: int, roundings: int) -> None:
    model, _ = graph_of_three()
    insert_reads(model, READS[name], Inserter(model, ir.DataType.FLOAT))
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["HadamardTransform"] == rotations
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == roundings
    assert len(model.functions) == (1 if rotations else 0)
    assert ("edgeattn" in model.graph.opset_imports) == bool(rotations)
