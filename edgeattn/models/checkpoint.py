"""Checkpoints: a Hugging Face directory or a GGUF file, read lazily, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeattn.encoder_shape import AnyShape, EncoderShape
from edgeattn.errors import CheckpointError
from edgeattn.models.encoder_config import is_encoder_config, stored_encoder_parameters
from edgeattn.models.encoder_families import ENCODER_FAMILIES
from edgeattn.models.families import LM_HEAD
from edgeattn.models.huggingface import StoredParameter, shape_from_config, stored_parameters
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    import torch

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# How images become pixels, and what sentence-transformers makes of the token states.
PREPROCESSOR = "preprocessor_config.json"
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
ENCODER_FILES = (PREPROCESSOR, POOLING, DENSE)
_QUANT_SUFFIX = re.compile(
    r"[.-](?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4|B?F16|F32)$", re.IGNORECASE
)
_DTYPES = ("F64", "F32", "F16", "BF16")


class WeightReader(Protocol):
    """Reads one parameter at a time, so that a whole model need never be in memory."""

    def read(self, name: str) -> torch.Tensor:
        """The parameter `name` (see `families.parameter_names`) in the dtype it is stored in."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header was read and checked, and whose weights are still on disk.

    Attributes:
        name: short name, used for the default output folder.
        shape: the architecture.
        config: config.json as the bundle will carry it.
        generation_config: generation_config.json, possibly empty.
        text: the tokenizer's files by name (a subset of `TEXT_FILES`).
        identity: what the manifest says of the source: format, file names and sizes, fingerprint.
        weights: reads parameters.
    """

    name: str
    shape: ModelShape
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    text: Mapping[str, bytes]
    identity: Mapping[str, Any]
    weights: WeightReader = field(repr=False)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens MODEL: a Hugging Face directory or a `.gguf` file.

    Raises:
        CheckpointError: nothing is there, the kind is unknown, or the header does not add up.
    """
    # unlike Path's own, these take names too long for a file
    if os.path.isdir(path):
        return _open_directory(path)
    if os.path.isfile(path) and path.suffix == ".gguf":
        from edgeattn.models.gguf import open_gguf

        return open_gguf(path)
    if os.path.isfile(path) and path.suffix == ".onnx":
        raise _no_decoder("an ONNX file as MODEL")
    raise CheckpointError(
        expected="a Hugging Face directory or a .gguf file as MODEL",
        came=f"{path} is neither" if os.path.exists(path) else f"{path} does not exist",
        todo="pass the folder that holds config.json and model.safetensors, a .gguf file, or "
        "OWNER/NAME of a repository on the Hugging Face hub",
    )


def checkpoint_name(path: Path) -> str:
    """The short name of MODEL: its folder, or its GGUF file without the quantisation suffix."""
    if path.suffix == ".gguf":
        return _QUANT_SUFFIX.sub("", path.stem)
    return path.resolve().name or "model"


def read_shape(path: Path) -> ModelShape:
    """The architecture of MODEL, without torch and without looking at its weights."""
    if path.is_dir():
        return _decoder_shape(read_json(path / "config.json", required=True))
    return open_checkpoint(path).shape


def _decoder_shape(config: Mapping[str, Any]) -> ModelShape:
    if is_encoder_config(config):
        raise _no_decoder(f"family {config['model_type']}")
    return shape_from_config(config)


def _no_decoder(what: str) -> CheckpointError:
    return CheckpointError(
        expected="a decoder, which predicts the next token",
        came=f"{what} is an encoder",
        todo="use edgeattn export or edgeattn doctor, which take encoders too",
    )


