"""Writing a bundle: into a hidden sibling, renamed when complete, so that it is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeattn.bundle.bundle import MANIFEST, hash_file
from edgeattn.bundle.manifest import FileRecord
from edgeattn.errors import BundleError

_LOCK = ".lock"
_UNFINISHED = ".edgeattn-unfinished"
_ASIDE = ".edgeattn-replaced"


@dataclass(frozen=True)
class Kind:
    """What is written this way.

    Attributes:
        name: what refusals call it.
        marker: the file that it is recognised by, so that nothing else is ever replaced.
    """

    name: str
    marker: str


BUNDLE = Kind("bundle", MANIFEST)


class BundleWriter:
    """The unfinished bundle, or another kind of folder.

    Attributes:
        path: the temporary directory to write files into.
    """

    def __init__(self, path: Path, final: Path, *, force: bool, kind: Kind = BUNDLE) -> None:
        self.path = path
        self._final = final
        self._force = force
        self._kind = kind
        self._known: dict[str, FileRecord] = {}

    def write(self, name: str, content: bytes | str) -> None:
        """Writes one small file of the bundle."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def note_hash(self, name: str, size: int, sha256: str) -> None:
        """Records the hash of a file that was computed while it was written."""
        self._known[name] = FileRecord(bytes=size, sha256=sha256)

    def files(self) -> dict[str, FileRecord]:
        """Size and hash of every file written so far, by path inside the bundle."""
        found = {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_file() and name not in (_LOCK, self._kind.marker):
                found[name] = self._known.get(name) or FileRecord(
                    bytes=file.stat().st_size, sha256=hash_file(file)
                )
        return found

    def commit(self) -> None:
        """Makes the bundle appear under its name.

        Raises:
            BundleError: something else appeared there meanwhile.
        """
        if self._force and self._final.exists():
            self._replace()
        else:
            self._appear()
        (self._final / _LOCK).unlink()

    def _appear(self) -> None:
        try:
            # Replaces an empty folder and nothing else: the system refuses any other.
            self.path.rename(self._final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            _check_place(self._final, self._kind, force=False)
            raise

    def _replace(self) -> None:
        _check_place(self._final, self._kind, force=True)
        old = _aside(self._final)
        try:
            self._final.rename(old)
            self.path.rename(self._final)
        except BaseException:
            if old.is_dir() and not self._final.exists():
                old.rename(self._final)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def open_writer(final: Path, *, force: bool = False, kind: Kind = BUNDLE) -> Iterator[BundleWriter]:
    """Opens a bundle for writing; whatever is not committed is removed.

    Leftovers of a killed run are recognised by their lock, which died with its process.

    Args:
        final: where the bundle shall appear.
        force: replace one of the same kind that is already there.
        kind: of what is written.

    Raises:
        BundleError: the place is in use, cannot be written, or the disk is full.
    """
    final = Path(os.path.abspath(final))
    if not final.name or final == Path.cwd():
        raise BundleError(
            expected=f"the name of a new folder to write a {kind.name} at",
            came=f"it is {final}",
            todo="choose another folder with -o",
        )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final, kind)
        _check_place(final, kind, force=force)
        path = final.with_name(f".{final.name}.{os.getpid()}{_UNFINISHED}")
        path.mkdir()
        lock = (path / _LOCK).open("w")
    except OSError as error:
        raise _disk_error(final, kind, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield BundleWriter(path, final, force=force, kind=kind)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise _disk_error(final, kind, error) from error
        raise
    finally:
        lock.close()
        shutil.rmtree(path, ignore_errors=True)


def _check_place(final: Path, kind: Kind, *, force: bool) -> None:
    if final.is_symlink():
        raise BundleError(
            expected=f"a free place at {final}",
            came="a link is there",
            todo="choose another folder with -o",
        )
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not (final / kind.marker).is_file():
        raise BundleError(
            expected=f"a free place at {final}",
            came=f"something that is no {kind.name} is there",
            todo="choose another folder with -o",
        )
    if not force:
        raise BundleError(
            expected=f"a free place at {final}",
            came=f"a {kind.name} is already there",
            todo="choose another folder with -o, or replace it with --force",
        )


def _aside(final: Path) -> Path:
    """Where a bundle waits while its replacement takes its name."""
    return final.with_name(f".{final.name}{_ASIDE}")


def _remove_leftovers(final: Path, kind: Kind) -> None:
    """Removes what a killed run left, and brings back a bundle it had moved aside.

    Only what is surely ours: by its name, and by the lock or the marker in it.
    """
    aside = _aside(final)
    if (aside / kind.marker).is_file():
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)
    pattern = re.compile(rf"\.{re.escape(final.name)}\.\d+{re.escape(_UNFINISHED)}")
    for leftover in final.parent.iterdir():
        if pattern.fullmatch(leftover.name) and (leftover / _LOCK).is_file():
            _remove_if_dead(leftover)


def _remove_if_dead(leftover: Path) -> None:
    try:
        with (leftover / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another export to the same place is still running
    shutil.rmtree(leftover, ignore_errors=True)


def _disk_error(final: Path, kind: Kind, error: OSError) -> BundleError:
    return BundleError(
        expected=f"to write a {kind.name} at {final}",
        came=f"the disk refused ({error.strerror or error})",
        todo="free some space or choose another folder with -o",
    )
