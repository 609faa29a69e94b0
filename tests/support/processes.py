"""What tests ask of processes that they started, and how they wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(done: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def wait_for_pid(file: Path) -> int:
    """What a process wrote there when it had started."""
    wait_until(lambda: file.is_file() and file.read_text())
    return int(file.read_text())


def is_alive(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
