"""From GGUF metadata to a `ModelShape`, and from there to the config.json of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edgeattn.errors import CheckpointError
from edgeattn.models.families import FAMILIES, Family
from edgeattn.models.gguf_header import GgufHeader, Metadata
from edgeattn.shape import LayerKind, ModelShape, Rope, RopeScaling

EMBEDDING_TENSOR = "token_embd.weight"
HEAD_TENSOR = "output.weight"

# Keys (after the architecture's prefix) that change the arithmetic in a way this decoder has no
# place for -> the value that means "not used".
_NEUTRAL: dict[str, float] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
}
_CONTEXTS = tuple(1 << n for n in range(13, 8, -1)) + tuple(1 << n for n in range(14, 21))


def find_architecture(metadata: Metadata) -> Family:
    """The family of `general.architecture`.

    Raises:
        CheckpointError: edgeattn does not read this architecture from GGUF.
    """
    name = metadata.text("general.architecture")
    families = {f.gguf_architecture: f for f in FAMILIES.values() if f.gguf_architecture}
    if name not in families:
        raise CheckpointError(
            expected=f"a GGUF file of architecture {' or '.join(families)}",
            came=f"its general.architecture is '{name}'",
            todo="pass the model's Hugging Face directory instead",
        )
    return families[name]


def shape_from_metadata(header: GgufHeader, rope_factors: Sequence[float] | None) -> ModelShape:
    """The architecture a GGUF header describes.

    Args:
        header: the file's header.
        rope_factors: values of `rope_freqs.weight`, None when the file has no such tensor.

    Raises:
        CheckpointError: a key is missing, of the wrong type, or asks for something this decoder
            cannot do.
    """
    metadata, family = header.metadata, find_architecture(header.metadata)
    prefix = f"{family.gguf_architecture}."
    _refuse_unsupported(metadata, prefix)
    heads = _one_for_all_layers(metadata, prefix + "attention.head_count")
    hidden = metadata.integer(prefix + "embedding_length")
    head_dim = metadata.integer(prefix + "attention.key_length", hidden // max(heads, 1))
    _require_full_rotation(metadata, prefix, head_dim)
    theta = metadata.number(prefix + "rope.freq_base", 10000.0)
    scaling = recover_rope_scaling(rope_factors, theta, head_dim)
    return ModelShape(
        family=family.name,
        num_layers=_num_layers(header, prefix + "block_count"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_one_for_all_layers(metadata, prefix + "attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_one_for_all_layers(metadata, prefix + "feed_forward_length"),
        vocab_size=_vocab_size(header),
        max_context=metadata.integer(prefix + "context_length"),
        norm_eps=metadata.number(prefix + "attention.layer_norm_rms_epsilon"),
        layer_cycle=(LayerKind(Rope(head_dim, theta, scaling)),),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=HEAD_TENSOR not in header.tensors,
    )


def config_from_shape(shape: ModelShape, dtype: str, token_ids: dict[str, int]) -> dict[str, Any]:
    """A config.json for transformers such that `shape_from_config` gives `shape` back.

    Args:
        shape: the architecture.
        dtype: name of the torch dtype most weights are read in.
        token_ids: "bos_token_id" and the like, those that are known.
    """
    (rope,) = shape.ropes
    scaling = rope.scaling
    return {
        "architectures": [f"{shape.family.capitalize()}ForCausalLM"],
        "model_type": shape.family,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None
        if scaling.kind == "none"
        else {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,
        **token_ids,
    }


def rope_factors_of(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes to `rope_freqs.weight`: theta_i is divided by factor i."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    rotations = scaling.original_context / wavelengths  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / scaling.factor + blend)


def recover_rope_scaling(
    factors: Sequence[float] | None, theta: float, head_dim: int
) -> RopeScaling:
    """The Llama 3 scaling whose factors these are.

    GGUF keeps one factor per frequency and forgets the four numbers they came from. Any scaling
    that reproduces every factor is the right one: nothing else enters the rotation.

    Raises:
        CheckpointError: no Llama 3 scaling gives these factors.
    """
    if factors is None:
        return RopeScaling()
    given = np.asarray(factors, np.float64)
    if given.shape == (head_dim // 2,) and np.isfinite(given).all() and given.min() >= 1:
        if (given == 1).all():
            return RopeScaling()
        for candidate in _candidates(given, theta, head_dim):
            if np.allclose(rope_factors_of(candidate, theta, head_dim), given, rtol=1e-5, atol=0):
                return candidate
    raise _unsupported(
        "rope_freqs.weight to hold the factors of a Llama 3 rope scaling",
        "no such scaling gives the values in the file",
    )


def _candidates(given: np.ndarray[Any, Any], theta: float, head_dim: int) -> Iterator[RopeScaling]:
    factor = float(f"{given.max():.6g}")
    for context in _CONTEXTS:
        yield RopeScaling("llama3", factor, 1.0, 4.0, context)
    # Between its two ends the blend is a line in the inverse wavelength; its two coefficients fix
    # (context, low, high) up to a common multiple, so low may be set to 1.
    blend = (1.0 / given - 1.0 / factor) / (1.0 - 1.0 / factor)
    between = (blend > 1e-4) & (blend < 1.0 - 1e-4)
    if between.sum() >= 2:
        inverse = 1.0 / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        slope, offset = np.polyfit(inverse[between], blend[between], 1)
        if slope > 0 and offset < 0:
            high = float(f"{1.0 - 1.0 / offset:.5g}")
            yield RopeScaling("llama3", factor, 1.0, high, round(slope * (high - 1.0)))


def _refuse_unsupported(metadata: Metadata, prefix: str) -> None:
    for key, neutral in _NEUTRAL.items():
        value = metadata.values.get(prefix + key, neutral)
        if value != neutral:
            raise _unsupported(f"a model without {prefix}{key}", f"the file sets it to {value!r}")
    if metadata.integer("split.count", 0) > 1:
        raise CheckpointError(
            expected="a model in one GGUF file",
            came=f"this is one part of {metadata.integer('split.count')}",
            todo="merge the parts with llama-gguf-split --merge",
        )
    kind = metadata.text(prefix + "rope.scaling.type", "none")
    # Without a type llama.cpp takes a factor as linear scaling.
    untyped = prefix + "rope.scaling.type" not in metadata.values
    for key in (prefix + "rope.scaling.factor", prefix + "rope.scale_linear"):
        if untyped and metadata.number(key, 1.0) not in (0.0, 1.0):
            kind = "linear"
    if kind != "none":
        raise _unsupported("rope scaling of type none or Llama 3's", f"the file asks for '{kind}'")


def _require_full_rotation(metadata: Metadata, prefix: str, head_dim: int) -> None:
    for key in ("rope.dimension_count", "attention.value_length"):
        value = metadata.integer(prefix + key, head_dim)
        if value != head_dim:
            raise _unsupported(
                f"{prefix}{key} equal to the head width {head_dim}", f"it is {value}"
            )


def _one_for_all_layers(metadata: Metadata, key: str, default: int | None = None) -> int:
    value = metadata.values.get(key)
    if isinstance(value, list):
        raise _unsupported(
            f"the same {key} in all layers", f"the file gives one for each of {len(value)} layers"
        )
    return metadata.integer(key, default)


def _num_layers(header: GgufHeader, key: str) -> int:
    """The number of layers; an absurd one ends here, not in a loop over its tensors."""
    layers = header.metadata.integer(key)
    if layers > len(header.tensors):
        raise _unsupported(
            f"at least one tensor for each of the {layers} layers in {key}",
            f"the file has {len(header.tensors)} tensors",
        )
    return layers


def _vocab_size(header: GgufHeader) -> int:
    if EMBEDDING_TENSOR not in header.tensors:
        raise CheckpointError(
            expected=f"a tensor {EMBEDDING_TENSOR} in {header.path}",
            came="the file holds none",
            todo="use a GGUF file with the model's weights, not only its vocabulary",
        )
    return header.tensors[EMBEDDING_TENSOR].shape[0]


def _unsupported(expected: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected=expected, came=came, todo="use a model of plain Llama architecture"
    )
