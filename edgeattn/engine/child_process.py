"""Runs TensorRT in a process of its own, which may abort or exhaust memory; the caller may not."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgeattn.engine.flavours import Flavour, import_paths

# Called with what TensorRT is doing, steps done and steps in all.
PhaseProgress = Callable[[str, int, int], None]

_CHILD_MODULE = "edgeattn.engine.child"
_STDERR_LINES = 3


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        facts: what it wrote down until then.
        exit_detail: how it died, empty where it did not.
        stderr: what it and the libraries in it said.
    """

    facts: Mapping[str, Any]
    exit_detail: str
    stderr: str


def run_child(
    flavour: Flavour,
    request: Mapping[str, Any],
    *,
    timeout_s: float,
    module: str | None = None,
    progress: PhaseProgress | None = None,
) -> Outcome:
    """Gives a request to a child and waits for its end; Ctrl-C ends the child, too.

    Args:
        flavour: which TensorRT the child loads.
        request: see the module.
        timeout_s: seconds after which it is killed.
        module: that the child runs; None for `edgeattn.engine.child`, which builds.
        progress: called as TensorRT gets on.
    """
    with tempfile.TemporaryDirectory(prefix="edgeattn-engine-") as name:
        folder = Path(name)
        result = folder / "result.json"
        whole = {
            **request,
            "bindings": flavour.bindings,
            "import_paths": import_paths(),
            "result": str(result),
        }
        command = [sys.executable, "-m", module or _CHILD_MODULE]
        environment = flavour.environment(folder)
        said = json.dumps(whole)
        exit_detail, stderr = _run(command, environment, said, folder, timeout_s, progress)
        return Outcome(_read_result(result), exit_detail, stderr)


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    request: str,
    folder: Path,
    timeout_s: float,
    progress: PhaseProgress | None,
) -> tuple[str, str]:
    """Runs the child to its end; how it died, empty when it did not, and its standard error."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # `-m` puts the working directory on the child's import path: let it be an empty one
        cwd=folder,
        env=environment,
    ) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        said: list[str] = []
        readers = [
            threading.Thread(target=_read_phases, args=(child.stdout, progress), daemon=True),
            threading.Thread(target=said.extend, args=(child.stderr,), daemon=True),
        ]
        try:
            for reader in readers:
                reader.start()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
                child.stdin.close()
            child.wait(timeout_s)
            for reader in readers:
                reader.join()
        except subprocess.TimeoutExpired:
            child.kill()
            return f"no result after {timeout_s:g} s, killed", ""
        except BaseException:
            # Ctrl-C above all: nothing may go on building for a caller who left
            child.kill()
            raise
    stderr = "".join(said)
    if child.returncode == 0:
        return "", stderr
    tail = " | ".join(stderr.strip().splitlines()[-_STDERR_LINES:])
    return _exit_words(child.returncode) + (f": {tail}" if tail else ""), stderr


def _read_phases(stdout: IO[str], progress: PhaseProgress | None) -> None:
    """Hands on what the child reports; anything else on its standard output is not ours."""
    for line in stdout:
        if progress is None:
            continue
        with contextlib.suppress(ValueError, TypeError):
            phase, done, total = json.loads(line)
            progress(str(phase), int(done), int(total))


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        # nobody but the kernel's memory guard sends it to a child of ours that did not time out
        return f"died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"died of signal {-code}"


def _read_result(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # the child died before its first word
        facts = {"stage": "starting"}
    return facts
