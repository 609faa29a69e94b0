"""A model written back as a Hugging Face checkpoint that plain transformers loads.

Names and layouts are the inverse of `huggingface.stored_parameters`, from the same data. The files
are written here and not by the safetensors package, which wants every tensor of a file in memory at
once: all sizes are known beforehand, so a parameter can be read, written and forgotten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeattn.models.families import LM_HEAD
from edgeattn.models.huggingface import StoredParameter, stored_parameters
from edgeattn.models.model import TORCH_DTYPES, Model, rounded
from edgeattn.shape import ModelShape

Progress = Callable[[int, int], None]

SHARD_BYTES = 4 * 10**9
_INDEX = "model.safetensors.index.json"
# Names of a recipe's dtypes in safetensors.
_CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the files.

    Attributes:
        name: with the leading "model.", where it has one.
        shape: of the whole tensor.
        parts: the parameters that it holds, stacked by rows in this order.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, StoredParameter], ...]


def stored_tensors(shape: ModelShape, config: Mapping[str, Any]) -> list[StoredTensor]:
    """The tensors of a checkpoint of `shape`, in the order its parameters are streamed."""
    assert not shape.fused, "stacked projections are a matter of graphs"
    found: dict[str, list[tuple[str, StoredParameter]]] = {}
    for name, stored in stored_parameters(shape, config).items():
        found.setdefault(stored.name, []).append((name, stored))
    tensors = []
    for name, parts in found.items():
        parts.sort(key=lambda part: part[1].rows or (0, 0))
        full_name = name if name == LM_HEAD else f"model.{name}"
        tensors.append(StoredTensor(full_name, parts[0][1].shape, tuple(parts)))
    return tensors


def checkpoint_config(config: Mapping[str, Any], shape: ModelShape, dtype: str) -> dict[str, Any]:
    """config.json of the written checkpoint.

    Args:
        config: that of the source.
        shape: of the written model; a rotation unties embedding and head.
        dtype: of the files, as in a recipe.
    """
    # Every transformers reads the older name; the newer one is kept where the source has it.
    names = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    torch_name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
    return {
        **config,
        "tie_word_embeddings": shape.tied_embeddings,
        **dict.fromkeys(names, torch_name),
    }


@torch.inference_mode()
def write_weights(
    folder: Path,
    model: Model,
    config: Mapping[str, Any],
    dtype: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes every parameter, dequantised, to safetensors files, one parameter at a time.

    Args:
        folder: where the files go; it exists.
        model: not fused, and without online rotations, which no file can say.
        config: of the source checkpoint.
        dtype: of the files, as in a recipe.
        shard_bytes: of tensors in one file at most, unless a single one is larger.
        progress: called with (bytes written, all bytes).

    Returns:
        Bytes of each file by its name; more than one file come with an index.

    Raises:
        CheckpointError: a weight overflows `dtype`.
    """
    assert all(read.rotation is None for read in model.reads.values())
    size = TORCH_DTYPES[dtype].itemsize
    tensors = stored_tensors(model.shape, config)
    total, done = size * sum(math.prod(tensor.shape) for tensor in tensors), 0
    shards = list(_shards(tensors, shard_bytes // size))
    written, places = {}, {}
    for number, shard in enumerate(shards, start=1):
        file = folder / _file_name(number, len(shards))
        with file.open("wb") as stream:
            stream.write(_header(shard, dtype))
            for name, stored in (part for tensor in shard for part in tensor.parts):
                done += stream.write(_as_bytes(_stored_values(model, name, stored, dtype)))
                if progress:
                    progress(done, total)
        written[file.name] = file.stat().st_size
        places.update(dict.fromkeys((tensor.name for tensor in shard), file.name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return written


def _shards(tensors: Sequence[StoredTensor], most: int) -> Iterator[list[StoredTensor]]:
    """Consecutive tensors of at most `most` elements together."""
    shard: list[StoredTensor] = []
    elements = 0
    for tensor in tensors:
        own = math.prod(tensor.shape)
        if shard and elements + own > most:
            yield shard
            shard, elements = [], 0
        shard.append(tensor)
        elements += own
    yield shard


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"


def _header(tensors: Sequence[StoredTensor], dtype: str) -> bytes:
    """What a safetensors file begins with: the length of a JSON text, and the text."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size, end = TORCH_DTYPES[dtype].itemsize, 0
    for tensor in tensors:
        begin, end = end, end + size * math.prod(tensor.shape)
        entries[tensor.name] = {
            "dtype": _CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin aligned
    return len(text).to_bytes(8, "little") + text


def _stored_values(model: Model, name: str, stored: StoredParameter, dtype: str) -> Tensor:
    """A parameter as the files hold it, rounded to their dtype last."""
    value = rounded(name, model.weights.read(name), torch.float32)
    if stored.offset or stored.factor != 1:
        # In fp64 and with the factor as fp32 has it, so that reading gives the same numbers again.
        value = value.double() / torch.tensor(stored.factor).double() - stored.offset
        value = value.float()
    return rounded(name, value, TORCH_DTYPES[dtype])


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
