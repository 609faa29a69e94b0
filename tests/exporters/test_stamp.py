"""One traced block stamped three times equals the trace of all three: as graphs and as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgeattn.devices.registry import parse_target
from edgeattn.exporters.stamp import stamp
from edgeattn.exporters.trace import Trace, trace_decoder
from edgeattn.exporters.weights import WeightBinder, write_weights
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import load_decoder, model_of
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.transforms.fuse import fuse_projections
from edgeattn.transforms.quantize import quantize
from edgeattn.verify.tolerance import relative_error

_GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 5,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
}
# One family and one spelling of attention each, so that every pair of features is met once.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied-standard": ("standard", {}),
    "llama-mha-standard": ("standard", {"num_key_value_heads": 4}),
    "llama-mqa-primitive": ("primitive", {"num_key_value_heads": 1}),
    "llama-untied-primitive": ("primitive", {"tie_word_embeddings": False}),
    "llama-group-query": ("group-query", {}),
    "qwen2-standard": ("standard", {"model_type": "qwen2", "tie_word_embeddings": False}),
    "qwen3-primitive": ("primitive", {"model_type": "qwen3"}),
    "qwen3-group-query": ("group-query", {"model_type": "qwen3"}),
    "mistral-window-standard": ("standard", {"model_type": "mistral", "sliding_window": 4}),
    "smollm3-standard": ("standard", {"model_type": "smollm3", "num_hidden_layers": 5}),
    "smollm3-group-query": ("group-query", {"model_type": "smollm3", "num_hidden_layers": 5}),
    "phi3-partial-rotary": (
        "group-query",
        {"model_type": "phi3", "head_dim": 32, "partial_rotary_factor": 0.5},
    ),
    "gemma2-softcaps-primitive": (
        "primitive",
        {
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3-standard": ("standard", _GEMMA3),
    "llama-static": ("static", {}),
    "gemma3-static": ("static", _GEMMA3),
}
TOLERANCE = 1e-5  # of the RMS, as between torch and ONNX Runtime in fp32


class Pair:
    """A tiny model with the trace of one block per kind and of all layers."""

    def __init__(self, form: str, path: Path) -> None:
        self.form = form
        self.model = model_of(open_checkpoint(path))
        if form == "group-query":
            self.model = fuse_projections(self.model)
        self.one = trace_decoder(self.model.shape, self.lowering("none"))
        self.whole = trace_decoder(self.model.shape, self.lowering("none"), whole=True)

    def lowering(self, quant: str) -> Lowering:
        target = "jetson-orin@jetpack6.2" if self.form == "primitive" else "cpu"
        asked = Recipe(target, quant=quant, dtype="fp32")
        if self.form == "static":
            static = replace(asked, kv_cache="static", context=8 + STEPS)
            return plan_lowering(static, parse_target(target))
        lowering = plan_lowering(asked, parse_target(target))
        return replace(lowering, attention=self.form)  # type: ignore[arg-type]

    def stamped(self, trace: Trace, quant: str) -> tuple[ir.Model, WeightBinder]:
        lowering = self.lowering(quant)
        model = quantize(self.model, lowering.scheme, scale_dtype=torch.float32)
        binder = WeightBinder(model, lowering)
        return stamp(trace, binder), binder


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Pair:
    form, config = MODELS[request.param]
    return Pair(form, random_checkpoint(**config))


@pytest.mark.parametrize("quant", ["none", "w8-rtn", "w4-rtn"])
def test_the_same_graph(pair: Pair, quant: str) -> None:
    one, _ = pair.stamped(pair.one, quant)
    whole, _ = pair.stamped(pair.whole, quant)
    assert boundary(one.graph) == boundary(whole.graph)
    assert wiring(one.graph) == wiring(whole.graph)


def test_the_same_graph_as_the_trace_itself(pair: Pair) -> None:
    """Without the stamper on the other side: weights transposed in the graph."""
    one, binder = pair.stamped(pair.one, "none")
    transposed = {key for key, stored in binder.stored.items() if stored.transposed}
    raw = {
        key: value for key, value in boundary(pair.whole.model.graph).items() if "hidden" not in key
    }
    assert boundary(one.graph) == raw
    assert wiring(one.graph, transposed=transposed) == wiring(pair.whole.model.graph)


def test_the_same_numbers(pair: Pair, tmp_path: Path) -> None:
    """A ragged batch, prefill and decode: stamped graph = whole trace = torch."""
    stamped, binder = pair.stamped(pair.one, "none")
    write_weights(binder, tmp_path / "weights")
    ir.save(stamped, tmp_path / "stamped.onnx")
    packed = pair.form == "group-query"
    decoder = load_decoder(
        pair.model,
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        form="standard" if packed else binder.lowering.attention,
    )
    with with_weights(pair.whole.model, decoder, binder) as whole:
        ir.save(whole, tmp_path / "whole.onnx")
    ids, mask = ragged("right" if packed else "left")
    expected = run_torch(decoder, ids, mask)
    for name in "stamped.onnx", "whole.onnx":
        found = run_onnx(tmp_path / name, ids, mask)
        assert found.keys() >= expected.keys()
        for key, value in expected.items():
            if packed:  # what lies at padding is no one's business, nor where the cache has it
                value, found[key] = (without_padding(key, array) for array in (value, found[key]))
            assert relative_error(found[key], value) < TOLERANCE, f"{name} {key}"


def without_padding(key: str, array: np.ndarray) -> np.ndarray:
    """The rows of `ragged` on the right that both layouts of the cache show alike."""
    if key == "logits 0":
        return np.concatenate((array[0], array[1, :-PADDING]))
    return array if key.startswith("logits") else array[0]


def test_padding_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    """The short row of a ragged batch gives what it gives alone, from the cache too."""
    stamped, binder = pair.stamped(pair.one, "none")
    write_weights(binder, tmp_path / "weights")
    ir.save(stamped, tmp_path / "stamped.onnx")
    side = "right" if pair.form == "group-query" else "left"
    ids, mask = ragged(side)
    batch = run_onnx(tmp_path / "stamped.onnx", ids, mask)
    own = ids[1:][mask[1:] == 1][None]
    alone = run_onnx(tmp_path / "stamped.onnx", own, np.ones_like(own))
    for step in range(STEPS + 1):
        logits = batch[f"logits {step}"][1:]
        if step == 0:
            logits = logits[:, PADDING:] if side == "left" else logits[:, :-PADDING]
        assert relative_error(logits, alone[f"logits {step}"]) < TOLERANCE


def test_left_padding_is_no_silent_error(pair: Pair, tmp_path: Path) -> None:
    """GroupQueryAttention would give other numbers for the padded row: it gives none."""
    if pair.form != "group-query":
        pytest.skip("the other forms take padding on the left")
    stamped, binder = pair.stamped(pair.one, "none")
    write_weights(binder, tmp_path / "weights")
    ir.save(stamped, tmp_path / "stamped.onnx")
    found = run_onnx(tmp_path / "stamped.onnx", *ragged("left"))
    for step in range(STEPS + 1):
        assert np.isfinite(found[f"logits {step}"][0]).all()
        assert np.isnan(found[f"logits {step}"][1]).all()


PADDING, STEPS = 3, 2


def ragged(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of two rows, the second `PADDING` tokens shorter; the last `STEPS` decode."""
    ids = np.random.default_rng(0).integers(0, 272, (2, 8 + STEPS), dtype=np.int64)
    mask = np.ones_like(ids)
    start = 0 if side == "left" else 8 - PADDING
    mask[1, start : start + PADDING] = 0
    return ids, mask


