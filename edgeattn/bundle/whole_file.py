"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from edgeattn.errors import BundleError

PARTIAL = ".partial"


def write_text(path: Path, text: str) -> None:
    """Writes a text file; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` at the end, or is removed when that fails.

    Raises:
        BundleError: the disk is full, or refuses for another reason.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
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
