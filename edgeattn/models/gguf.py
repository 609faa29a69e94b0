"""GGUF files as checkpoints: llama.cpp's names, types and row order turned into the decoder's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.errors import CheckpointError
from edgeattn.models.checkpoint import Checkpoint, checkpoint_name
from edgeattn.models.families import EMBEDDING, FINAL_NORM, LM_HEAD, parameter_names
from edgeattn.models.gguf_header import GgufHeader, Metadata, TensorInfo, read_header
from edgeattn.models.gguf_metadata import (
    EMBEDDING_TENSOR,
    HEAD_TENSOR,
    config_from_shape,
    find_architecture,
    shape_from_metadata,
)
from edgeattn.models.gguf_tokenizer import special_token_ids, tokenizer_files
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    import torch

_ROPE_TENSOR = "rope_freqs.weight"
_GLOBALS = {EMBEDDING: EMBEDDING_TENSOR, FINAL_NORM: "output_norm.weight", LM_HEAD: HEAD_TENSOR}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Architectures whose q and k rows llama.cpp stores in the order of interleaved rotation.
_PERMUTED = ("llama",)
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CHUNK = 1 << 21  # elements dequantised at a time; bounds the temporaries of the gguf package


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file: header, architecture, tokenizer and the place of every weight.

    Raises:
        CheckpointError: the file is broken, or describes a model edgeattn does not read.
        MissingDependencyError: the `gguf` package is not installed.
    """
    header = read_header(path)
    find_architecture(header.metadata)
    shape = shape_from_metadata(header, _read_rope_factors(header))
    weights = GgufReader(header, shape)
    weights.check()
    kinds = Counter(info.kind for info in header.tensors.values())
    ids = {k: i for k, i in special_token_ids(header.metadata).items() if k != "unk_token_id"}
    main_kind = Counter({k: n for k, n in kinds.items() if k != "F32"}).most_common(1)
    dtype = _PLAIN.get(main_kind[0][0], "float32") if main_kind else "float32"
    return Checkpoint(
        name=checkpoint_name(path),
        shape=shape,
        config=config_from_shape(shape, dtype, ids),
        generation_config=_generation_config(header.metadata, ids),
        text=tokenizer_files(header.metadata, shape.vocab_size, shape.max_context),
        identity={
            "format": "gguf",
            "files": {path.name: header.file_size},
            "fingerprint": header.digest,
            "tensor_types": dict(sorted(kinds.items())),
        },
        weights=weights,
    )


