"""Checkpoints of encoders: a Hugging Face directory or hub id, or an ONNX file, read lazily."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeattn.encoder_shape import EncoderShape, Pooling
from edgeattn.errors import CheckpointError
from edgeattn.models.checkpoint import (
    DENSE,
    POOLING,
    PREPROCESSOR,
    TEXT_FILES,
    SafetensorsReader,
    WeightReader,
    checkpoint_name,
    read_json,
)
from edgeattn.models.encoder_config import encoder_shape_from_config, is_encoder_config
from edgeattn.models.hub import fetch_checkpoint, fetch_config, find_hub_id
from edgeattn.models.hub_progress import Progress
from edgeattn.models.onnx_encoder import open_onnx_encoder

_FILES = (*TEXT_FILES, PREPROCESSOR)


@dataclass(frozen=True)
class EncoderCheckpoint:
    """An encoder's checkpoint whose header was checked, and whose weights are still on disk.

    Attributes:
        name: short name, used for the default output folder.
        shape: the architecture, with the task.
        config: config.json as the bundle will carry it.
        text: files of tokenizer and image preprocessing by name.
        identity: what the manifest says of the source.
        weights: reads parameters.
    """

    name: str
    shape: EncoderShape
    config: Mapping[str, Any]
    text: Mapping[str, bytes]
    identity: Mapping[str, Any]
    weights: WeightReader = field(repr=False)


def is_encoder(model: str | Path, *, offline: bool = False) -> bool:
    """Whether MODEL is an encoder; of a hub id only config.json is fetched."""
    if _is_onnx(model):
        return True
    hub_id = find_hub_id(model)
    path = Path(model) if hub_id is None else fetch_config(hub_id, offline=offline).path
    config = path / "config.json"
    if not os.path.isfile(config):
        return False
    return is_encoder_config(read_json(config, required=True))


def read_encoder_shape(
    model: str | Path, *, task: str | None = None, offline: bool = False
) -> EncoderShape:
    """The architecture of MODEL without its weights; of a hub id only config.json is fetched."""
    if _is_onnx(model):
        return open_onnx_encoder(Path(model), task=task).shape
    hub_id = find_hub_id(model)
    path = Path(model) if hub_id is None else fetch_config(hub_id, offline=offline).path
    config = read_json(path / "config.json", required=True)
    return encoder_shape_from_config(config, task=task, pooling=_pooling(path, task))


def open_encoder(
    model: str | Path,
    *,
    task: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> EncoderCheckpoint:
    """Opens MODEL: a Hugging Face directory or hub id of an encoder family, or an ONNX file.

    Args:
        model: see `edgeattn.models.hub.find_hub_id` for which is which.
        task: what comes out; None for what the checkpoint was made for.
        offline: a hub id is looked up in the cache alone.
        progress: called with (bytes fetched, bytes to fetch).

    Raises:
        CheckpointError: it cannot be fetched, or does not add up.
    """
    if _is_onnx(model):
        opened = open_onnx_encoder(Path(model), task=task)
        name = checkpoint_name(Path(model).with_suffix(""))
        return EncoderCheckpoint(
            name, opened.shape, opened.config, {}, opened.identity, weights=opened
        )
    hub_id = find_hub_id(model)
    if hub_id is None:
        path, name, source = Path(model), checkpoint_name(Path(model)), dict[str, str]()
    else:
        snapshot = fetch_checkpoint(hub_id, offline=offline, progress=progress)
        path, name, source = snapshot.path, hub_id.name, snapshot.identity()
    config = read_json(path / "config.json", required=True)
    shape = encoder_shape_from_config(config, task=task, pooling=_pooling(path, task))
    weights = SafetensorsReader.open_encoder(path, shape)
    return EncoderCheckpoint(
        name=name,
        shape=shape,
        config=config,
        text={n: (path / n).read_bytes() for n in _FILES if (path / n).is_file()},
        identity={"format": "huggingface", **weights.identity(config), **source},
        weights=weights,
    )


def _is_onnx(model: str | Path) -> bool:
    return os.path.isfile(model) and Path(model).suffix == ".onnx"


# What sentence-transformers calls a way to make one vector of all token states.
_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}


def _pooling(path: Path, task: str | None) -> Pooling | None:
    """What sentence-transformers makes an embedding of; None where the model has none.

    Raises:
        CheckpointError: an embedding is wanted, and is made in a way that is not known here.
    """
    found = read_json(path / POOLING, required=False)
    if not found or task not in (None, "embedding"):
        return None
    modes = [name for name, on in found.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _no_embedding(POOLING, f"names {' and '.join(modes) or 'none'}")
    if (path / DENSE).is_file():
        raise _no_embedding(DENSE, "says that a linear layer follows")
    return _POOLINGS[modes[0]]


def _no_embedding(file: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected="embeddings that are the mean or the first of the token states, and nothing more",
        came=f"{file} {came}",
        todo="choose --task hidden, and pool the token states yourself",
    )
