"""Model families as data: how a family's config and tensors map onto the one decoder.

Adding a family that this decoder can express is one entry in `FAMILIES`. No torch here: a
dry run reads shapes on machines without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeattn.errors import CheckpointError
from edgeattn.shape import ModelShape, RopeScaling

# Parameter names inside edgeattn are Hugging Face's Llama names without the leading "model.".
EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: `model_type` in config.json.
        qkv_bias: q, k and v projections carry a bias.
        qk_norm: RMSNorm on q and k per head.
        gguf_architecture: `general.architecture` of the family in GGUF, None if not read.
        unsupported: config keys whose truthy value this decoder cannot honour, with the reason.
    """

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    gguf_architecture: str | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)


_BIASES = {"mlp_bias": "biases in the MLP", "attention_bias": "a bias on the attention output"}
_WINDOW = {"use_sliding_window": "sliding-window attention"}
_QUANTIZED = {"quantization_config": "weights that were quantised by another tool"}

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("llama", gguf_architecture="llama", unsupported={**_BIASES, **_QUANTIZED}),
        Family("qwen2", qkv_bias=True, unsupported={**_WINDOW, **_QUANTIZED}),
        Family("qwen3", qk_norm=True, unsupported={**_BIASES, **_WINDOW, **_QUANTIZED}),
    )
}

ACTIVATIONS = ("silu", "swish")


def find_family(model_type: object) -> Family:
    """The family of a config's `model_type`.

    Raises:
        CheckpointError: no such family is known.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            expected=f"a checkpoint of a supported family ({', '.join(FAMILIES)})",
            came=f"its model_type is {model_type!r}",
            todo="convert it to one of these architectures or ask for the family in an issue",
        )
    return FAMILIES[model_type]


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Reads a Hugging Face config.json.

    Args:
        config: the parsed JSON object.

    Raises:
        CheckpointError: the family, activation or an option is not supported, or a key is missing
            or of the wrong type.
    """
    family = find_family(config.get("model_type"))
    _refuse_unsupported(family, config)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    return ModelShape(
        family=family.name,
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", heads),
        head_dim=_integer(config, "head_dim", hidden // max(heads, 1)),
        intermediate_size=_integer(config, "intermediate_size"),
        vocab_size=_integer(config, "vocab_size"),
        max_context=_integer(config, "max_position_embeddings", 2048),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _refuse_unsupported(family: Family, config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            expected=f"a gated MLP with activation {' or '.join(ACTIVATIONS)}",
            came=f"hidden_act is {activation!r}",
            todo="use a checkpoint with a SwiGLU MLP",
        )
    rotated = _rope_parameters(config).get(
        "partial_rotary_factor", config.get("partial_rotary_factor")
    )
    if rotated not in (None, 1):
        raise CheckpointError(
            expected="rotary positions over the whole head",
            came=f"partial_rotary_factor is {rotated!r}",
            todo="use a checkpoint without it",
        )
    for key, what in family.unsupported.items():
        if config.get(key):
            raise CheckpointError(
                expected=f"a {family.name} checkpoint without {what}",
                came=f"config.json sets {key} to {config[key]!r}",
                todo="use a checkpoint without it",
            )


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4), else empty."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise _wrong_type("rope_scaling", found, "an object")
    return found


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = _rope_parameters(config)
    if "rope_theta" in parameters:
        return _number(parameters, "rope_theta")
    return _number(config, "rope_theta", 10000.0)


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling:
    parameters = _rope_parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", None):
        return RopeScaling()
    if kind != "llama3":
        raise CheckpointError(
            expected="rope scaling of type default or llama3",
            came=f"the config asks for {kind!r}",
            todo="use a checkpoint with one of these",
        )
    return RopeScaling(
        kind="llama3",
        factor=_number(parameters, "factor"),
        low_freq_factor=_number(parameters, "low_freq_factor"),
        high_freq_factor=_number(parameters, "high_freq_factor"),
        original_context=_integer(parameters, "original_max_position_embeddings"),
    )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(key, value, "an integer")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(key, value, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise _wrong_type(key, "beyond any float", "a number") from error


def _wrong_type(key: str, value: object, wanted: str) -> CheckpointError:
    came = "the key is missing" if value is None else f"{key} is {value!r}"
    return CheckpointError(
        expected=f"{wanted} under '{key}' in the model's config",
        came=came,
        todo="check that config.json belongs to this checkpoint",
    )


def parameter_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder: name -> shape, in the order it is streamed."""
    d = shape.hidden_size
    names: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, d)}
    for i in range(shape.num_layers):
        prefix = f"layers.{i}."
        names[prefix + "input_layernorm.weight"] = (d,)
        for linear, (outputs, inputs) in shape.linears().items():
            names[f"{prefix}{linear}.weight"] = (outputs, inputs)
            if shape.qkv_bias and linear.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
                names[f"{prefix}{linear}.bias"] = (outputs,)
        if shape.qk_norm:
            names[prefix + "self_attn.q_norm.weight"] = (shape.head_dim,)
            names[prefix + "self_attn.k_norm.weight"] = (shape.head_dim,)
        names[prefix + "post_attention_layernorm.weight"] = (d,)
    names[FINAL_NORM] = (d,)
    if not shape.tied_embeddings:
        names[LM_HEAD] = (shape.vocab_size, d)
    return names
