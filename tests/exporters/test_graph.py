"""The written graph: names and dimensions, the weights file, int4, the shared table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeattn.bundle.bundle import Bundle
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import weight_bytes
from edgeattn.transforms.fuse import FUSED

LAYERS = 3
BUNDLES = {
    "cpu-fp32": ("cpu", "none"),
    "cpu-w8": ("cpu", "w8-rtn"),
    "cpu-w4-group32": ("cpu", "w4-rtn:group=32"),
    "primitive-fp16": ("jetson-orin@jetpack6.2", "none"),
    "primitive-w4": ("jetson-orin@jetpack6.2", "w4-rtn"),
    "standard-w4": ("jetson-orin@jetpack7.2", "w4-rtn"),
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, export_tiny: Callable[..., Path]) -> Path:
    return export_tiny(*BUNDLES[request.param])


def graph_of(bundle: Path) -> onnx.GraphProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False).graph


def place(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Offset and length in the weights file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["location"] == "model.onnx.data"
    return int(entries["offset"]), int(entries["length"])


def dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_names_and_dimensions(bundle: Path) -> None:
    graph = graph_of(bundle)
    tokens = ["batch_size", "sequence_length"]
    inputs = {
        "input_ids": tokens,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": tokens,
    }
    outputs = {"logits": [*tokens, 272]}
    for layer in range(LAYERS):
        for part in "key", "value":
            past = ["batch_size", 2, "past_sequence_length", 16]
            inputs[f"past_key_values.{layer}.{part}"] = past
            outputs[f"present.{layer}.{part}"] = ["batch_size", 2, "total_sequence_length", 16]
    assert {v.name: dimensions(v) for v in graph.input} == inputs
    assert {v.name: dimensions(v) for v in graph.output} == outputs
    assert graph.output[0].name == "logits"


def test_genai_config_names_the_graphs_inputs_and_outputs(bundle: Path) -> None:
    graph = graph_of(bundle)
    decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == "model.onnx"
    for side, values in ("inputs", graph.input), ("outputs", graph.output):
        named = set()
        for pattern in decoder[side].values():
            layers = range(decoder["num_hidden_layers"]) if "%d" in pattern else [None]
            named |= {pattern if i is None else pattern % i for i in layers}
        assert named == {v.name for v in values}


def test_last_logits_only(export_tiny: Callable[..., Path]) -> None:
    graph = graph_of(export_tiny("cpu", logits="last"))
    assert dimensions(graph.output[0]) == ["batch_size", 1, 272]


def test_the_checker_takes_it(bundle: Path) -> None:
    onnx.checker.check_model(str(bundle / "model.onnx"), full_check=True)


def test_nothing_of_this_machine_is_in_the_graph(bundle: Path) -> None:
    content = (bundle / "model.onnx").read_bytes()
    assert str(Path.home()).encode() not in content or Path.home() == Path("/")
    assert b"site-packages" not in content
    assert b".py" not in content


def test_weights_are_page_aligned_and_hashed(bundle: Path) -> None:
    content = (bundle / "model.onnx.data").read_bytes()
    places = {place(t) for t in graph_of(bundle).initializer if t.external_data}
    ends = 0
    for offset, length in sorted(places):
        assert offset % 4096 == 0
        assert ends <= offset < ends + 4096
        assert not any(content[ends:offset])
        ends = offset + length
    assert ends == len(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    record = manifest["files"]["model.onnx.data"]
    assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_planner_knows_the_size(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    lowering = Lowering.from_dict(opened.manifest.lowering)
    places = {place(t) for t in graph_of(bundle).initializer if t.external_data}
    stored = sum(length for _, length in places)
    assert stored == weight_bytes(opened.shape, lowering)


def test_int4_is_stored_as_int4(export_tiny: Callable[..., Path]) -> None:
    graph = graph_of(export_tiny("jetson-orin@jetpack7.2", "w4-rtn"))
    types = {t.name: t.data_type for t in graph.initializer}
    linears = [name for name in types if name.endswith("_proj.weight")]
    assert len(linears) == 7 * LAYERS
    assert {types[name] for name in linears} == {onnx.TensorProto.INT4}
    nodes = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    blocks = [next((a.i for a in n.attribute if a.name == "block_size"), 0) for n in nodes]
    assert blocks.count(64) == 7 * LAYERS


@pytest.mark.parametrize("target", ["cpu", "jetson-orin@jetpack6.2", "jetson-orin@jetpack7.2"])
def test_tied_head_shares_the_bytes_of_the_table(
    target: str, export_tiny: Callable[..., Path]
) -> None:
    graph = graph_of(export_tiny(target, "w8-rtn"))
    tensors = {t.name: t for t in graph.initializer}
    for suffix in "", "_scale", "_zero_point":
        table, head = tensors[f"embed_tokens.weight{suffix}"], tensors[f"lm_head.weight{suffix}"]
        assert place(table) == place(head)
        assert table.data_type == head.data_type
    assert tensors["embed_tokens.weight"].data_type == onnx.TensorProto.INT8


def test_untied_tables_are_stored_apart(
    random_checkpoint: Callable[..., Path], export_tiny: Callable[..., Path]
) -> None:
    model = random_checkpoint(tie_word_embeddings=False)
    tensors = {t.name: t for t in graph_of(export_tiny("cpu", "w8-rtn", model=model)).initializer}
    assert place(tensors["embed_tokens.weight"]) != place(tensors["lm_head.weight"])


@pytest.mark.parametrize(("target", "stacked"), [("cpu", True), ("jetson-orin@jetpack6.2", False)])
def test_weights_are_the_checkpoints(
    tiny_checkpoint: Path, export_tiny: Callable[..., Path], target: str, stacked: bool
) -> None:
    """Read back from the file, transposed where MatMul wants it, stacked where the graph is."""
    from safetensors.numpy import load_file

    held = load_file(tiny_checkpoint / "model.safetensors")
    bundle = export_tiny(target, dtype="fp32")
    for layer in range(3 if stacked else 0):
        for whole, parts in FUSED.items():
            names = [f"model.layers.{layer}.{part}.weight" for part in parts]
            whole_name = f"model.layers.{layer}.{whole}.weight"
            held[whole_name] = np.concatenate([held.pop(name) for name in names])
    content = (bundle / "model.onnx.data").read_bytes()
    seen = set()
    for tensor in graph_of(bundle).initializer:
        source: Any = held.get(f"model.{tensor.name}")
        if source is None:
            continue
        offset, length = place(tensor)
        array = np.frombuffer(content[offset : offset + length], np.float32)
        stored = array.reshape(tuple(tensor.dims))
        wanted = source.T if tensor.name.endswith("_proj.weight") else source
        np.testing.assert_array_equal(stored, wanted)
        seen.add(tensor.name)
    assert len(seen) == len(held)
