"""Linear attention in the configs of its families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeattn.errors import CheckpointError
from edgeattn.models.families import Family
from edgeattn.models.huggingface import integer, number, per_layer, width, wrong_type
from edgeattn.recurrent import Recurrent

# Every n-th layer of a Qwen3.5 is softmax attention, where nothing else is said.
_PERIOD = 4
# The inner width of what decays of GLA come from; its configs do not name it.
_GATE_RANK = 16
# What a GLA has by default, and without which it is another architecture.
_GLA_PARTS = {
    "use_gk": "a decay per key channel",
    "use_output_gate": "a gate of the output",
    "fuse_norm": "one norm and gate",
    "elementwise_affine": "gains of its norms",
}


def recurrent_layers(family: Family, config: Mapping[str, Any]) -> list[Recurrent | None]:
    """The linear attention of each layer, or of each layer of a cycle; None where it is softmax.

    Raises:
        CheckpointError: a key is of the wrong type, or sizes do not fit.
    """
    if family.rule is None:
        return [None]
    if family.rule == "gated":
        return [_gated(config)]
    delta = Recurrent(
        "gated-delta",
        key_heads=integer(config, "linear_num_key_heads", 16),
        value_heads=integer(config, "linear_num_value_heads", 32),
        key_dim=width(config, "linear_key_head_dim", 128),
        value_dim=width(config, "linear_value_head_dim", 128),
        conv_width=integer(config, "linear_conv_kernel_dim", 4),
    )
    named = config.get("layer_types")
    if named is None:
        period = integer(config, "full_attention_interval", _PERIOD)
        if not 1 <= period <= integer(config, "num_hidden_layers"):
            return [delta]
        return [delta] * (period - 1) + [None]
    kinds = {"linear_attention": delta, "full_attention": None}
    layers = per_layer(config, "layer_types", named)
    for kind in layers:
        if not isinstance(kind, str) or kind not in kinds:
            raise wrong_type("layer_types", kind, "linear_attention or full_attention")
    return [kinds[kind] for kind in layers]


def _gated(config: Mapping[str, Any]) -> Recurrent:
    heads, hidden = integer(config, "num_heads", 4), width(config, "hidden_size")
    sizes = []
    for key, default in (("expand_k", 0.5), ("expand_v", 1.0)):
        size = hidden * number(config, key, default)
        if heads < 1 or not 0 < size <= 2**53 or size % heads:
            raise CheckpointError(
                expected=f"{key} that gives {heads} heads of one width",
                came=f"it gives {size:g} numbers for all",
                todo="check that config.json belongs to this checkpoint",
            )
        sizes.append(int(size) // heads)
    keys, values = sizes
    return Recurrent("gated", heads, heads, keys, values, gate_rank=_GATE_RANK)


def with_usual_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of GLA with the keys that other families have.

    Raises:
        CheckpointError: it leaves out a part of the architecture.
    """
    for key, what in _GLA_PARTS.items():
        if not config.get(key, True):
            raise CheckpointError(
                expected=f"a gla checkpoint with {what}",
                came=f"config.json sets {key} to {config[key]!r}",
                todo="use a checkpoint with it",
            )
    heads, inner = integer(config, "num_heads", 4), config.get("intermediate_size")
    if integer(config, "num_kv_heads", heads) != heads:
        raise CheckpointError(
            expected=f"a gla checkpoint with a key head for each of its {heads} heads",
            came=f"config.json sets num_kv_heads to {config['num_kv_heads']!r}",
            todo="use a checkpoint without",
        )
    if inner is None:
        ratio = number(config, "hidden_ratio", 4)
        inner = -(-int(width(config, "hidden_size") * ratio * 2 / 3) // 256) * 256
    usual = {"num_attention_heads": heads, "intermediate_size": inner}
    return {**config, **usual, "rms_norm_eps": number(config, "norm_eps", 1e-6)}
