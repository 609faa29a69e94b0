"""What config.json and the tensors of a Hugging Face checkpoint mean here, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeattn.errors import CheckpointError
from edgeattn.models.families import FAMILIES, Family, find_family, parameter_names
from edgeattn.recurrent import PREFIX
from edgeattn.shape import LayerKind, ModelShape, Rope, RopeScaling, check_depth

# Names in configs -> names in ModelShape.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu-tanh",
}

# The second is what the first Phi-3 checkpoints call it.
_LONGROPE = ("longrope", "su")


# Of widths that floats are computed from.
_LARGEST_WIDTH = 2**53


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
    if family.rule == "gated":
        from edgeattn.models.recurrent_config import with_usual_keys

        config = with_usual_keys(config)
    heads = integer(config, "num_attention_heads")
    hidden = width(config, "hidden_size")
    head_dim = width(config, "head_dim", hidden // max(heads, 1))
    num_layers = integer(config, "num_hidden_layers")
    check_depth(num_layers)  # lists of the layers' kinds are made that long
    return ModelShape(
        family=family.name,
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=integer(config, "intermediate_size"),
        vocab_size=integer(config, "vocab_size"),
        max_context=_max_context(config),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        layer_cycle=_layer_cycle(family, config, head_dim),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        output_gate=family.output_gate,
        output_norms=family.output_norms,
        activation=_activation(family, config),
        embedding_scale=math.sqrt(max(hidden, 1)) if family.scaled_embedding else 1.0,
        attention_softcap=_softcap(family, config, "attn_logit_softcapping"),
        logits_softcap=_softcap(family, config, "final_logit_softcapping"),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied_embeddings)),
    )


def _refuse_unsupported(family: Family, config: Mapping[str, Any]) -> None:
    for key, what in family.unsupported.items():
        if config.get(key):
            raise CheckpointError(
                expected=f"a {family.name} checkpoint without {what}",
                came=f"config.json sets {key} to {config[key]!r}",
                todo="use a checkpoint without it",
            )


def _activation(family: Family, config: Mapping[str, Any]) -> str:
    named = config.get(family.activation_key) or config.get("hidden_act", "silu")
    if not isinstance(named, str) or named not in ACTIVATIONS:
        raise CheckpointError(
            expected=f"a gated MLP with activation {' or '.join(ACTIVATIONS)}",
            came=f"{family.activation_key} is {named!r}",
            todo="use a checkpoint with one of them",
        )
    return ACTIVATIONS[named]


def _softcap(family: Family, config: Mapping[str, Any], key: str) -> float | None:
    return number(config, key) if family.softcaps and config.get(key) is not None else None


def _layer_cycle(family: Family, config: Mapping[str, Any], head_dim: int) -> tuple[LayerKind, ...]:
    """The kinds of the layers as the shortest cycle that gives them all."""
    from edgeattn.models.recurrent_config import recurrent_layers  # which reads with what is below

    parameters = _rope_parameters(config)
    rope = global_rope(config, head_dim)
    local = _local_rope(parameters, config, head_dim) if family.local_rope else rope
    windows = _windows(family, config)
    rotated = _rotated_layers(config) if family.skips_rope else [True]
    recurrent = recurrent_layers(family, config)
    length = math.lcm(len(windows), len(rotated), len(recurrent))
    kinds = []
    for layer in range(length):
        state = recurrent[layer % len(recurrent)]
        if state is not None:
            kinds.append(LayerKind(None, attention=state))
            continue
        window = windows[layer % len(windows)]
        own = local if window is not None else rope
        kinds.append(LayerKind(own if rotated[layer % len(rotated)] else None, window))
    return _shortest_cycle(kinds)


def _shortest_cycle(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    for period in range(1, len(kinds)):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


def _windows(family: Family, config: Mapping[str, Any]) -> list[int | None]:
    """The sliding window of each layer, or of each layer of a cycle."""
    if family.full_attention_period is None or config.get("sliding_window") is None:
        return [None]
    window = integer(config, "sliding_window")
    named = config.get("layer_types")
    if named is not None:
        kinds = {"sliding_attention": window, "full_attention": None}
        layers = per_layer(config, "layer_types", named)
        for kind in layers:
            if not isinstance(kind, str) or kind not in kinds:
                raise wrong_type("layer_types", kind, "sliding_attention or full_attention")
        return [kinds[kind] for kind in layers]
    period = integer(config, "sliding_window_pattern", family.full_attention_period)
    if not 1 <= period <= integer(config, "num_hidden_layers"):
        return [window]
    return [window] * (period - 1) + [None]


def _rotated_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has rotary positions (`no_rope_layers` holds 1 where it has)."""
    named = config.get("no_rope_layers")
    if named is not None:
        return [bool(value) for value in per_layer(config, "no_rope_layers", named)]
    period = integer(config, "no_rope_layer_interval", 4)
    if period < 1:
        raise wrong_type("no_rope_layer_interval", period, "a positive number")
    if period > integer(config, "num_hidden_layers"):
        return [True]
    return [True] * (period - 1) + [False]


