"""Every family through the whole chain: transformers saves it, we export and prove it, it runs.

The bundle's logits are compared with those of transformers, which wrote the checkpoint and knows
nothing of us, on a text that is several windows long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.models.families import FAMILIES
from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session
from edgeattn.verify.tolerance import relative_error

needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)

# Heads of 16 and more, so that TensorRT gets its own Attention where it has one.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    # transformers puts those of its defaults beyond this vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7
GEMMA = {**SIZES, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": WINDOW}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# One divisor per frequency of 16 rotated elements; the original context exceeds the text.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0],
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}
JETPACK6, JETPACK7, L4 = "jetson-orin@jetpack6.2", "jetson-orin@jetpack7.2", "l4@trt11"


@dataclass(frozen=True)
class Model:
    """A tiny model of a family.

    Attributes:
        config: as transformers has it.
        tensorrt: the target it is exported for beside the CPU.
        windows: some layer sees the last keys only.
        packed: its keys are packed, as linear attention needs it.
    """

    config: transformers.PretrainedConfig
    tensorrt: str
    windows: bool = False
    packed: bool = False


MODELS: dict[str, Model] = {
    "llama-rope-linear": Model(
        transformers.LlamaConfig(**SIZES, rope_parameters=LINEAR, tie_word_embeddings=True),
        JETPACK6,
    ),
    "llama-rope-llama3": Model(transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3), L4),
    "mistral": Model(transformers.MistralConfig(**SIZES, sliding_window=None), JETPACK7),
    "mistral-window": Model(
        transformers.MistralConfig(**SIZES, sliding_window=WINDOW), JETPACK6, windows=True
    ),
    "qwen2": Model(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), L4),
    "qwen3": Model(transformers.Qwen3Config(**SIZES, head_dim=32), JETPACK6),
    "smollm3": Model(transformers.SmolLM3Config(**{**SIZES, "num_hidden_layers": 5}), JETPACK7),
    "phi3-window": Model(
        transformers.Phi3Config(**SIZES, sliding_window=WINDOW), JETPACK6, windows=True
    ),
    "phi4-mini-longrope": Model(
        transformers.Phi3Config(
            **{**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1},
            rope_parameters=LONGROPE,
            original_max_position_embeddings=128,
            tie_word_embeddings=True,
        ),
        L4,
    ),
    "gemma2-softcaps": Model(
        transformers.Gemma2Config(
            **GEMMA,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        ),
        JETPACK7,
        windows=True,
    ),
    "gemma3": Model(
        transformers.Gemma3TextConfig(
            **GEMMA,
            query_pre_attn_scalar=24,
            layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        ),
        L4,
        windows=True,
    ),
    "qwen3.5": Model(
        transformers.Qwen3_5TextConfig(
            **{**SIZES, "num_hidden_layers": 5},
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        JETPACK7,
        packed=True,
    ),
}
# opset, attention, kv_cache, dtype
GRAPHS: dict[str, tuple[int, str, str, str]] = {
    "cpu": (23, "group-query", "shared-buffer", "fp32"),
    "cpu with windows": (23, "standard", "concat", "fp32"),
    JETPACK6: (20, "primitive", "concat", "fp16"),
    JETPACK7: (23, "standard", "concat", "fp16"),
    L4: (23, "standard", "concat", "fp16"),
}
BOTH = [(name, target) for name, model in MODELS.items() for target in ("cpu", model.tensorrt)]

# Layers of two kinds, and tensors in which several parameters lie.
QUANTIZED = [
    (name, target, quant)
    for name, target in BOTH
    if name in ("smollm3", "gemma3", "phi3-window")
    for quant in ("w8-rtn", "w4-rtn")
]

# A prompt longer than the windows, single tokens, and a continuation of several.
STEPS = (30, 1, 1, 1, 1, 6)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A function from a name to a random model of transformers and where it saved itself."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            config = MODELS[name].config
            config._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            for parameter in model.parameters():
                # Of a size that makes each part of the model count, gains and biases included.
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            path = tmp_path_factory.mktemp("theirs") / name
            model.save_pretrained(path)
            made[name] = (model, path)
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(
    theirs: Callable[[str], tuple[Any, Path]],
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Callable[..., Bundle]:
    """A function from a model's name, a target and a scheme to its bundle, proven."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(name: str, target: str, quant: str = "none") -> Bundle:
        key = (name, target, quant)
        if key not in made:
            path = tmp_path_factory.mktemp("exported") / "bundle"
            export(theirs(name)[1], Recipe(target, quant), path, plugins=False)
            made[key] = path
        return Bundle.open(made[key])

    return make


