"""Every attention with every scheme: exported, proven and built for two GPUs, or refused.

The tables below are written by hand. A scheme or an attention variant that is new stands in none of
them, and the first test says so.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeattn.attention import REQUESTS
from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import EdgeattnError, UsageError
from edgeattn.pipeline import export, plan_export
from edgeattn.pipeline.build import build_bundle
from edgeattn.pipeline.build_plan import BuildRequest
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import Recipe

GQA, FFT, SPARSE = "gqa:kv_heads=2", "fft-rope:window=16,tolerance=90%", "head-sparse:density=0.5"
ATTENTION: dict[str, tuple[str, ...]] = {
    "none": (),
    "gqa": (GQA,),
    "fft-rope": (FFT,),
    "head-sparse": (SPARSE,),
    "gqa+fft-rope": (GQA, FFT),
    "gqa+head-sparse": (GQA, SPARSE),
    "recurrent": ("recurrent",),
}
# Scheme -> how it is asked for, and bits of the weights its graph holds.
QUANT: dict[str, tuple[str, set[int]]] = {
    "none": ("none", set()),
    "w8-rtn": ("w8-rtn", {8}),
    "w4-rtn": ("w4-rtn", {4, 8}),
    "w4a16-gptq": ("w4a16-gptq", {4, 8}),
    "w4a16-spinquant": ("w4a16-spinquant", {4, 8}),
    "w4a16-spinquant-learned": ("w4a16-spinquant-learned:steps=2", {4, 8}),
    "w8a8": ("w8a8", {8}),
    "w8a8-spinquant": ("w8a8-spinquant", {8}),
}
# Layers of linear attention have none of the projections that these are made for.
FORBIDDEN = {
    ("recurrent", "w4a16-gptq"): "is calibrated on a text",
    ("recurrent", "w4a16-spinquant"): "rotates",
    ("recurrent", "w4a16-spinquant-learned"): "rotates",
    ("recurrent", "w8a8"): "is calibrated on a text",
    ("recurrent", "w8a8-spinquant"): "rotates",
}
# Each attention and each scheme twice; the others are slow.
COVERING = {
    ("none", "w8-rtn"),
    ("none", "w4a16-spinquant-learned"),
    ("gqa", "w4a16-gptq"),
    ("gqa", "w4a16-spinquant"),
    ("gqa", "w8a8"),
    ("fft-rope", "w4-rtn"),
    ("fft-rope", "w8a8-spinquant"),
    ("head-sparse", "w8-rtn"),
    ("head-sparse", "w4a16-spinquant-learned"),
    ("gqa+fft-rope", "none"),
    ("gqa+fft-rope", "w4a16-spinquant"),
    ("gqa+head-sparse", "w4a16-gptq"),
    ("gqa+head-sparse", "w8a8"),
    ("gqa+head-sparse", "w8a8-spinquant"),
    ("recurrent", "none"),
    ("recurrent", "w4-rtn"),
}
# TensorRT-RTX 1.7 fails an assertion of its own (MyelinCheckException) where the int8 weights of an
# MLP follow the body of the recurrence: `tests/plugins/test_recurrent_models.py` builds them.
BUILT_WITH_LIBRARY = {("recurrent", "w8-rtn")}
PAIRS = [
    pytest.param(*pair, marks=() if pair in COVERING else pytest.mark.slow)
    for pair in itertools.product(ATTENTION, QUANT)
    if pair not in FORBIDDEN
]
OPERATORS = {
    "fft-rope": "FftRopeAttention",
    "head-sparse": "HeadSparseAttention",
    "recurrent": "RecurrentLinearAttention",
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOFTMAX: dict[str, Any] = {"model_type": "llama", **SIZES}
# One layer of Gated DeltaNet and one of softmax attention. Narrower keys are now and then nearly at
# right angles to a query, and the norm behind makes much of what int4 in fp16 leaves of that.
LINEAR: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    **SIZES,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
TARGETS = ("rtx-4090", "rtx-5090")  # SM 89 and SM 120

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """A function from an attention to a checkpoint whose layers are of its kind."""
    return lambda attention: random_checkpoint(**(LINEAR if attention == "recurrent" else SOFTMAX))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It is a truth universally acknowledged, that a man must be in want. " * 40)
    return str(path)


def recipe(attention: tuple[str, ...], quant: str, text: str, **fields: Any) -> Recipe:
    asked = {"calibration": text, "calibration_windows": 2, "context": 256, **fields}
    return Recipe(TARGETS[0], quant, attention=attention, **asked)


def test_each_pair_is_allowed_or_forbidden_as_the_tables_say(
    checkpoint: Callable[[str], Path], text: str, tmp_path: Path
) -> None:
    assert set(QUANT) == set(SCHEMES)
    decoders = REQUESTS.keys() - {"lion"}  # which is for encoders
    assert {name for part in ATTENTION for name in part.split("+")} == {"none", *decoders}
    refused = {}
    for (name, attention), scheme in itertools.product(ATTENTION.items(), QUANT):
        try:
            asked = recipe(attention, QUANT[scheme][0], text)
            plan_export(checkpoint(name), asked, tmp_path / "bundle")
        except EdgeattnError as error:
            refused[name, scheme] = str(error)
    assert refused.keys() == FORBIDDEN.keys()
    assert all(FORBIDDEN[pair] in sentence for pair, sentence in refused.items())


def test_the_covering_subset_has_each_twice() -> None:
    counts = Counter(
        name for pair in enumerate(zip(*COVERING, strict=True)) for name in _axis(pair)
    )
    assert len(counts) == len(ATTENTION) + len(QUANT)
    assert min(counts.values()) >= 2


def _axis(pair: tuple[int, tuple[str, ...]]) -> list[tuple[int, str]]:
    axis, names = pair
    return [(axis, name) for name in names]


@pytest.mark.parametrize(("attention", "quant"), PAIRS)
def test_an_allowed_pair_is_proven_and_built_for_two_gpus(
    checkpoint: Callable[[str], Path],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    quant: str,
) -> None:
    """Without the library of plugins, so that TensorRT builds the bodies of the operators."""
    monkeypatch.setattr("edgeattn.verify.verify.check_tensorrt", lambda *a, **k: None)
    label, bits = QUANT[quant]
    path = tmp_path / "bundle"
    export(checkpoint(attention), recipe(ATTENTION[attention], label, text), path, plugins=False)
    bundle = Bundle.open(path)
    assert bundle.manifest.verification.status == "passed"
    assert bundle.shape.num_kv_heads == (2 if "gqa" in attention else 4)
    graph = onnx.load(bundle.model_file, load_external_data=False).graph
    own = {node.op_type for node in graph.node if node.domain == "edgeattn"} - {"HadamardTransform"}
    assert own == {op for name, op in OPERATORS.items() if name in attention.split("+")}
    stored = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}
    assert {stored[t.data_type] for t in graph.initializer if t.data_type in stored} == bits
    if TENSORRT_RTX.is_available() and (attention, quant) not in BUILT_WITH_LIBRARY:
        record = build_bundle(path, BuildRequest(targets=TARGETS)).engine.record
        assert record.sms == (89, 120)
        assert ("INT4" in {layer.precision for layer in record.layer_list}) == (4 in bits)
    shutil.rmtree(path)


INT8_CACHE = "a floating-point cache for an attention variant"
REFUSALS = [
    *((ATTENTION[name], QUANT[quant][0], {}, words) for (name, quant), words in FORBIDDEN.items()),
    ((FFT, SPARSE), "none", {}, "others do not compose yet"),
    (("recurrent", FFT), "none", {}, "others do not compose yet"),
    *((ATTENTION[name], "w8a8:kv=int8", {}, INT8_CACHE) for name in ATTENTION if "-" in name),
    (("recurrent",), "w8-rtn:kv=int8", {}, "measured on a calibration text"),
    ((FFT,), "none", {"kv_cache": "static"}, "a growing cache for an attention variant"),
    ((SPARSE,), "none", {"kv_cache": "static"}, "a growing cache for an attention variant"),
]


@pytest.mark.parametrize("attention", [("recurrent", GQA), (GQA, "recurrent")])
def test_there_is_no_recipe_that_regroups_linear_attention(attention: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"recurrent alone.*no heads to regroup.*gqa:kv_heads=2"):
        Recipe(TARGETS[0], attention=attention)


@pytest.mark.parametrize(("attention", "quant", "fields", "words"), REFUSALS)
def test_a_forbidden_pair_is_refused_with_its_reason(
    checkpoint: Callable[[str], Path],
    text: str,
    tmp_path: Path,
    attention: tuple[str, ...],
    quant: str,
    fields: dict[str, Any],
    words: str,
) -> None:
    model = checkpoint("recurrent" if "recurrent" in attention else "none")
    with pytest.raises(EdgeattnError, match=words):
        export(model, recipe(attention, quant, text, **fields), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("layers", "attention", "words"),
    [
        ("recurrent", (GQA,), "linear attention, which has no keys"),
        ("recurrent", (FFT,), "linear attention, which has no keys"),
        ("recurrent", (GQA, SPARSE), "linear attention, which has no keys"),
        ("none", ("recurrent",), "has softmax attention in every layer"),
    ],
)
def test_attention_that_is_not_the_models_is_refused(
    checkpoint: Callable[[str], Path],
    text: str,
    tmp_path: Path,
    layers: str,
    attention: tuple[str, ...],
    words: str,
) -> None:
    with pytest.raises(EdgeattnError, match=words):
        export(checkpoint(layers), recipe(attention, "none", text), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
