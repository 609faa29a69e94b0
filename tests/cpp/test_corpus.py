"""The corpus of tests/fuzz in C++: read where Python reads it, else refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_folder import ENGINE, RECORD, write_folder

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.record import read_engine
from edgeattn.errors import EdgeattnError

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())


def accepts(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except EdgeattnError:
        return False
    return True


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A bundle for each file, which is its manifest and the record of its engine."""
    root = tmp_path_factory.mktemp("corpus")
    for file in CORPUS:
        folder = root / file.stem
        folder.mkdir()
        write_folder(folder)
        (folder / "manifest.json").write_bytes(file.read_bytes())
        (folder / RECORD).write_bytes(file.read_bytes())
    return [root / file.stem for file in CORPUS]


def verdicts(runtime: Any, command: str, paths: list[Path]) -> list[str]:
    """Empty where it is read; the process must not have tripped a sanitizer."""
    lines = "".join(f"{path}\n" for path in paths)
    return str(runtime.drive(command, lines.encode()).decode("utf-8", "replace")).splitlines()


def test_manifests_are_read_as_python_reads_them(runtime: Any, folders: list[Path]) -> None:
    found = verdicts(runtime, "open", folders)
    for folder, verdict in zip(folders, found, strict=True):
        assert accepts(Bundle.open, folder) == (verdict == ""), (folder.name, verdict)
        assert verdict == "" or verdict.startswith("expected ")


def test_records_that_cpp_refuses_python_refuses(runtime: Any, folders: list[Path]) -> None:
    """C++ looks only at what decides where an engine runs, so it reads some that Python refuses."""
    found = verdicts(runtime, "record", [folder / ENGINE for folder in folders])
    for folder, verdict in zip(folders, found, strict=True):
        assert verdict == "" or not accepts(read_engine, folder / ENGINE), folder.name
    assert "" in found
    assert len(set(found)) > 10  # not refused for one and the same reason
