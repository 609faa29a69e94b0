"""manifest.json: what a bundle is, what it was made from, and the hash of each file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edgeattn import __version__
from edgeattn.errors import BundleError

SCHEMA_VERSION = 1
# Distributions whose versions decide what an export contains.
_TOOLS = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "gguf",
    "safetensors",
    "tokenizers",
    "onnxruntime",
    "tensorrt-rtx-cu13",
)


def _plain_path(name: str) -> str:
    """A relative path inside the bundle, in canonical form."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise ValueError(f"'{name}' leads outside the bundle")
    if "\\" in name or ":" in name or "\0" in name:
        raise ValueError(f"'{name}' is no plain file name")
    return name


# What C++ counts with.
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """A file of the bundle.

    Attributes:
        bytes: its size.
        sha256: of its content.
    """

    bytes: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TargetRecord(_Record):
    """The tuple a bundle was made for.

    Attributes:
        name: canonical NAME@SOFTWARE.
        flavour: engine that runs it.
        sm: compute capability as 87, None for a CPU.
        software_version: version of TensorRT or ONNX Runtime.
    """

    name: str
    flavour: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    sm: _Integer | None
    software_version: str | None


class VerificationRecord(_Record):
    """Whether and how the bundle was proven when it was written.

    Attributes:
        status: "passed", or "skipped" when the user asked for `--no-verify`.
        backends: implementations that were compared.
        tensorrt: outcome of the TensorRT-RTX parse and build check.
    """

    status: Literal["passed", "skipped"]
    backends: tuple[str, ...]
    tensorrt: Literal["built", "not checked", "not applicable"]


class Manifest(_Record):
    """The whole manifest.

    Attributes:
        schema_version: of this record; a newer one is refused.
        tools: versions of edgeattn and of the libraries that wrote the bundle.
        source: identity of the checkpoint.
        recipe: what was asked for.
        lowering: what was decided.
        shape: architecture of the model.
        target: what it was made for.
        plugin_abi: ABI number of the plugin library, None without one.
        verification: proof at export.
        quality: perplexity, KL and agreement on a text, where one was given.
        files: every file that must be there, by path inside the bundle.
    """

    schema_version: _Integer
    tools: dict[str, str]
    source: dict[str, Any]
    recipe: dict[str, Any]
    lowering: dict[str, Any]
    shape: dict[str, Any]
    target: TargetRecord
    plugin_abi: _Integer | None
    verification: VerificationRecord
    quality: dict[str, Any] | None = None
    files: dict[Annotated[str, AfterValidator(_plain_path)], FileRecord]

    def to_json(self) -> str:
        """Readable JSON, keys in the order of this class."""
        return self.model_dump_json(indent=2) + "\n"


def tool_versions() -> dict[str, str]:
    """Versions of edgeattn and of the installed libraries that write a bundle."""
    versions = {"edgeattn": __version__}
    for name in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _strict_json(text: str | bytes) -> Any:
    """JSON that C++ reads as well: UTF-8, and every number within fp64."""
    text = text.decode() if isinstance(text, bytes) else text
    return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is beyond fp64")
    return value


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Reads manifest.json.

    Args:
        text: its content.
        where: named in errors.

    Raises:
        BundleError: no JSON, a newer schema, or fields that do not fit.
    """
    try:
        value = _strict_json(text)
        version = value.get("schema_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(
            expected=f"{where} to hold a JSON object",
            came="it does not parse",
            todo="export the bundle again",
        ) from error
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            expected=f"a manifest of schema version {SCHEMA_VERSION} or older",
            came=f"{where} has version {version}",
            todo="upgrade edgeattn",
        )
    try:
        # Not the text: of a field that stands there twice only the last was looked at.
        return Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(
            expected=f"a valid field '{field}' in {where}",
            came=first["msg"].removeprefix("Value error, ").rstrip("."),
            todo="export the bundle again",
        ) from error
