"""The decoder against transformers: tiny random models of every family, fp32, to 1e-4."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import load_decoder, model_of
from edgeattn.shape import ModelShape

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# One divisor per frequency of a head of 8; the original context is longer than what is tested.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 128,
}
# transformers puts the padding token of its defaults beyond this vocabulary.
PAD = {**TINY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**PAD, "num_hidden_layers": 4, "head_dim": 12, "sliding_window": 7}
FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**TINY),
    "llama-tied": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-rope-llama3": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3),
    "llama-mha": transformers.LlamaConfig(**{**TINY, "num_key_value_heads": 6}),
    "llama-head-dim": transformers.LlamaConfig(**TINY, head_dim=12),
    "qwen2": transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=20),
    "llama-rope-linear": transformers.LlamaConfig(
        **TINY, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**TINY, sliding_window=7),
    "smollm3": transformers.SmolLM3Config(**{**PAD, "num_hidden_layers": 5}),
    "smollm3-named-layers": transformers.SmolLM3Config(**PAD, no_rope_layers=[0, 1, 1]),
    "phi3": transformers.Phi3Config(**PAD, sliding_window=7),
    "phi4-mini": transformers.Phi3Config(
        **{**PAD, "hidden_size": 64, "num_attention_heads": 4},
        rope_parameters={**LONGROPE, "partial_rotary_factor": 0.5},
        original_max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
    "gemma2": transformers.Gemma2Config(
        **GEMMA,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=0.1,
        final_logit_softcapping=0.5,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **GEMMA,
        query_pre_attn_scalar=16,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
    ),
}
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Decoder, Path]:
    """A random transformers model and our decoder loaded from what it saved."""
    torch.manual_seed(0)
    config = FAMILIES[request.param]
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in theirs.parameters():
        # Norm gains and biases start at 1 and 0, which would hide a missing one.
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return theirs, _load(path), path


def _load(path: Path) -> Decoder:
    model = model_of(open_checkpoint(path))
    return load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)


@torch.inference_mode()
def test_prefill_equals_transformers(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    ids = torch.randint(0, 97, (1, 90))
    output = ours(ids, torch.ones_like(ids), torch.arange(90).unsqueeze(0), ours.empty_cache(1))
    torch.testing.assert_close(output.logits, theirs(ids).logits, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_cached_decode_equals_transformers(pair: tuple[Any, Decoder, Path]) -> None:
    theirs, ours, _ = pair
    ids = torch.randint(0, 97, (1, 12))
    whole = theirs(ids).logits
    past = ours.empty_cache(1)
    for start, end in [(0, 7), (7, 8), (8, 9), (9, 12)]:
        new = ids[:, start:end]
        mask = torch.ones(1, end, dtype=torch.int64)
        output = ours(new, mask, torch.arange(start, end).unsqueeze(0), past)
        past = output.present
        torch.testing.assert_close(output.logits, whole[:, start:end], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_ragged_batch_equals_single_rows(pair: tuple[Any, Decoder, Path], side: str) -> None:
    theirs, ours, _ = pair
    rows = [torch.randint(0, 97, (length,)) for length in (9, 5)]
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = ours(ids, mask, positions, ours.empty_cache(2)).logits
    for i, row in enumerate(rows):
        expected = theirs(row.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], expected, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_primitive_form_equals_standard_form(pair: tuple[Any, Decoder, Path]) -> None:
    _, ours, path = pair
    model = model_of(open_checkpoint(path))
    primitive = load_decoder(
        model, weight_dtype=torch.float32, compute_dtype=torch.float32, form="primitive"
    )
    ids = torch.randint(0, 97, (2, 11))
    arguments = (ids, torch.ones_like(ids), torch.arange(11).expand(2, 11), ours.empty_cache(2))
    torch.testing.assert_close(primitive(*arguments).logits, ours(*arguments).logits)


@pytest.mark.parametrize(
    "change",
    [
        "rope_theta",
        "norm_eps",
        "qk_norm",
        "qkv_bias",
        "window",
        "no_rope",
        "activation",
        "output_norms",
        "embedding_scale",
        "attention_softcap",
        "logits_softcap",
    ],
)
@torch.inference_mode()
def test_a_wrong_architecture_differs(pair: tuple[Any, Decoder, Path], change: str) -> None:
    """The comparison above is only worth something if these mistakes exceed its tolerance."""
    theirs, ours, path = pair
    shape = ours.shape
    wrong = replace(shape, **_mistake(shape, change))
    if wrong == shape:
        pytest.skip(f"{shape.family} has no {change}")
    model = replace(model_of(open_checkpoint(path)), shape=wrong)
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    ids = torch.randint(0, 97, (1, 40))
    output = decoder(ids, torch.ones_like(ids), torch.arange(40).unsqueeze(0), ours.empty_cache(1))
    assert (output.logits - theirs(ids).logits).abs().max() > 10 * TOLERANCE


def _mistake(shape: ModelShape, change: str) -> dict[str, Any]:
    """Fields of a shape that is wrong in one respect."""
    neutral = {"qk_norm": False, "qkv_bias": False, "output_norms": False}
    neutral |= {"embedding_scale": 1.0, "attention_softcap": None, "logits_softcap": None}
    if change in neutral:
        return {change: neutral[change]}
    if change == "norm_eps":
        return {"norm_eps": 0.1}
    if change == "activation":
        return {"activation": "silu" if shape.activation == "gelu-tanh" else "gelu-tanh"}
    cycle = []
    for kind in shape.layer_cycle:
        rope = kind.rope
        if change == "window":
            kind = replace(kind, window=kind.window and kind.window + 1)
        elif change == "no_rope":
            kind = replace(kind, rope=rope or shape.ropes[0])
        elif rope is not None:
            kind = replace(kind, rope=replace(rope, theta=rope.theta * 2))
        cycle.append(kind)
    return {"layer_cycle": tuple(cycle)}


def test_sharded_checkpoint_equals_single_file(
    pair: tuple[Any, Decoder, Path], tmp_path: Path
) -> None:
    theirs, ours, _ = pair
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, parameter in _load(tmp_path).named_parameters():
        assert torch.equal(parameter, dict(ours.named_parameters())[name])