def steps_of(ids: np.ndarray, mask: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Ids, mask and positions of a prefill and `STEPS` single tokens."""
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    end, total = ids.shape[1] - STEPS, ids.shape[1]
    for new, seen in ((slice(0, end), end), *((slice(i, i + 1), i + 1) for i in range(end, total))):
        yield ids[:, new], mask[:, :seen], positions[:, new]


def run_torch(decoder: Decoder, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    past, found = decoder.empty_cache(len(ids)), {}
    for step, arrays in enumerate(steps_of(ids, mask)):
        with torch.inference_mode():
            output = decoder(*map(torch.from_numpy, arrays), past)
        past = output.present
        found[f"logits {step}"] = output.logits.numpy()
        for layer, pair in enumerate(past):
            found[f"present.{layer}.key"], found[f"present.{layer}.value"] = (
                tensor.numpy() for tensor in pair
            )
    return found


def run_onnx(file: Path, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    session = open_onnxruntime(file, threads=1, exact=True)
    names = [output.name for output in session.get_outputs()]
    inputs = {i.name: i for i in session.get_inputs()}
    slots = inputs["attention_mask"].shape[1] if "write_indices" in inputs else 0
    cache = {
        name: np.zeros((len(ids), i.shape[1], slots, i.shape[3]), np.float32)
        for name, i in inputs.items()
        if name.startswith("past")
    }
    found: dict[str, np.ndarray] = {}
    for step, arrays in enumerate(steps_of(ids, mask)):
        feeds = dict(zip(("input_ids", "attention_mask", "position_ids"), arrays, strict=True))
        if slots:
            seen = feeds["attention_mask"].shape[1]
            feeds["attention_mask"] = np.pad(feeds["attention_mask"], ((0, 0), (0, slots - seen)))
            feeds["write_indices"] = np.full(len(ids), seen - feeds["input_ids"].shape[1])
        outputs = dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))
        found[f"logits {step}"] = outputs.pop("logits")
        found.update(outputs)
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
    return found


@contextmanager
def with_weights(trace: ir.Model, decoder: Decoder, binder: WeightBinder) -> Iterator[ir.Model]:
    """The trace while its initialisers hold the decoder's parameters."""
    held = dict(decoder.named_parameters()) | binder.rotary
    empty = [v for v in trace.graph.initializers.values() if v.const_value is None]
    for value in empty:
        value.const_value = ir.tensor(held[value.name].detach().numpy(), name=value.name)
    yield trace
    for value in empty:
        value.const_value = None


def boundary(graph: ir.Graph) -> dict[str, tuple[Any, Any]]:
    """Inputs and outputs with dtype and shape."""
    return {v.name: (v.dtype, str(v.shape)) for v in (*graph.inputs, *graph.outputs)}


def wiring(graph: ir.Graph, *, transposed: set[str] = frozenset()) -> Counter[int]:
    """Every node and output as a number that stands for all it is computed from.

    Names of nodes and of values between them do not count; operators, attributes, constants, the
    order of inputs, and names of inputs, outputs and parameters do. A parameter that is transposed
    in the graph counts as one that is stored so, and Unsqueezes one after the other count as one:
    torch's optimiser joins them only where the first has a single reader.
    """
    unsqueezed: dict[ir.Value, tuple[int, set[int]]] = {}
    known: dict[ir.Value, int] = {v: hash(("input", v.name)) for v in graph.inputs}
    for value in graph.initializers.values():
        kind = "transposed" if value.name in transposed else "plain"
        known[value] = hash((kind, *initializer(value)))
    found: Counter[int] = Counter()
    for node in graph:
        inputs = tuple(None if v is None else known[v] for v in node.inputs)
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Transpose" and is_linear(first):
            known[node.outputs[0]] = hash(("transposed", *initializer(first)))
            continue
        if node.op_type == "Unsqueeze" and node.inputs[1].const_value is not None:
            base, axes = unsqueezed.get(first, (inputs[0], set()))
            for axis in node.inputs[1].const_value.numpy().tolist():
                assert axis >= 0
                axes = {a + (a >= axis) for a in axes} | {axis}
            unsqueezed[node.outputs[0]] = (base, axes)
            known[node.outputs[0]] = hash(("Unsqueeze", base, *sorted(axes)))
            continue
        attributes = tuple(sorted((k, attribute(a)) for k, a in node.attributes.items()))
        digest = hash((node.domain, node.op_type, node.overload, attributes, inputs))
        found[digest] += 1
        for index, value in enumerate(node.outputs):
            known[value] = hash((digest, index))
    for value in graph.outputs:
        if not value.name.startswith("hidden."):
            found[hash((value.name, known[value]))] += 1
    return found


def initializer(value: ir.Value) -> tuple[Any, ...]:
    """A parameter by its name, a constant by its content."""
    content = value.const_value
    if content is None or isinstance(content, ir.ExternalTensor):
        return (value.name, value.dtype)
    return (value.dtype, content.shape.numpy(), content.tobytes())


def is_linear(value: ir.Value | None) -> bool:
    """Whether a value is a weight that MatMul takes transposed; the tied head's is not."""
    name = value.name if value is not None and value.is_initializer() else None
    return name is not None and name.endswith(("_proj.weight", "lm_head.weight"))


def attribute(value: ir.Attr) -> Any:
    """The value of an attribute by its content."""
    if value.type == ir.AttributeType.TENSOR:
        return (value.value.dtype, value.value.shape.numpy(), value.value.tobytes())
    return str(value.value)
