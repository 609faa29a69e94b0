"""Checkpoints of encoders: a Hugging Face directory or hub id, or an ONNX file, read lazily."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeattn.encoder_shape import EncoderShape, Pooling
from edgeattn.models.checkpoint import (
    TEXT_FILES,
    SafetensorsReader,
    WeightReader,
    checkpoint_name,
    read_json,
)
from edgeattn.models.encoder_config import encoder_shape_from_config, is_encoder_config
from edgeattn.models.hub import Progress, fetch_checkpoint, fetch_config, find_hub_id
from edgeattn.models.onnx_encoder import open_onnx_encoder

PREPROCESSOR = "preprocessor_config.json"
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
    return encoder_shape_from_config(config, task=task, pooling=_pooling(path))


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
    shape = encoder_shape_from_config(config, task=task, pooling=_pooling(path))
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


def _pooling(path: Path) -> Pooling | None:
    """What sentence-transformers makes an embedding of; None where the model has none."""
    found = read_json(path / "1_Pooling" / "config.json", required=False)
    if found.get("pooling_mode_mean_tokens"):
        return "mean"
    return "first" if found.get("pooling_mode_cls_token") else None
