"""Int8 caches in the graph: its inputs and outputs, its nodes, and the numbers against torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import TORCH_DTYPES, Model, load_decoder, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.hadamard import HadamardFactors, hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.scheme import Scheme
from edgeattn.recipe import Recipe
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.transforms.calibrate import quantize_on_text
from edgeattn.transforms.rotate import hadamard_rotations, rotate

ROWS, LENGTH, PREFILL = 2, 12, 11
STEPS = ((0, PREFILL), (PREFILL, LENGTH))
CPU, JETPACK6, JETPACK7 = "cpu", "jetson-orin@jetpack6.2", "jetson-orin@jetpack7.2"
_MISTRAL = {"model_type": "mistral", "sliding_window": 4}
_GEMMA2 = {
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 2.0,
}
# Target, dtype, config, whether keys are rotated.
GRAPHS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "cpu": (CPU, "fp32", {}, True),
    "cpu-plain": (CPU, "fp32", {}, False),
    "primitive": (JETPACK6, "fp32", {}, True),
    "primitive-plain": (JETPACK6, "fp32", {}, False),
    "primitive-fp16": (JETPACK6, "fp16", {}, True),
    "standard-fp16": (JETPACK7, "fp16", {}, True),
    "mha-cpu": (CPU, "fp32", {"num_key_value_heads": 4}, True),
    "mqa-primitive": (JETPACK6, "fp32", {"num_key_value_heads": 1}, True),
    "gemma2-cpu": (CPU, "fp32", _GEMMA2, True),
    "mistral-window-cpu": (CPU, "fp32", _MISTRAL, False),
}
NUMBERS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
# Share of integers that are off, and error of any tensor relative to its root mean square. In fp32
# few numbers lie so near a boundary that another order of summation decides; in fp16 many do, and
# they are off by one.
ALLOWED = {"fp32": (2e-3, 2e-3), "fp16": (0.4, 0.014)}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """A graph of a tiny model with int8 caches.

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
    def layers(self) -> int:
        return self.model.shape.num_layers

    def count(self, op_type: str) -> int:
        return sum(node.op_type == op_type for node in self.proto.graph.node)

    def session(self, proto: onnx.ModelProto | None = None) -> onnxruntime.InferenceSession:
        serialized = (proto or self.proto).SerializeToString()
        return open_onnxruntime(serialized, weights_dir=self.file.parent, threads=1, exact=True)


def lowering_of(target: str, dtype: str, model: Model) -> Lowering:
    """Weights stay in floating point, so that caches alone are rounded."""
    planned = plan_lowering(Recipe(target, quant="w8a8:kv=int8", dtype=dtype), parse_target(target))
    alone = replace(planned, scheme=Scheme("none", kv_bits=8))
    return fit_lowering(alone, model.shape, parse_target(target))


def export(model: Model, lowering: Lowering, folder: Path) -> Exported:
    file = folder / "model.onnx"
    export_graph(model, lowering, file, folder / "model.onnx.data")
    return Exported(model, lowering, file, onnx.load(file, load_external_data=False))


@pytest.fixture(scope="module", params=GRAPHS)
def exported(
    request: pytest.FixtureRequest,
    random_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Exported:
    target, dtype, config, rotated = GRAPHS[request.param]
    plain = model_of(open_checkpoint(random_checkpoint(**config)))
    lowering = lowering_of(target, dtype, plain)
    caches = fitting(plain, lowering, rotated)
    model = replace(plain, caches=caches)
    return export(model, lowering, tmp_path_factory.mktemp("int8"))


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 272, (ROWS, LENGTH), dtype=np.int64)


def decoder_of(model: Model, lowering: Lowering) -> Decoder:
    """In fp32 on the weights that are stored."""
    assert lowering.attention != "group-query"
    return load_decoder(
        model,
        weight_dtype=TORCH_DTYPES[lowering.dtype],
        compute_dtype=torch.float32,
        form=lowering.attention,
    )


def fitting(model: Model, lowering: Lowering, rotated: bool) -> dict[int, Int8Cache]:
    """Scales that clip the largest keys and values of a run in floating point."""
    dtype, last = TORCH_DTYPES[lowering.dtype], run_torch(model, lowering)[-1]
    factors = hadamard_factors(model.shape.head_dim) if rotated else None

    def scale(name: str) -> float:
        return float(torch.tensor(abs(last[name]).max() / 180).to(dtype))

    return {
        i: Int8Cache(scale(f"present.{i}.key"), scale(f"present.{i}.value"), factors)
        for i in range(model.shape.num_layers)
    }


