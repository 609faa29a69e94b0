"""Compiled kernels on disk, by everything the compiler was told."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgeattn.kernels.manifest import Record, Sha256, read_verified


class Compiled(Record):
    """What the cache knows of a cubin.

    Attributes:
        sha256: of the cubin.
        sm: that it is for, by its ELF header.
        entry: name of its function.
        shared: bytes of dynamic shared memory.
        warps: per block.
        scratch: bytes of global memory that it wants from the launcher.
        tensor_memory: columns.
        parameters: PTX types, hidden ones included.
    """

    sha256: Sha256
    sm: int
    entry: str
    shared: int
    warps: int
    scratch: int
    tensor_memory: int
    parameters: tuple[str, ...]


class CubinCache:
    """Cubins by their hash, and what is known of them by the task's.

    Each file is whole or absent and says what it must contain, so that processes can share it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> Compiled | None:
        """An earlier result whose cubin is there."""
        try:
            compiled = Compiled.model_validate_json((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        return compiled if self.cubin(compiled.sha256) is not None else None

    def cubin(self, sha256: str) -> bytes | None:
        """The bytes of a cubin, None where they are missing or changed."""
        return read_verified(self._folder / f"{sha256}.cubin", sha256)

    def save(self, key: str, outcome: Mapping[str, Any]) -> Compiled:
        """Keeps what a compiler answered."""
        facts = dict(outcome)
        cubin: bytes = facts.pop("cubin")
        sha256 = hashlib.sha256(cubin).hexdigest()
        compiled = Compiled(sha256=sha256, sm=sm_of(cubin), **facts)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / f"{sha256}.cubin", cubin)
        write_whole(self._folder / f"{key}.json", compiled.model_dump_json().encode())
        return compiled


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, whoever else writes it meanwhile."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}.draft")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def sm_of(cubin: bytes) -> int:
    """The SM in the flags of the ELF header, 0 for another file.

    They are not documented; as ptxas writes them: the low byte in ABI version 7 (up to SM 90), the
    one above in version 8 (from SM 100).
    """
    cuda = 190  # e_machine
    if cubin[:4] != b"\x7fELF" or int.from_bytes(cubin[18:20], "little") != cuda:
        return 0
    flags = int.from_bytes(cubin[48:52], "little")
    return (flags if cubin[8] < 8 else flags >> 8) & 0xFF
