"""The program session_driver: a C++ session that answers lines of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CppSession:
    """One process; as a context manager it ends the process, which must have leaked nothing.

    Args:
        build: folder of the sanitized build.
        environment: of the process.
    """

    def __init__(self, build: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [build / "session_driver"],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> CppSession:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _, errors = self._process.communicate()
        if kind is None:
            assert (self._process.returncode, errors) == (0, "")

    def ask(self, do: str, **asked: Any) -> dict[str, Any]:
        """The answer, whether it is a refusal or not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:  # it is dead: what it says is what the test needs to show
            raise AssertionError(self._process.communicate()[1][-4000:])
        return dict(json.loads(line))

    def get(self, do: str, **asked: Any) -> dict[str, Any]:
        """The answer, which must not be a refusal."""
        found = self.ask(do, **asked)
        assert "error" not in found, found
        return found