def _open_directory(path: Path) -> Checkpoint:
    config = read_json(path / "config.json", required=True)
    shape = _decoder_shape(config)
    weights = SafetensorsReader.open(path, shape, config)
    return Checkpoint(
        name=checkpoint_name(path),
        shape=shape,
        config=config,
        generation_config=read_json(path / "generation_config.json", required=False),
        text={n: (path / n).read_bytes() for n in TEXT_FILES if (path / n).is_file()},
        identity={"format": "huggingface", **weights.identity(config)},
        weights=weights,
    )


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    """A JSON object of a checkpoint; empty where it is not required and not there.

    Raises:
        CheckpointError: it is missing, or cannot be read.
    """
    if not path.is_file():
        if not required:
            return {}
        raise CheckpointError(
            expected=f"a {path.name} in {path.parent}",
            came="the directory holds none",
            todo="pass a complete Hugging Face directory or a .gguf file",
        )
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            expected=f"{path} to be readable",
            came=f"the system says: {error.strerror or error}",
            todo="check its permissions",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            expected=f"{path} to be JSON",
            came=f"it does not parse ({error})",
            todo="download the file again",
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            expected=f"{path} to hold a JSON object",
            came=f"it holds a {type(value).__name__}",
            todo="download the file again",
        )
    return value


@dataclass(frozen=True)
class SafetensorsReader:
    """Parameters of a Hugging Face directory, single file or sharded.

    Each read maps its file anew, so that pages of earlier tensors do not count as memory in use.

    Attributes:
        files: tensor name in the files -> file.
        stored: parameter name -> where it lies.
        prefix: of the names in the files, in checkpoints that have one.
        left_out: beginnings of names that nothing here reads.
    """

    files: Mapping[str, Path]
    stored: Mapping[str, StoredParameter]
    prefix: str = "model."
    left_out: tuple[str, ...] = (LM_HEAD,)

    @classmethod
    def open(
        cls, directory: Path, shape: ModelShape, config: Mapping[str, Any]
    ) -> SafetensorsReader:
        """Lists the tensors of `directory` and checks that they are those of `shape`.

        Raises:
            CheckpointError: no weights, a missing or broken shard, an index that leads outside, or
                tensors of another architecture.
        """
        files = cls._files(directory, shape.num_layers)
        reader = cls(files, stored_parameters(shape, config))
        reader._check(shape)
        return reader

    @classmethod
    def open_encoder(cls, directory: Path, shape: EncoderShape) -> SafetensorsReader:
        """As `open`, of an encoder's directory."""
        files = cls._files(directory, shape.num_layers)
        family = ENCODER_FAMILIES[shape.family]
        stored = stored_encoder_parameters(shape)
        reader = cls(files, stored, family.prefix, family.left_out)
        reader._check(shape)
        return reader

    @classmethod
    def _files(cls, directory: Path, num_layers: int) -> dict[str, Path]:
        """The file of each tensor."""
        files = cls._listed(directory)
        if num_layers > len(files):
            # Also keeps an absurd number in config.json from being counted up to.
            raise CheckpointError(
                expected=f"weights of {num_layers} layers, as config.json says",
                came=f"the checkpoint holds {len(files)} tensors",
                todo="use the config.json that belongs to these weights",
            )
        return files

    @staticmethod
    def _listed(directory: Path) -> dict[str, Path]:
        """The file of each tensor, from the index or the single file."""
        single = directory / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(_tensor_names(single), single)
        index = directory / "model.safetensors.index.json"
        if not index.is_file():
            raise CheckpointError(
                expected=f"model.safetensors or model.safetensors.index.json in {directory}",
                came="the directory holds neither",
                todo="save the model with safetensors (pickled .bin files are never loaded)",
            )
        shards = read_json(index, required=True).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise CheckpointError(
                expected=f"a weight_map from tensor to file name in {index}",
                came="there is none",
                todo="download the index again",
            )
        files = {shard: _shard_path(directory, shard) for shard in set(shards.values())}
        held = {shard: set(_tensor_names(file)) for shard, file in files.items()}
        for name, shard in shards.items():
            if name not in held[shard]:
                raise CheckpointError(
                    expected=f"tensor {name} in {shard}, as the index says",
                    came="the shard does not hold it",
                    todo="download the shard and the index again",
                )
        return {name: files[shard] for name, shard in shards.items()}

    def _check(self, shape: AnyShape) -> None:
        """Every parameter is there, in its shape and a dtype we read, and nothing else."""
        headers = {file: _header(file) for file in set(self.files.values())}
        for parameter in self.stored.values():
            name = self._stored_name(parameter.name)
            found, dtype = headers[self.files[name]][name]
            if found != parameter.shape:
                raise CheckpointError(
                    expected=f"tensor {name} of shape {list(parameter.shape)}, as config.json says",
                    came=f"its shape is {list(found)}",
                    todo="use the config.json that belongs to these weights",
                )
            if dtype not in _DTYPES:
                raise CheckpointError(
                    expected=f"tensor {name} in one of {', '.join(_DTYPES)}",
                    came=f"it is stored as {dtype}",
                    todo="start from the unquantised checkpoint",
                )
        self._refuse_unread(shape)

    def _refuse_unread(self, shape: AnyShape) -> None:
        """A weight that nothing reads means another architecture: the numbers would be wrong."""
        read = {self._stored_name(parameter.name) for parameter in self.stored.values()}
        for name in self.files:
            # Old checkpoints carry the frequencies; a tied head may be stored a second time.
            inner = name.removeprefix(self.prefix)
            known = name.endswith("rotary_emb.inv_freq") or inner.startswith(self.left_out)
            if name not in read and not known:
                raise CheckpointError(
                    expected=f"only weights that a {shape.family} of {shape.num_layers} layers has",
                    came=f"the checkpoint also holds {name}",
                    todo="use the config.json that belongs to these weights",
                )

    def read(self, name: str) -> torch.Tensor:
        """The parameter: a view of the mapped file in its dtype, or computed from it in fp32."""
        from safetensors import safe_open

        parameter = self.stored[name]
        stored = self._stored_name(parameter.name)
        with safe_open(self.files[stored], framework="pt") as file:
            tensor: torch.Tensor
            if parameter.rows is None:
                tensor = file.get_tensor(stored)
            else:
                tensor = file.get_slice(stored)[slice(*parameter.rows)]
        if parameter.offset or parameter.factor != 1:
            return (tensor.float() + parameter.offset) * parameter.factor
        return tensor

    def identity(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """File names, sizes and a fingerprint over config and headers (not over every weight)."""
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        files = sorted(set(self.files.values()))
        for file in files:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(size, 1 << 26)))
        return {
            "files": {f.name: f.stat().st_size for f in files},
            "fingerprint": digest.hexdigest(),
        }

    def _stored_name(self, name: str) -> str:
        for candidate in (f"{self.prefix}{name}", name):
            if candidate in self.files:
                return candidate
        raise CheckpointError(
            expected=f"a tensor {self.prefix}{name}, as config.json implies",
            came="no file of the checkpoint holds it",
            todo="download the missing shard or use the config.json of these weights",
        )


