"""The files of tests that run in Triton's interpreter, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "kernels" / "interpreted"
FILES = sorted(file for file in FOLDER.glob("*.py") if file.stem != "conftest")
