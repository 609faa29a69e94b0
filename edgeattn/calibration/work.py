"""Unfinished work on disk: files that appear whole, in a folder that belongs to one command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.bundle.whole_file import PARTIAL, whole_file, write_text
from edgeattn.errors import UsageError

LOCK = "lock"
_KEY = "made-from.json"


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
    return any(file.name not in (LOCK, _KEY) and file.suffix != PARTIAL for file in files)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears whole or not at all.

    Raises:
        BundleError: the disk is full, or refuses for another reason.
    """
    with whole_file(path) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))


def save_state(
    path: Path, tensors: Mapping[str, Tensor], about: Any, made_from: Mapping[str, Any]
) -> None:
    """Writes a part of unfinished work that says what it was made from; see `read_state`.

    Args:
        path: the safetensors file.
        tensors: on the CPU.
        about: JSON-ready values beside them.
        made_from: JSON-ready values that say what the part depends on.

    Raises:
        BundleError: the disk is full, or refuses for another reason.
    """
    facts = {"about": about, "made_from": made_from}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    write_tensors(path, tensors, metadata)


def read_state(path: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors of a part and what is noted beside them; None where there is no file.

    Raises:
        UsageError: it was made from something else, or the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata["made_from"] != json.dumps(made_from, sort_keys=True):
                raise UsageError(
                    expected=f"the unfinished work in {path} to be of this command",
                    came="it was started with another model, recipe or text",
                    todo="delete the file, or run the command it was started with again",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata["about"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UsageError(
            expected=f"unfinished work in {path}",
            came=f"it does not read ({error})",
            todo="delete the file, and the same command starts from the beginning",
        ) from error
