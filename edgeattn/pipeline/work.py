"""Where finished layers wait for the rest, so that stopped work goes on."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeattn.errors import BundleError


def work_folder(output: Path) -> Path:
    """The folder beside what is being made; gone once that is there."""
    place = Path(os.path.abspath(output))
    return place.with_name(f".{place.name}.layers")


@contextmanager
def open_work(output: Path, *, needed: bool) -> Iterator[Path]:
    """The work folder for one run, which alone may use it.

    Work that does not need it leaves it alone, whosever it is; see `own_work`.

    Raises:
        BundleError: another run is at work there.
    """
    if not needed:
        yield work_folder(output)
        return
    with own_work(output) as folder:
        yield folder


@contextmanager
def own_work(output: Path) -> Iterator[Path]:
    """The work folder, for this run alone.

    It goes with the end of the block. Where that fails the folder stays, if anything is finished,
    and the error gets a note that says so.

    Raises:
        BundleError: another run is at work there, or the folder cannot be made.
    """
    from edgeattn.calibration.work import LOCK, has_parts

    folder = work_folder(output)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BundleError(
            expected=f"a folder {folder.parent} to write in",
            came=f"the disk refused ({error.strerror})",
            todo="choose another place with -o",
        ) from error
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(
                expected=f"{folder} for this run alone",
                came="another run with the same output is at work there",
                todo="wait for it, or choose another folder with -o",
            ) from error
        try:
            yield folder
        except BaseException as error:
            if has_parts(folder):
                error.add_note(
                    f"what was finished waits in {folder}: the same command goes on from there"
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def require_output(path: Path, *, force: bool) -> None:
    """Refuses a file to write that would be lost, or cannot be made, before any work.

    Raises:
        BundleError: it is there, or a folder is, or the folder for it is not.
    """
    if path.is_dir():
        raise BundleError(
            expected=f"a file to write at {path}", came="a folder is there", todo="choose another"
        )
    if not Path(os.path.abspath(path)).parent.is_dir():
        raise BundleError(
            expected=f"a folder for {path}", came="there is none", todo="make it first"
        )
    if path.exists() and not force:
        raise BundleError(
            expected=f"no file at {path}",
            came="there is one",
            todo="pass --force to replace it, or choose another with -o",
        )