def _shard_path(directory: Path, shard: str) -> Path:
    if Path(shard).name != shard or shard in ("", ".", ".."):
        raise CheckpointError(
            expected="an index that names files beside it",
            came=f"it names '{shard}', which leads outside the checkpoint",
            todo="do not use this checkpoint before you know where it comes from",
        )
    path = directory / shard
    if not os.path.isfile(path):  # false, where Path.is_file raises, for a name no disk takes
        raise CheckpointError(
            expected=f"shard {shard}, which the index names, in {directory}",
            came="the file is missing",
            todo="download it",
        )
    return path


def _tensor_names(file: Path) -> list[str]:
    return list(_header(file))


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a safetensors file, checked against its length by the library."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            expected=f"{file} to be a whole safetensors file",
            came=f"it does not open ({error})",
            todo="download it again",
        ) from error


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuses a parameter with NaN or infinity, naming it.

    Raises:
        CheckpointError: some element is not finite.
    """
    import torch

    # aminmax carries NaN through and is far faster than isfinite on half precision.
    extremes = torch.stack(torch.aminmax(tensor))
    if not bool(extremes.isfinite().all()):
        raise CheckpointError(
            expected=f"finite weights in {name}",
            came="it holds NaN or infinity",
            todo="use an intact checkpoint, or a wider --dtype if the values overflow this one",
        )