@dataclass(frozen=True)
class GgufReader:
    """Parameters of a GGUF file under the decoder's names.

    Each read opens the file anew and copies only its tensor, so that nothing of earlier tensors
    stays in memory. Quantised types come back as float32, the others as they are stored.

    Attributes:
        header: the file's header.
        shape: the architecture it describes.
    """

    header: GgufHeader = field(repr=False)
    shape: ModelShape

    def check(self) -> None:
        """Refuses a file whose tensors are not exactly those of the shape.

        A tensor more is refused too: a bias or scale that is silently left out gives a wrong model.

        Raises:
            CheckpointError: a tensor is missing, unknown, misshapen or of an unreadable type.
        """
        wanted = {_stored_name(n): s for n, s in parameter_names(self.shape).items()}
        for name, shape in wanted.items():
            found = self._info(name).shape
            if found != shape:
                raise CheckpointError(
                    expected=f"tensor {name} of shape {list(shape)}, as the metadata says",
                    came=f"its shape is {list(found)}",
                    todo="convert the model again with a current llama.cpp",
                )
        for name in self.header.tensors:
            if name not in wanted and name != _ROPE_TENSOR:
                raise CheckpointError(
                    expected="only the tensors of a plain decoder of this architecture",
                    came=f"the file also holds {name}, which edgeattn has no place for",
                    todo="use a model without it",
                )
        _refuse_unreadable({i.kind: n for n, i in self.header.tensors.items()})

    def read(self, name: str) -> torch.Tensor:
        """The parameter `name`, dequantised and with rows in Hugging Face's order."""
        stored = _stored_name(name)
        info = self._info(stored)
        rows = info.size // _row_bytes(info)
        if info.kind in _PLAIN:
            tensor = _as_torch(next(_raw_rows(self.header, stored, info, rows)), info)
        else:
            tensor = self._dequantize(stored, info)
        heads = {"attn_q": self.shape.num_heads, "attn_k": self.shape.num_kv_heads}
        kind = stored.split(".")[-2]
        if self.shape.family in _PERMUTED and kind in heads:
            return _rotate_half_order(tensor, heads[kind])
        return tensor

    def _dequantize(self, name: str, info: TensorInfo) -> torch.Tensor:
        import torch
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[info.kind]
        out = np.empty((info.size // _row_bytes(info), info.shape[-1]), np.float32)
        step = max(1, _CHUNK // info.shape[-1])
        for index, raw in enumerate(_raw_rows(self.header, name, info, step)):
            out[index * step : index * step + len(raw)] = dequantize(raw, kind)
        return torch.from_numpy(out.reshape(info.shape))

    def _info(self, stored: str) -> TensorInfo:
        if stored not in self.header.tensors:
            raise CheckpointError(
                expected=f"a tensor {stored}, as the metadata implies",
                came=f"{self.header.path} holds none",
                todo="download the file again or convert the model again",
            )
        return self.header.tensors[stored]


def _stored_name(name: str) -> str:
    """The decoder's parameter name -> llama.cpp's."""
    if name in _GLOBALS:
        return _GLOBALS[name]
    _, layer, rest = name.split(".", 2)
    module, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_IN_BLOCK[module]}.{leaf}"


def _row_bytes(info: TensorInfo) -> int:
    rows = 1
    for dimension in info.shape[:-1]:
        rows *= dimension
    return info.size // rows


def _raw_rows(
    header: GgufHeader, name: str, info: TensorInfo, step: int
) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """The bytes of `step` rows at a time, as [rows, bytes of a row]."""
    row = _row_bytes(info)
    left = info.size // row
    try:
        with header.path.open("rb") as stream:
            stream.seek(info.offset)
            while left:
                raw = np.fromfile(stream, np.uint8, min(step, left) * row)
                if raw.size != min(step, left) * row:
                    raise _changed(header.path, f"it ends within tensor {name}")
                left -= min(step, left)
                yield raw.reshape(-1, row)
    except OSError as error:
        raise _changed(header.path, f"it cannot be read ({error.strerror})") from error


def _as_torch(raw: np.ndarray[Any, np.dtype[np.uint8]], info: TensorInfo) -> torch.Tensor:
    import torch

    return torch.from_numpy(raw).view(getattr(torch, _PLAIN[info.kind])).reshape(info.shape)


def _rotate_half_order(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes llama.cpp's row order: (0, 1, 2, 3, ...) of a head -> (0, 2, ..., 1, 3, ...)."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)  # [H, D/2, 2, K] -> [H, 2, D/2, K]


def _refuse_unreadable(kinds: dict[str, str]) -> None:
    """Asks the gguf package to dequantise one block of each kind (kind -> a tensor of it)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind, name in kinds.items():
        if kind in _PLAIN:
            continue
        number = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError as error:
            raise CheckpointError(
                expected="tensors of types the gguf package dequantises",
                came=f"{name} is of type {kind}",
                todo="convert the model to another type, for example Q8_0",
            ) from error


def _read_rope_factors(header: GgufHeader) -> list[float] | None:
    info = header.tensors.get(_ROPE_TENSOR)
    if info is None:
        return None
    if info.kind != "F32":
        raise CheckpointError(
            expected=f"{_ROPE_TENSOR} of type F32",
            came=f"it is of type {info.kind}",
            todo="convert the model again with a current llama.cpp",
        )
    raw = next(_raw_rows(header, _ROPE_TENSOR, info, info.size // _row_bytes(info)))
    factors: list[float] = raw.view(np.float32).ravel().tolist()
    return factors


def _generation_config(metadata: Metadata, ids: dict[str, int]) -> dict[str, Any]:
    """Token ids for generation; a chat model may end its turn with another token than its text."""
    turn = metadata.integer("tokenizer.ggml.eot_token_id", -1)
    ends = sorted({ids.get("eos_token_id", -1), turn} - {-1})
    return {**ids, "eos_token_id": ends} if len(ends) > 1 else dict(ids)


def _changed(path: Path, came: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{path} as it was when its header was read",
        came=came,
        todo="check the disk and start again",
    )
