"""What config.json and the tensors of an encoder's checkpoint mean here, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from edgeattn.encoder_shape import (
    OUTPUTS,
    Activation,
    EncoderShape,
    PatchInput,
    Pooling,
    Task,
    TokenInput,
)
from edgeattn.errors import CheckpointError, unknown_name
from edgeattn.models.encoder_families import ENCODER_FAMILIES, EncoderFamily, encoder_parameters
from edgeattn.models.huggingface import (
    StoredParameter,
    global_rope,
    integer,
    number,
    width,
    wrong_type,
)
from edgeattn.shape import LayerKind

# Names in configs -> names in EncoderShape.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def is_encoder_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder family."""
    family = config.get("model_type")
    return isinstance(family, str) and family in ENCODER_FAMILIES


def encoder_shape_from_config(
    config: Mapping[str, Any], *, task: str | None = None, pooling: Pooling | None = None
) -> EncoderShape:
    """Reads the config.json of an encoder.

    Args:
        config: the parsed JSON object, its family one of `ENCODER_FAMILIES`.
        task: what comes out; None is classification where the checkpoint has a head for it, an
            embedding where a `pooling` is named, else token states.
        pooling: what the checkpoint's embeddings are made of.

    Raises:
        CheckpointError: an option is not supported, or a key is missing or of the wrong type.
        UsageError: no such task.
    """
    family = ENCODER_FAMILIES[config["model_type"]]
    for key, what in family.unsupported.items():
        if config.get(key):
            raise CheckpointError(
                expected=f"a {family.name} checkpoint without {what}",
                came=f"config.json sets {key} to {config[key]!r}",
                todo="use a checkpoint without it",
            )
    heads, hidden = integer(config, "num_attention_heads"), width(config, "hidden_size")
    head_dim = width(config, "head_dim", hidden // max(heads, 1))
    chosen = _task(family, config, task, pooling)
    return EncoderShape(
        family=family.name,
        input=_input(family, config),
        num_layers=integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=_intermediate_size(config, hidden),
        norm_eps=number(config, family.eps_key, family.eps),
        layer_cycle=(LayerKind(global_rope(config, head_dim) if family.rope else None),),
        norm=family.norm,
        pre_norm=family.pre_norm,
        gated=family.gated,
        activation=_activation(config),
        qkv_bias=family.bias and bool(config.get(family.qkv_bias or "", True)),
        bias=family.bias,
        layer_scale=family.layer_scale,
        task=chosen,
        pooling=pooling or "mean",
        head=family.head or "first",
        num_labels=_num_labels(config) if chosen == "classification" else 0,
    )


def _input(family: EncoderFamily, config: Mapping[str, Any]) -> TokenInput | PatchInput:
    if family.reads_images:
        size = config.get("image_size", 224)
        height, image_width = size if isinstance(size, list) and len(size) == 2 else (size, size)
        sides = {"height": height, "width": image_width}
        return PatchInput(
            integer(sides, "height"),
            integer(sides, "width"),
            integer(config, "patch_size", 16),
            integer(config, "num_channels", 3),
        )
    kind = config.get("position_embedding_type", "absolute")
    if family.learned_positions and kind != "absolute":
        raise CheckpointError(
            expected="absolute positions",
            came=f"position_embedding_type is {kind!r}",
            todo="use a checkpoint with them",
        )
    return TokenInput(
        integer(config, "vocab_size"),
        integer(config, "max_position_embeddings", 512),
        learned_positions=family.learned_positions,
        token_types=integer(config, "type_vocab_size", 2) if family.learned_positions else 0,
        norm=family.embedding_norm,
    )


def _intermediate_size(config: Mapping[str, Any], hidden: int) -> int:
    """DINOv2 gives its ratio to the hidden size; its key `intermediate_size` says nothing."""
    if config.get("mlp_ratio") is not None:
        ratio = number(config, "mlp_ratio")
        if not 0 < ratio < math.inf:
            raise wrong_type("mlp_ratio", ratio, "a positive number")
        return int(hidden * ratio)
    return integer(config, "intermediate_size", 4 * hidden)


def _activation(config: Mapping[str, Any]) -> Activation:
    named = config.get("hidden_act", "gelu")
    if not isinstance(named, str) or named not in ACTIVATIONS:
        raise CheckpointError(
            expected=f"an MLP with activation {' or '.join(ACTIVATIONS)}",
            came=f"hidden_act is {named!r}",
            todo="use a checkpoint with one of them",
        )
    return ACTIVATIONS[named]


def _task(
    family: EncoderFamily, config: Mapping[str, Any], task: str | None, pooling: Pooling | None
) -> Task:
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise wrong_type("architectures", names, "a list")
    has_head = any(str(name).endswith(_CLASSIFIERS) for name in names)
    if task is None:
        known = has_head and family.head is not None
        return "classification" if known else "embedding" if pooling else "hidden"
    if task not in OUTPUTS:
        raise unknown_name("task", task, OUTPUTS)
    if task == "classification" and (family.head is None or not has_head):
        raise CheckpointError(
            expected="a checkpoint with a head for classification",
            came=f"config.json names the architecture {', '.join(map(str, names)) or 'nowhere'}",
            todo="choose --task hidden, or a checkpoint that was trained to classify",
        )
    if task == "embedding" and family.reads_images:
        raise CheckpointError(
            expected="an encoder of texts, for embeddings of sentences",
            came=f"family {family.name} reads images",
            todo="choose --task hidden",
        )
    return cast("Task", task)


def _num_labels(config: Mapping[str, Any]) -> int:
    """Classes; transformers leaves them out of a config where there are 2."""
    labels = config.get("id2label")
    if labels is None:
        return integer(config, "num_labels", 2)
    if not isinstance(labels, Mapping):
        raise wrong_type("id2label", labels, "an object")
    return len(labels)


def stored_encoder_parameters(shape: EncoderShape) -> dict[str, StoredParameter]:
    """How every parameter of the encoder is stored, by its name in the encoder."""
    family = ENCODER_FAMILIES[shape.family]
    return {
        name: StoredParameter(stored_name(family, name), size)
        for name, size in encoder_parameters(shape).items()
    }


def stored_name(family: EncoderFamily, name: str) -> str:
    """The name of a parameter in the files: `layers.3.mlp.up_proj.bias` -> …, without a prefix."""
    block, inner = "", name
    if name.startswith("layers."):
        _, layer, inner = name.split(".", 2)
        block = family.block.format(layer)
    whole = inner if inner in family.renamed else inner.rpartition(".")[0]
    if whole not in family.renamed:
        return block + inner
    return block + family.renamed[whole] + inner.removeprefix(whole)
