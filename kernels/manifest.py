"""manifest.json: which compiled kernels lie in a folder, and what a launcher must know of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeattn.errors import BundleError
from edgeattn.kernels.kernel import ArgumentType
from edgeattn.kernels.variants import Constant

MANIFEST = "manifest.json"
# Triton's default changes between its versions; it decides whether a * b + c is rounded once.
FP_FUSION = True

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Values that do not change, and nothing besides them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Cubin(Record):
    """One compiled variant.

    Attributes:
        kernel: "operator.kernel".
        dtype: of its "*T" pointers.
        constants: by name.
        sm: the only GPU it is certain to run on.
        file: its name, beside the manifest.
        entry: name of the function in it.
        shared: bytes of dynamic shared memory.
        warps: per block.
        arguments: names and types in order; two null pointers follow them.
        grid: blocks along x, y and z, as in `Kernel`.
        sizes: further integers of the grid.
        sha256: of the file.
    """

    kernel: str
    dtype: str
    constants: dict[str, Constant]
    sm: int
    file: str = Field(pattern=r"^\w[\w.-]*\.cubin$")
    entry: str
    shared: int
    warps: int
    arguments: tuple[tuple[str, ArgumentType], ...]
    grid: tuple[str, str, str]
    sizes: tuple[str, ...]
    sha256: Sha256


class Manifest(Record):
    """manifest.json: all compiled variants, ordered by kernel, dtype, constants and SM.

    Attributes:
        version: of this record.
        triton: version of the compiler.
        fp_fusion: whether a * b + c may be rounded once.
        kernels_sha256: of all that `cubins` say; changes with any kernel.
        cubins: the variants.
    """

    version: Literal[1]
    triton: str
    fp_fusion: bool
    kernels_sha256: Sha256
    cubins: tuple[Cubin, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        if self.kernels_sha256 != _hash_of(self.cubins):
            raise ValueError("kernels_sha256 is not that of the cubins")
        if len({cubin.file for cubin in self.cubins}) < len(self.cubins):
            raise ValueError("two cubins have one file")
        return self

    def to_json(self) -> str:
        """Readable JSON, the same text for the same manifest."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def make_manifest(cubins: Iterable[Cubin], triton_version: str) -> Manifest:
    """The manifest of cubins, which are already in order."""
    cubins = tuple(cubins)
    return Manifest(
        version=1,
        triton=triton_version,
        fp_fusion=FP_FUSION,
        kernels_sha256=_hash_of(cubins),
        cubins=cubins,
    )


def read(folder: Path) -> Manifest:
    """The manifest in a folder, all of whose cubins are there.

    Raises:
        BundleError: the manifest or a cubin is missing or damaged.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "it"
        raise _damaged(folder, f"in {MANIFEST}, {field} is wrong: {first['msg']}") from error
    for cubin in manifest.cubins:
        if read_verified(folder / cubin.file, cubin.sha256) is None:
            raise _damaged(folder, f"{cubin.file} is missing or changed")
    return manifest


def _damaged(folder: Path, problem: str) -> BundleError:
    return BundleError(
        expected=f"compiled kernels in {folder}", came=problem, todo="compile them again"
    )


def _hash_of(cubins: Sequence[Cubin]) -> str:
    content = [cubin.model_dump(mode="json") for cubin in cubins]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_verified(file: Path, sha256: str) -> bytes | None:
    """The content of a file that has this hash, None of one that is missing or changed."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None
