"""manifest.json: what a bundle is, what it was made from, and the hash of each file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
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


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """A file of the bundle.

    Attributes:
        bytes: its size.
        sha256: of its content.
    """

    bytes: int = Field(ge=0)
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
    sm: int | None
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

    schema_version: int
    tools: dict[str, str]
    source: dict[str, Any]
    recipe: dict[str, Any]
    lowering: dict[str, Any]
    shape: dict[str, Any]
    target: TargetRecord
    plugin_abi: int | None
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


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Reads manifest.json.

    Args:
        text: its content.
        where: named in errors.

    Raises:
        BundleError: no JSON, a newer schema, or fields that do not fit.
    """
    try:
        version = json.loads(text).get("schema_version")
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
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(
            expected=f"a valid field '{field}' in {where}",
            came=first["msg"].removeprefix("Value error, ").rstrip("."),
            todo="export the bundle again",
        ) from error
