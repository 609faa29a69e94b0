"""The folder of a bundle's engines, which one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgeattn.engine.record import Engine
from edgeattn.errors import BundleError

# What a killed process leaves is recognised by this name.
BUILDING = ".building-"
_LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """The folder of engines for this process alone, without what a killed one left.

    Raises:
        BundleError: another build is at work there, or the folder cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        if not _is_ours(lock):
            raise BundleError(
                expected=f"{folder} for this build alone",
                came="another one is at work there",
                todo="wait until it is done",
            )
        for leftover in folder.glob(f"{BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield folder
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def _is_ours(lock: IO[str]) -> bool:
    """Whether the lock is taken by us; the file of one that has just ended is no lock any more."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _unwritable(folder: Path, error: OSError) -> BundleError:
    return BundleError(
        expected=f"to write an engine into {folder}",
        came=f"the system says: {error.strerror}",
        todo="free some space if the disk is full, or copy the bundle to where you may write",
    )


def place(engine: Engine, draft: Path) -> None:
    """Puts an engine and its record in their places.

    Without its record an engine is nothing, so the old one's goes first and the new one comes last;
    it is written before, so that a full disk leaves what was there.

    Args:
        engine: what it shall be.
        draft: the file, on the same disk.

    Raises:
        BundleError: the disk is full, or refuses for another reason.
    """
    record_file = engine.path.with_name(f"{engine.path.name}.json")
    written = draft.with_name(f"{draft.name}.record")
    try:
        written.write_text(engine.record.to_json(), encoding="utf-8")
        record_file.unlink(missing_ok=True)
        engine.selftest_file.unlink(missing_ok=True)
        draft.replace(engine.path)
        written.replace(record_file)
    except OSError as error:
        raise _unwritable(engine.path.parent, error) from error
