"""Every target's bundle is proven; every planted error is found and its place named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from edgeattn.bundle.bundle import GOLDEN, Bundle
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import BundleError, ProofError
from edgeattn.pipeline import export, verify_bundle
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe
from edgeattn.verify import compare
from edgeattn.verify.compare import Agreement
from edgeattn.verify.golden import Golden
from edgeattn.verify.verify import Verification, check_onnxruntime

PROVEN = [
    ("cpu", "none", {}),
    ("cpu", "w8-rtn", {}),
    ("cpu", "w4-rtn:group=32", {}),
    ("cpu", "none", {"logits": "last"}),
    ("jetson-orin@jetpack6.2", "none", {}),
    ("jetson-orin@jetpack6.2", "w8-rtn", {}),
    ("jetson-orin@jetpack6.2", "w4-rtn", {}),
    ("jetson-orin@jetpack6.2", "none", {"dtype": "fp32"}),
    ("jetson-orin@jetpack7.2", "none", {}),
    ("jetson-orin@jetpack7.2", "none", {"dtype": "bf16"}),
    ("jetson-orin@jetpack7.2", "w8-rtn", {}),
    ("jetson-orin@jetpack7.2", "w4-rtn", {}),
    ("l4", "none", {}),
    ("l4", "w4-rtn", {"logits": "last"}),
    ("t4", "none", {}),
    ("t4", "w8-rtn", {}),
]


@pytest.mark.parametrize(("target", "quant", "fields"), PROVEN)
def test_every_target_is_proven(
    export_tiny: Callable[..., Path], target: str, quant: str, fields: dict[str, Any]
) -> None:
    bundle = export_tiny(target, quant, **fields)
    verification = verify_bundle(bundle, tensorrt=False)
    assert verification.passed
    (agreement,) = verification.agreements
    assert agreement.first_bad is None
    cases = {c.tensor.partition(".")[0] for c in agreement.comparisons}
    assert cases == {"sequence", "ragged", "continued"}
    names = {c.tensor for c in agreement.comparisons}
    for layer in range(3):
        assert f"ragged.present.{layer}.key" in names
        assert f"sequence.present.{layer}.value" in names
    assert {f"sequence.{step}.logits" for step in range(17)} <= names
    assert agreement.kl < 1e-3


@pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="TensorRT-RTX is not installed (edgeattn[rtx])"
)
@pytest.mark.parametrize(
    ("target", "quant"),
    [
        ("jetson-orin@jetpack6.2", "none"),
        ("jetson-orin@jetpack6.2", "w4-rtn"),
        ("jetson-orin@jetpack7.2", "none"),
        ("jetson-orin@jetpack7.2", "w4-rtn"),
        ("t4", "w8-rtn"),
    ],
)
def test_tensorrt_builds_it(export_tiny: Callable[..., Path], target: str, quant: str) -> None:
    verification = verify_bundle(export_tiny(target, quant))
    assert verification.tensorrt is not None
    assert verification.tensorrt.status == "built", verification.tensorrt.reason
    assert verification.passed
    assert (verification.tensorrt.engine_bytes or 0) > 0


@pytest.fixture
def with_graph(changed: Callable[..., Path]) -> Callable[..., Path]:
    """A function that copies a bundle with an edited graph or weight, its hashes kept true."""

    def make(
        bundle: Path,
        edit: Callable[[onnx.ModelProto], None] | None = None,
        weight: str | None = None,
    ) -> Path:
        proto = onnx.load(bundle / "model.onnx", load_external_data=False)
        files = {}
        if weight:
            data = bytearray((bundle / "model.onnx.data").read_bytes())
            negate(proto, weight, data)
            files["model.onnx.data"] = bytes(data)
        if edit:
            edit(proto)
            files["model.onnx"] = proto.SerializeToString()
        return changed(bundle, files)

    return make


def negate(proto: onnx.ModelProto, name: str, data: bytearray) -> None:
    """Flips the sign of a weight in the external data."""
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    entries = {e.key: e.value for e in tensor.external_data}
    begin, length = int(entries["offset"]), int(entries["length"])
    stored = bytes(data[begin : begin + length])
    if tensor.data_type == onnx.TensorProto.INT4:
        raw = np.frombuffer(stored, np.uint8)
        low, high = (-(raw & 15)) & 15, (-(raw >> 4)) & 15
        new = (low | (high << 4)).astype(np.uint8)
    else:
        dtype = {
            onnx.TensorProto.FLOAT: np.float32,
            onnx.TensorProto.FLOAT16: np.float16,
            onnx.TensorProto.INT8: np.int8,
        }[tensor.data_type]
        new = -np.frombuffer(stored, dtype)
    data[begin : begin + length] = new.tobytes()


def refusal(bundle: Path) -> tuple[Verification, str]:
    verification = verify_bundle(bundle, tensorrt=False)
    assert not verification.passed
    with pytest.raises(ProofError) as refused:
        verification.raise_if_failed()
    return verification, str(refused.value)


@pytest.mark.parametrize(
    ("target", "quant"),
    [
        ("cpu", "none"),
        ("cpu", "w8-rtn"),
        ("jetson-orin@jetpack6.2", "none"),
        ("jetson-orin@jetpack7.2", "none"),
        ("jetson-orin@jetpack7.2", "w4-rtn"),
    ],
)
@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("layers.1.self_attn.o_proj.weight", "layer 1"),
        ("layers.1.mlp.down_proj.weight", "layer 1"),
        ("layers.1.self_attn.k_proj.weight", "layer 1"),
        ("layers.1.self_attn.v_proj.weight", "layer 1"),
        ("layers.0.self_attn.q_proj.weight", "layer 0"),
        ("layers.2.mlp.up_proj.weight", "layer 2"),
    ],
)
def test_a_sign_error_names_its_layer(
    export_tiny: Callable[..., Path],
    with_graph: Callable[..., Path],
    target: str,
    quant: str,
    weight: str,
    place: str,
) -> None:
    if target == "cpu":  # there the projections of one input are one matrix
        weight = re.sub(r"[qkv]_proj", "qkv_proj", weight).replace("up_proj", "gate_up_proj")
    verification, sentence = refusal(with_graph(export_tiny(target, quant), weight=weight))
    assert verification.agreements[0].first_bad == place
    assert f"the first error is in {place}" in sentence


@pytest.mark.parametrize(
    ("weight", "place"),
    [
        ("embed_tokens.weight", "embedding"),
        ("norm.weight", "final norm or LM head"),
        ("lm_head.weight", "final norm or LM head"),
    ],
)
def test_a_sign_error_outside_the_layers(
    random_checkpoint: Callable[..., Path],
    export_tiny: Callable[..., Path],
    with_graph: Callable[..., Path],
    weight: str,
    place: str,
) -> None:
    model = random_checkpoint(tie_word_embeddings=False)
    bundle = export_tiny("cpu", model=model)
    verification, sentence = refusal(with_graph(bundle, weight=weight))
    assert verification.agreements[0].first_bad == place
    assert place in sentence


def rename_input(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def shift_positions(proto: onnx.ModelProto) -> None:
    """Every position one too high: relative distances and logits stay, cached keys do not."""
    rename_input(proto, "position_ids", "shifted")
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    proto.graph.node.insert(0, helper.make_node("Add", ["position_ids", "one"], ["shifted"]))


def ignore_mask(proto: onnx.ModelProto) -> None:
    """Every key counts as valid."""
    rename_input(proto, "attention_mask", "ones")
    proto.graph.node.insert(0, helper.make_node("Shape", ["attention_mask"], ["mask_shape"]))
    one = numpy_helper.from_array(np.array([1], np.int64))
    node = helper.make_node("ConstantOfShape", ["mask_shape"], ["ones"], value=one)
    proto.graph.node.insert(1, node)


def negate_past(proto: onnx.ModelProto) -> None:
    """Layer 1 reads its past values with the wrong sign."""
    rename_input(proto, "past_key_values.1.value", "wrong_past")
    negated = helper.make_node("Neg", ["past_key_values.1.value"], ["wrong_past"])
    proto.graph.node.insert(0, negated)


def turn_back(proto: onnx.ModelProto) -> None:
    """Every position rotates the other way."""
    rename_input(proto, "sin_cache_0", "wrong_sin")
    proto.graph.node.insert(0, helper.make_node("Neg", ["sin_cache_0"], ["wrong_sin"]))


# Runs of one token behind a prompt, and what they leave in the cache.
STEPS = (
    "continued.2",
    "continued.present",
    "sequence.present",
    *(f"sequence.{step}" for step in range(1, 17)),
)


@pytest.mark.parametrize(
    ("target", "edit", "place", "only"),
    [
        ("cpu", turn_back, "layer 0", ""),
        ("jetson-orin@jetpack6.2", shift_positions, "layer 0", ""),
        # its mask also tells how far the buffer is filled, in each step behind the prompt
        ("cpu", ignore_mask, "layer", ("ragged", *STEPS)),
        ("jetson-orin@jetpack6.2", ignore_mask, "layer", "ragged"),
        ("cpu", negate_past, "layer 1", ""),
        ("jetson-orin@jetpack6.2", negate_past, "layer 1", ""),
    ],
)
def test_a_wrong_graph(
    export_tiny: Callable[..., Path],
    with_graph: Callable[..., Path],
    target: str,
    edit: Callable[[onnx.ModelProto], None],
    place: str,
    only: str | tuple[str, ...],
) -> None:
    verification, sentence = refusal(with_graph(export_tiny(target), edit))
    agreement = verification.agreements[0]
    assert (agreement.first_bad or "").startswith(place)
    assert f"the first error is in {place}" in sentence
    assert all(c.tensor.startswith(only) for c in agreement.comparisons if not c.passed)


def test_nan_fails(export_tiny: Callable[..., Path], with_graph: Callable[..., Path]) -> None:
    def poison(proto: onnx.ModelProto) -> None:
        rename = "poisoned"
        rename_input(proto, "hidden.2", rename)
        nan = numpy_helper.from_array(np.array(np.nan, np.float32), "nan")
        proto.graph.initializer.append(nan)
        index = next(i for i, n in enumerate(proto.graph.node) if "hidden.2" in n.output)
        node = helper.make_node("Add", ["hidden.2", "nan"], [rename])
        proto.graph.node.insert(index + 1, node)

    verification, sentence = refusal(with_graph(export_tiny("cpu"), poison))
    assert "differs by inf" in sentence
    assert "layer 2" in sentence
    assert '"inf"' in json.dumps(verification.to_dict(), allow_nan=False)


@pytest.mark.parametrize("weight", ["self_attn.o_proj", "mlp.down_proj"])
def test_an_exporter_that_errs_writes_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    shared_traces: None,
    monkeypatch: pytest.MonkeyPatch,
    weight: str,
) -> None:
    """The exporter alone sees a weight of layer 1 with the wrong sign."""
    from edgeattn.exporters import weights

    encode = weights._encode

    def wrong(binder, parameter, parts):
        for stored, data in encode(binder, parameter, parts):
            if parameter == f"layers.1.{weight}.weight":
                data = (-data.view(np.float32)).view(np.uint8)
            yield stored, data

    monkeypatch.setattr(weights, "_encode", wrong)
    with pytest.raises(ProofError, match="the first error is in layer 1:"):
        export(tiny_checkpoint, Recipe("cpu"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_are_no_proof(
    tiny_checkpoint: Path, tmp_path: Path, shared_traces: None
) -> None:
    """Plain torch gives infinity, and twice infinity would allow anything."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 30000
    tensors["model.layers.1.mlp.up_proj.weight"] *= 300
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ProofError, match=r"overflows in fp16 at .*: export in a wider --dtype"):
        export(model, Recipe("jetson-orin@jetpack6.2"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_without_golden_vectors(export_tiny: Callable[..., Path], tiny_checkpoint: Path) -> None:
    bundle = export_tiny("cpu", verify=False)
    with pytest.raises(BundleError, match="--no-verify and has none: pass --checkpoint"):
        verify_bundle(bundle, tensorrt=False)
    assert verify_bundle(bundle, checkpoint=tiny_checkpoint, tensorrt=False).passed


def test_another_checkpoint(
    export_tiny: Callable[..., Path], random_checkpoint: Callable[..., Path]
) -> None:
    other = random_checkpoint(vocab_size=300)
    with pytest.raises(BundleError, match="is another one"):
        verify_bundle(export_tiny("cpu"), checkpoint=other, tensorrt=False)


@pytest.fixture
def judged_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> Callable[[Path], tuple[Agreement, Golden]]:
    """What a bundle's layers say where the whole network is beyond a bound that nothing meets."""
    from edgeattn.models.checkpoint import open_checkpoint
    from edgeattn.models.model import model_of
    from edgeattn.transforms.fuse import fuse_projections
    from edgeattn.verify.amplified import excuse_amplified, may_amplify

    def judge(path: Path) -> tuple[Agreement, Golden]:
        bundle = Bundle.open(path)
        model = fuse_projections(model_of(open_checkpoint(tiny_checkpoint)))
        lowering = Lowering.from_dict(bundle.manifest.lowering)
        assert may_amplify(model, lowering)
        golden = Golden.load(path / GOLDEN)
        nothing = dict.fromkeys(golden.low_precision_error, 0.0)
        strict = replace(golden, low_precision_error=nothing)
        with monkeypatch.context() as patch:
            patch.setattr(compare, "allowed_error", lambda _, low, *, quantized: 2 * low + 1e-12)
            file, layers = bundle.model_file, model.shape.num_layers
            agreement = check_onnxruntime(file, strict, lowering, num_layers=layers)
            assert not agreement.passed
            return excuse_amplified(agreement, model, lowering, file, strict)

    return judge


def test_amplified_roundings_are_not_held_against_a_graph(
    export_tiny: Callable[..., Path],
    judged_alone: Callable[[Path], tuple[Agreement, Golden]],
) -> None:
    agreement, golden = judged_alone(export_tiny("cpu"))
    assert agreement.passed
    assert agreement.amplified > 0
    assert {"layers alone, outputs", "LM head alone, logits"} <= agreement.worst_per_group().keys()
    raised = [error for error in golden.low_precision_error.values() if error > 0]
    assert len(raised) == agreement.amplified
    assert max(raised) < 1e-5, "what the next run may differ by is what was found"


@pytest.mark.parametrize(
    ("edit", "weight"),
    [
        (turn_back, None),
        (ignore_mask, None),
        (negate_past, None),
        (None, "layers.1.self_attn.o_proj.weight"),
        (None, "embed_tokens.weight"),
        (None, "norm.weight"),
    ],
)
def test_a_wrong_graph_is_never_excused(
    export_tiny: Callable[..., Path],
    with_graph: Callable[..., Path],
    judged_alone: Callable[[Path], tuple[Agreement, Golden]],
    edit: Callable[[onnx.ModelProto], None] | None,
    weight: str | None,
) -> None:
    agreement, golden = judged_alone(with_graph(export_tiny("cpu"), edit, weight))
    assert not agreement.passed
    assert agreement.amplified == 0
    assert not any(golden.low_precision_error.values())