@torch.inference_mode()
def run_torch(model: Model, lowering: Lowering) -> list[Arrays]:
    """Logits and caches of a prefill and of the decode step after it."""
    decoder, ids = decoder_of(model, lowering), torch.from_numpy(tokens())
    past = decoder.empty_cache(ROWS)
    found: list[Arrays] = []
    for begin, end in STEPS:
        mask = torch.ones(ROWS, end, dtype=torch.int64)
        positions = torch.arange(begin, end).expand(ROWS, -1)
        output = decoder(ids[:, begin:end], mask, positions, past)
        past = output.present
        arrays = {"logits": output.logits.numpy()}
        for layer, pair in enumerate(past):
            for part, tensor in zip(("key", "value"), pair, strict=True):
                arrays[f"present.{layer}.{part}"] = tensor.numpy()
        found.append(arrays)
    return found


def run_onnx(session: onnxruntime.InferenceSession) -> list[Arrays]:
    """As `run_torch`, in ONNX Runtime."""
    names = [value.name for value in session.get_outputs()]
    dtypes = {"tensor(int8)": np.int8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {
        value.name: np.zeros((ROWS, value.shape[1], 0, value.shape[3]), dtypes[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    found: list[Arrays] = []
    for begin, end in STEPS:
        feeds = {
            "input_ids": tokens()[:, begin:end],
            "attention_mask": np.ones((ROWS, end), np.int64),
            "position_ids": np.tile(np.arange(begin, end, dtype=np.int64), (ROWS, 1)),
        }
        outputs = dict(zip(names, session.run(names, {**feeds, **past}), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        found.append({**outputs, "logits": outputs["logits"].astype(np.float32)})
    return found


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def disagreements(found: Sequence[Arrays], expected: Sequence[Arrays], dtype: str) -> list[str]:
    """The tensors that differ by more than the dtype explains."""
    flips, noise = ALLOWED[dtype]
    wrong = []
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            difference = value - theirs[name].astype(np.float64)
            rare = value.dtype != np.int8 or (difference != 0).mean() <= flips
            if not rare or rms(difference) > noise * rms(theirs[name]):
                wrong.append(f"{step}.{name}")
    return wrong


def test_past_and_present_are_int8(exported: Exported) -> None:
    shape, wide = exported.model.shape, NUMBERS[exported.lowering.dtype]
    caches = 0
    for value in (*exported.proto.graph.input, *exported.proto.graph.output):
        kind = value.type.tensor_type
        if value.name.startswith(("past_key_values.", "present.")):
            length = "past" if value.name.startswith("past") else "total"
            sizes = ["batch_size", shape.num_kv_heads, f"{length}_sequence_length", shape.head_dim]
            assert kind.elem_type == TensorProto.INT8
            assert [d.dim_param or d.dim_value for d in kind.shape.dim] == sizes
            caches += 1
        else:
            expected = wide if value.name == "logits" else TensorProto.INT64
            assert kind.elem_type == expected
    assert caches == 4 * exported.layers


def test_one_rounding_for_each_cache_and_two_rotations_for_each_layer(exported: Exported) -> None:
    rotated = exported.model.caches[0].rotation is not None
    assert exported.count("QuantizeLinear") == exported.count("DequantizeLinear")
    assert exported.count("QuantizeLinear") == 2 * exported.layers
    assert exported.count("HadamardTransform") == (2 * exported.layers if rotated else 0)
    functions = [function.name for function in exported.proto.functions]
    assert functions.count("HadamardTransform") == rotated
    domains = {entry.domain for entry in exported.proto.opset_import}
    assert ("edgeattn" in domains) == rotated


def roundings(exported: Exported) -> Iterator[tuple[str, onnx.NodeProto, onnx.NodeProto]]:
    """Each cache's name without "present.", what rounds it and what converts it back."""
    nodes = exported.proto.graph.node
    for join in nodes:
        if join.op_type == "Concat" and join.output[0].startswith("present."):
            reachable = {join.output[0]}
            for node in nodes:
                if reachable & set(node.input) and node.op_type in ("Unsqueeze", "Transpose"):
                    reachable |= set(node.output)
            (before,) = (node for node in nodes if join.input[1] in node.output)
            (after,) = (
                node
                for node in nodes
                if node.op_type == "DequantizeLinear" and node.input[0] in reachable
            )
            assert before.op_type == "QuantizeLinear"
            yield join.output[0].removeprefix("present."), before, after


def test_both_sides_of_a_cache_have_its_scale(exported: Exported) -> None:
    """Zero points are spelled out: without one QuantizeLinear gives uint8."""
    constants = {tensor.name: tensor for tensor in exported.proto.graph.initializer}
    found = list(roundings(exported))
    assert len(found) == 2 * exported.layers
    for name, before, after in found:
        layer, _, part = name.partition(".")
        cache = exported.model.caches[int(layer)]
        expected = {"key": cache.key_scale, "value": cache.value_scale}[part]
        for node in (before, after):
            scale, zero = (constants[operand] for operand in node.input[1:])
            assert (scale.data_type, list(scale.dims)) == (NUMBERS[exported.lowering.dtype], [])
            assert float(numpy_tensor.to_array(scale)) == pytest.approx(expected, rel=1e-7)
            assert (zero.data_type, list(zero.dims)) == (TensorProto.INT8, [])
            assert numpy_tensor.to_array(zero) == 0


def test_names_are_unique_and_the_checker_takes_it(exported: Exported) -> None:
    nodes = exported.proto.graph.node
    for names in ([n.name for n in nodes], [o for n in nodes for o in n.output if o]):
        assert [name for name, count in Counter(names).items() if count > 1] == []
    onnx.checker.check_model(str(exported.file), full_check=True)


def test_onnxruntime_equals_the_decoder(exported: Exported) -> None:
    expected = run_torch(exported.model, exported.lowering)
    found = run_onnx(exported.session())
    assert disagreements(found, expected, exported.lowering.dtype) == []
    for layer in range(exported.layers):
        for part in ("key", "value"):
            first, second = (step[f"present.{layer}.{part}"] for step in found)
            assert first.dtype == second.dtype == np.int8
            np.testing.assert_array_equal(second[:, :, :PREFILL], first)
            assert (abs(second.astype(int)) >= 127).any(), "the range is used"


def scaled(proto: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """The scale of one node 10 % larger, that of no other."""
    old = next(t for t in proto.graph.initializer if t.name == node.input[1])
    array = numpy_tensor.to_array(old)
    new = f"{old.name}:{node.op_type}"
    proto.graph.initializer.append(numpy_tensor.from_array((array * 1.1).astype(array.dtype), new))
    node.input[1] = new


def bypassed(proto: onnx.ModelProto, rotation: onnx.NodeProto) -> None:
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == rotation.output[0]:
                node.input[place] = rotation.input[0]


def mistakes(exported: Exported) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Graphs that are wrong in one place of layer 1, or of a rotation somewhere."""

    def copied() -> Exported:
        proto = onnx.ModelProto()
        proto.CopyFrom(exported.proto)
        return replace(exported, proto=proto)

    for part in ("key", "value"):
        for side in (0, 1):
            if part == "value" and side == 1 and exported.model.shape.output_norms:
                continue  # no mistake: what the attention gives is normalised
            copy = copied()
            pair = next(nodes for name, *nodes in roundings(copy) if name == f"1.{part}")
            scaled(copy.proto, pair[side])
            yield f"{part} {pair[side].op_type}", copy.proto
    for number in range(exported.count("HadamardTransform")):
        copy = copied()
        rotations = [n for n in copy.proto.graph.node if n.op_type == "HadamardTransform"]
        bypassed(copy.proto, rotations[number])
        yield f"rotation {number}", copy.proto


def test_a_wrong_graph_differs(exported: Exported) -> None:
    """The comparison above is only worth something if it refuses these."""
    expected = run_torch(exported.model, exported.lowering)
    for name, proto in mistakes(exported):
        found = run_onnx(exported.session(proto))
        assert disagreements(found, expected, exported.lowering.dtype), name


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("target", [CPU, JETPACK6])
@pytest.mark.usefixtures("shared_traces")
def test_some_layers_may_hold_floats(
    llama: Model, tmp_path: Path, target: str, layers: tuple[int, ...]
) -> None:
    lowering = lowering_of(target, "fp32", llama)
    every = fitting(llama, lowering, rotated=True)
    model = replace(llama, caches={layer: every[layer] for layer in layers})
    exported = export(model, lowering, tmp_path)
    for value in (*exported.proto.graph.input, *exported.proto.graph.output):
        _, _, place = value.name.removeprefix("past_key_values.").rpartition("present.")
        if place.endswith((".key", ".value")):
            held = int(place.partition(".")[0]) in layers
            expected = TensorProto.INT8 if held else TensorProto.FLOAT
            assert value.type.tensor_type.elem_type == expected
    assert exported.count("QuantizeLinear") == 2 * len(layers)
    assert exported.count("HadamardTransform") == 2 * len(layers)
    found = run_onnx(exported.session())
    assert disagreements(found, run_torch(model, lowering), "fp32") == []


@pytest.mark.usefixtures("shared_traces")
def test_rounded_activations_and_online_rotations_beside_it(llama: Model, tmp_path: Path) -> None:
    target, quant = parse_target(CPU), "w8a8-spinquant:kv=int8"
    lowering = plan_lowering(Recipe(CPU, quant=quant), target)
    lowering = fit_lowering(lowering, llama.shape, target)
    model = quantize_on_text(
        rotate(llama, hadamard_rotations(llama.shape, online=True)),
        lowering.scheme,
        torch.from_numpy(tokens()),
        LayerStore(tmp_path / "work", {}),
        scale_dtype=torch.float32,
    )
    assert len(model.caches) == len({id(cache) for cache in model.caches.values()}) == 3
    exported = export(model, lowering, tmp_path)
    kinds = Counter(node.op_type for node in exported.proto.graph.node)
    assert kinds["HadamardTransform"] == 3 * (2 + 1)
    assert kinds["QuantizeLinear"] == 3 * (2 + 4)
    # Activations are rounded too, so that a number on the other side of a boundary has followers.
    for step, expected in zip(
        run_onnx(exported.session()), run_torch(model, lowering), strict=True
    ):
        for name, value in step.items():
            difference = value - expected[name].astype(np.float64)
            assert rms(difference) < 0.01 * rms(expected[name]), name
            assert value.dtype != np.int8 or (difference != 0).mean() < 0.02, name


def value_of(name: str = "x", width: int = 8) -> tuple[ir.Model, ir.Node, ir.Value]:
    """A graph of one node, and the value it reads."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", width]) for n in (name, "y")]
    nodes = [helper.make_node("Relu", [name], ["y"])]
    graph = helper.make_graph(nodes, "one", infos[:1], infos[1:])
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    (node,) = model.graph
    value = node.inputs[0]
    assert value is not None
    return model, node, value


# Equal, but not one and the same.
FACTORS: tuple[HadamardFactors, HadamardFactors] = (hadamard_factors(8), hadamard_factors(8))
Insert = Callable[[Inserter, ir.Node, ir.Value, bool], ir.Value]
INSERTIONS: Mapping[str, Insert] = {
    "rounded": lambda i, n, v, other: i.to_int8(n, v, 0.2 if other else 0.1),
    "converted back": lambda i, n, v, other: i.from_int8(n, v, 0.2 if other else 0.1),
    "rotated": lambda i, n, v, other: i.rotate(n, v, FACTORS[other]),
}


@pytest.mark.parametrize("insert", INSERTIONS.values(), ids=INSERTIONS)
def test_one_name_is_not_made_in_two_ways(insert: Insert) -> None:
    model, node, value = value_of()
    inserter = Inserter(model, ir.DataType.FLOAT)
    made = insert(inserter, node, value, False)
    assert insert(inserter, node, value, False) is made
    assert len(model.graph) == 2
    with pytest.raises(AssertionError, match=f"{made.name} is made twice, in two ways"):
        insert(inserter, node, value, True)


def test_what_is_inserted_computes_what_its_name_says() -> None:
    model, node, value = value_of()
    inserter = Inserter(model, ir.DataType.FLOAT)
    rotated = inserter.rotate(node, value, FACTORS[0])
    integers = inserter.to_int8(node, rotated, 0.05)
    node.replace_input_with(0, inserter.from_int8(node, integers, 0.05))
    serialized = ir.to_proto(model).SerializeToString()
    session = open_onnxruntime(serialized, threads=1)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) * 3
    block = np.kron(*(side.numpy() for side in (FACTORS[0].left, FACTORS[0].right)))
    exact = x.astype(np.float64) @ block / math.sqrt(8)
    expected = np.maximum(np.clip(np.rint(exact / 0.05), -128, 127) * 0.05, 0)
    (found,) = session.run(["y"], {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-6)
