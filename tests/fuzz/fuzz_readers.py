"""Atheris's target: any bytes as the manifest of a bundle and as the record of an engine.

Run as a script, with libFuzzer's options; `test_fuzzing.py` does.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgeattn", "json"]):
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.bundle.manifest import parse_manifest
    from edgeattn.engine.record import read_engine
    from edgeattn.errors import EdgeattnError
from bundle_folder import ENGINE, RECORD, write_folder


def reads(read: Callable[[], object]) -> None:
    """A refusal is an EdgeattnError; whatever else is raised ends the process."""
    with contextlib.suppress(EdgeattnError):
        read()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edgeattn-fuzz-") as name:
        root = Path(name)
        write_folder(root)

        def target(content: bytes) -> None:
            (root / "manifest.json").write_bytes(content)
            (root / RECORD).write_bytes(content)
            reads(lambda: parse_manifest(content, "manifest.json"))
            reads(lambda: Bundle.open(root).any_shape)
            reads(lambda: read_engine(root / ENGINE))

        atheris.Setup(sys.argv, target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
