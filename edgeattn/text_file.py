"""Reads a text that a user names."""

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
