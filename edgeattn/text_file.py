"""Reads texts that a user names."""

from __future__ import annotations

from pathlib import Path

from edgeattn.errors import RuntimeInputError


def read_text_file(file: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        RuntimeInputError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise RuntimeInputError(
            expected=f"a text at {file}",
            came=f"it cannot be read ({error.strerror})",
            todo="check the path",
        ) from error
    except UnicodeDecodeError as error:
        raise RuntimeInputError(
            expected=f"UTF-8 in {file}",
            came=f"byte {error.start} does not fit",
            todo="convert the text to UTF-8",
        ) from error


def read_text(path: Path) -> str:
    """A UTF-8 text file, or a folder whose *.txt files, sorted by name, are joined by newlines.

    Raises:
        RuntimeInputError: nothing is there, it cannot be read, is no UTF-8, or is empty.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise RuntimeInputError(
                expected=f"*.txt files in {path}",
                came="the folder has none",
                todo="put texts there or pass a file",
            )
    text = "\n".join(read_text_file(file) for file in files)
    if not text.strip():
        raise RuntimeInputError(
            expected=f"a text in {path}", came="it is empty", todo="pass a text of some pages"
        )
    return text