def per_layer(config: Mapping[str, Any], key: str, found: object) -> list[Any]:
    """A list of a config with an entry for each layer.

    Raises:
        CheckpointError: it is something else.
    """
    layers = integer(config, "num_hidden_layers")
    if not isinstance(found, list) or len(found) != layers or not found:
        raise wrong_type(key, found, f"a list of {layers} entries")
    return found


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` (transformers 4), else empty."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise wrong_type("rope_scaling", found, "an object")
    return found


def _local_rope(parameters: Mapping[str, Any], config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary positions of the layers with a window; before transformers 5 a key of their own."""
    own = parameters.get("sliding_attention")
    if own is None:
        return Rope(head_dim, number(config, "rope_local_base_freq", 10000.0))
    return _rope(own, config, head_dim)


def global_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary positions of the layers that see all keys."""
    parameters = _rope_parameters(config)
    return _rope(parameters.get("full_attention", parameters), config, head_dim)


def _rope(parameters: object, config: Mapping[str, Any], head_dim: int) -> Rope:
    if not isinstance(parameters, Mapping):
        raise wrong_type("rope_parameters", parameters, "an object")
    theta = number(config, "rope_theta", 10000.0)
    fraction = number(config, "partial_rotary_factor", 1.0)
    theta = number(parameters, "rope_theta", theta)
    dim = int(head_dim * number(parameters, "partial_rotary_factor", fraction))
    return Rope(dim, theta, _rope_scaling(parameters, config))


def _rope_scaling(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", None):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, factor=number(parameters, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind,
            factor=number(parameters, "factor"),
            low_freq_factor=number(parameters, "low_freq_factor"),
            high_freq_factor=number(parameters, "high_freq_factor"),
            original_context=integer(parameters, "original_max_position_embeddings"),
        )
    if kind in _LONGROPE:
        return _longrope(parameters, config)
    raise CheckpointError(
        expected="rope scaling of type default, linear, llama3 or longrope",
        came=f"the config asks for {kind!r}",
        todo="use a checkpoint with one of these",
    )


def _longrope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    """The stretch within the original context.

    Beyond it the model switches every position to other divisors, which no one graph with a cache
    can: the context ends there (`_max_context`).
    """
    divisors = parameters.get("short_factor")
    if not isinstance(divisors, list):
        raise wrong_type("short_factor", divisors, "a list of numbers")
    factors = [number({"short_factor": value}, "short_factor") for value in divisors]
    original = _original_context(parameters, config)
    stretched = integer(config, "max_position_embeddings", 2048)
    factor = number(parameters, "factor", stretched / max(original, 1))
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    magnitude = number(parameters, "attention_factor", derived)
    return RopeScaling(
        "longrope",
        original_context=original,
        divisors=tuple(factors),
        magnitude=magnitude,
    )


def _max_context(config: Mapping[str, Any]) -> int:
    parameters = _rope_parameters(config)
    if parameters.get("rope_type", parameters.get("type")) in _LONGROPE:
        return _original_context(parameters, config)
    return integer(config, "max_position_embeddings", 2048)


def _original_context(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return integer(parameters if key in parameters else config, key)


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a config.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(key, value, "an integer")
    return value


def width(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """As `integer`, of a size that floats can be computed from."""
    value = integer(config, key, default)
    if abs(value) > _LARGEST_WIDTH:
        raise wrong_type(key, value, "an integer up to 2^53")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of a config.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(key, value, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise wrong_type(key, "beyond any float", "a number") from error


def wrong_type(key: str, value: object, wanted: str) -> CheckpointError:
    """The error for a value of a config that is missing, or not what it must be."""
    came = "the key is missing" if value is None else f"{key} is {value!r}"
    return CheckpointError(
        expected=f"{wanted} under '{key}' in the model's config",
        came=came,
        todo="check that config.json belongs to this checkpoint",
    )


@dataclass(frozen=True)
class StoredParameter:
    """Where a parameter lies in a Hugging Face checkpoint, and how it is read from there.

    Attributes:
        name: of the tensor, without the leading "model.".
        shape: of the tensor.
        rows: first and last row but one of the parameter, None for the whole tensor.
        offset: added to the stored values.
        factor: what they are then multiplied with.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    offset: float = 0.0
    factor: float = 1.0


def stored_parameters(shape: ModelShape, config: Mapping[str, Any]) -> dict[str, StoredParameter]:
    """How every parameter of the decoder is stored, by its name in the decoder."""
    family, sizes = FAMILIES[shape.family], parameter_names(shape)
    factor = _query_factor(shape, config)
    scaled = "q_norm.weight" if shape.qk_norm else "q_proj.weight"
    fused = {part: whole for whole, parts in family.fused.items() for part in parts}
    found = {}
    for name, size in sizes.items():
        prefix, inner = _split(name)
        # The norm within linear attention is stored as it is in every family.
        has_offset = "norm" in name and not inner.startswith(PREFIX)
        offset = family.gain_offset if has_offset else 0.0
        own_factor = factor if name.endswith(scaled) else 1.0
        if inner in fused:
            whole = fused[inner]
            parts = [sizes[prefix + part] for part in family.fused[whole]]
            start = sum(p[0] for p in parts[: family.fused[whole].index(inner)])
            total = (sum(p[0] for p in parts), *size[1:])
            found[name] = StoredParameter(
                prefix + whole, total, (start, start + size[0]), offset, own_factor
            )
        else:
            stored = prefix + family.renamed.get(inner, inner)
            found[name] = StoredParameter(stored, size, None, offset, own_factor)
    return found


def _split(name: str) -> tuple[str, str]:
    """`layers.3.mlp.up_proj.weight` -> (`layers.3.`, `mlp.up_proj.weight`)."""
    if not name.startswith("layers."):
        return "", name
    _, layer, inner = name.split(".", 2)
    return f"layers.{layer}.", inner


def _query_factor(shape: ModelShape, config: Mapping[str, Any]) -> float:
    """What makes attention scaled by head_dim one scaled by `query_pre_attn_scalar` (Gemma)."""
    if config.get("query_pre_attn_scalar") is None:
        return 1.0
    scalar = number(config, "query_pre_attn_scalar")
    if not 0 < scalar < math.inf:
        raise wrong_type("query_pre_attn_scalar", scalar, "a positive number")
    return math.sqrt(shape.head_dim / scalar)