def test_every_family_is_here() -> None:
    # transformers does not have GLA: tests/test_recurrent_export.py
    assert {model.config.model_type for model in MODELS.values()} == FAMILIES.keys() - {"gla"}


def test_both_spellings_of_attention_meet_tensorrt() -> None:
    assert {GRAPHS[model.tensorrt][1] for model in MODELS.values()} == {"primitive", "standard"}


@pytest.mark.parametrize(("name", "target"), BOTH)
def test_it_is_exported_and_proven(name: str, target: str, exported: Callable[..., Bundle]) -> None:
    manifest = exported(name, target).manifest
    assert manifest.verification.status == "passed"
    assert "onnxruntime" in "".join(manifest.verification.backends)
    found = (manifest.lowering[key] for key in ("opset", "attention", "kv_cache", "dtype"))
    own = MODELS[name]
    joins = target == "cpu" and (own.windows or own.packed)
    opset, attention, cache, dtype = GRAPHS["cpu with windows" if joins else target]
    assert tuple(found) == (opset, attention, "packed" if own.packed else cache, dtype)


@needs_rtx
@pytest.mark.parametrize(("name", "target"), [pair for pair in BOTH if pair[1] != "cpu"])
def test_tensorrt_builds_it(name: str, target: str, exported: Callable[..., Bundle]) -> None:
    assert exported(name, target).manifest.verification.tensorrt == "built"


@pytest.mark.parametrize(("name", "target"), BOTH)
def test_it_gives_the_logits_of_transformers(
    name: str,
    target: str,
    exported: Callable[..., Bundle],
    theirs: Callable[[str], tuple[Any, Path]],
) -> None:
    expected, ids = their_logits(theirs(name)[0])
    found = our_logits(exported(name, target), ids)
    if target == "cpu":
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    else:
        assert relative_error(found, expected) < 0.01  # weights and sums are rounded to fp16


@pytest.mark.parametrize(("name", "target", "quant"), QUANTIZED)
def test_quantised(
    name: str,
    target: str,
    quant: str,
    exported: Callable[..., Bundle],
    theirs: Callable[[str], tuple[Any, Path]],
) -> None:
    """Proven, built, and still this model: of another one the error would exceed 1."""
    bundle = exported(name, target, quant)
    assert bundle.manifest.verification.status == "passed"
    if target != "cpu" and TENSORRT_RTX.is_available():
        assert bundle.manifest.verification.tensorrt == "built"
    expected, ids = their_logits(theirs(name)[0])
    error = relative_error(our_logits(bundle, ids), expected)
    assert error < {"w8-rtn": 0.05, "w4-rtn": 0.5}[quant]


def their_logits(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """`[1, T, V]` of one pass without a cache, and the ids `[1, T]`."""
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (1, sum(STEPS)))
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    assert logits.std() > 0.2, "logits near zero would agree with anything"
    return logits, ids


def our_logits(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """`[1, T, V]` in the steps of `STEPS`."""
    session, state, found = Session.open(bundle, exact=True, threads=1), None, []
    for new in np.split(ids, np.cumsum(STEPS)[:-1], axis=1):
        step = session.run(new, state)
        state = step.state
        found.append(step.logits)
    return np.concatenate(found, axis=1)
