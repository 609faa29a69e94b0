"""Unfinished work on disk: files that appear whole, in a folder that belongs to one command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.errors import BundleError, UsageError

LOCK = "lock"
_KEY = "made-from.json"
_PARTIAL = ".partial"


class WorkFolder:
    """Where finished parts wait for the rest.

    The folder says what its parts were made from as soon as it holds one; until then it is free for
    any command.

    Args:
        path: the folder; need not exist.
        made_from: JSON-ready values that say what the parts depend on: checkpoint, scheme, text.

    Raises:
        UsageError: the folder holds parts made from something else.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]) -> None:
        self.path, self._key = path, path / _KEY
        self._made_from = json.dumps(made_from, sort_keys=True, indent=1)
        if self._key.exists() and not self._is_ours() and has_parts(path):
            raise UsageError(
                expected=f"the unfinished work in {path} to be of this command",
                came="it was started with another model, recipe or calibration text",
                todo="delete the folder, or run the command it was started with again",
            )

    def begin(self) -> None:
        """Makes the folder, for a part that is about to be written."""
        if not self._is_ours():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self._key, self._made_from)

    def _is_ours(self) -> bool:
        return self._key.exists() and self._key.read_bytes() == self._made_from.encode()


def has_parts(folder: Path) -> bool:
    """Whether a folder of unfinished work holds something that took long to make."""
    files = (file for file in folder.rglob("[!.]*") if file.is_file())
    return any(file.name not in (LOCK, _KEY) and file.suffix != _PARTIAL for file in files)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears whole or not at all.

    Raises:
        BundleError: the disk is full, or refuses for another reason.
    """
    with _whole(path) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))


def write_text(path: Path, text: str) -> None:
    """Writes a text file likewise."""
    with _whole(path) as partial:
        partial.write_text(text, "utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file likewise."""
    with _whole(path) as partial:
        partial.write_bytes(content)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` at the end, or is removed when that fails."""
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(
            expected=f"to write {path}",
            came=f"the disk refused ({getattr(error, 'strerror', None) or error})",
            todo="free some space or choose another folder with -o",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
