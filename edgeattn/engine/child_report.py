"""What a child process tells its parent: facts in a file, progress on standard output."""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import signal
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class Result:
    """What is known so far, kept in a file that the parent reads also when this process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = {"stage": "starting", "errors": [], "warnings": 0}

    def write(self, **facts: Any) -> None:
        """Adds facts and makes them visible to the parent at once."""
        self.facts.update(facts, peak_rss_mb=_peak_rss_mb())
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.facts), encoding="utf-8")
        draft.replace(self._path)


def tell(stage: str, done: int, total: int) -> None:
    """Reports progress, as one line of JSON."""
    # the parent may be gone
    with contextlib.suppress(OSError):
        print(json.dumps([stage, done, total]), flush=True)


def die_with_parent() -> None:
    """Asks the kernel to end this process with its parent, which may be killed and not stop it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _peak_rss_mb() -> float:
    # ru_maxrss starts at the parent's peak after fork and exec; VmHWM belongs to this process alone
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
