"""Where compiled kernels and plugin libraries are kept, and which library is of which sources."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.engine.plugins import LIBRARY, PluginLibrary, read_library
from edgeattn.errors import BundleError

if TYPE_CHECKING:
    from importlib.abc import Traversable

# All that a library is made of, or by; what their folders hold besides is no source.
_SOURCES = ("kernels", "ops", "plugins", "engine")
_NO_SOURCES = ("__pycache__", "build")


def cache_folder() -> Path:
    """The cache of this user, as the XDG specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edgeattn")


@dataclass(frozen=True)
class LibraryRequest:
    """What is asked of a library.

    Attributes:
        arch: "x86_64" or "aarch64".
        sms: GPUs to have kernels for.
        ops: operators to have plugins for; None for all.
        subset: of the table of variants; None for all of it.
    """

    arch: str
    sms: tuple[int, ...]
    ops: tuple[str, ...] | None = None
    subset: str | None = None

    def folder(self) -> Path:
        """Where the library of this edgeattn's sources, as they are now, is kept."""
        sources = {
            f"{package}/{name}": hashlib.sha256(content).hexdigest()
            for package in _SOURCES
            for name, content in _contents(files(f"edgeattn.{package}"))
        }
        ops = None if self.ops is None else sorted(set(self.ops))
        facts = {"sms": sorted(set(self.sms)), "ops": ops, "subset": self.subset}
        return cache_folder() / "libraries" / hashed(self.arch, {**facts, "sources": sources})


def finished_library(request: LibraryRequest) -> PluginLibrary | None:
    """What was built of these very sources before; needs no tool.

    Returns:
        None where it was not built, cannot be read, or is of another Triton than is installed.
    """
    try:
        library = read_library(request.folder() / request.arch / LIBRARY)
    except BundleError:
        return None
    if find_spec("triton") is not None and version("triton") != library.triton:
        return None
    return library


@contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """The folder, made where it does not exist, when no other process works there any more."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def hashed(arch: str, facts: Mapping[str, Any]) -> str:
    """A folder's name by what it is for, JSON-ready."""
    text = json.dumps(facts, sort_keys=True)
    return f"{arch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _contents(folder: Traversable) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a folder and those below."""
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name in _NO_SOURCES:
            continue
        if entry.is_file():
            yield entry.name, entry.read_bytes()
        else:
            yield from ((f"{entry.name}/{name}", content) for name, content in _contents(entry))
