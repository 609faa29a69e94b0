"""Shared by the benchmarks: whole-process figures, the machine, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Usage:
    """What one process and its children used.

    Attributes:
        wall_s: seconds from start to end.
        cpu_s: user plus system seconds.
        peak_rss_mb: largest resident set of a single process, in MB of 1e6 bytes.
    """

    wall_s: float
    cpu_s: float
    peak_rss_mb: float


def run_process(command: Sequence[str], env: Mapping[str, str] | None = None) -> Usage:
    """Runs a command, its output thrown away, and asks the kernel what it used."""
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    os.sync()  # what an earlier run wrote is on the disk before this one starts
    start = time.perf_counter()
    process = os.posix_spawnp(command[0], command, {**os.environ, **(env or {})}, file_actions=null)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - start
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def summary(usages: Sequence[Usage]) -> dict[str, Any]:
    """Median, smallest and largest of each figure."""
    found: dict[str, Any] = {"runs": len(usages)}
    for field in ("wall_s", "cpu_s", "peak_rss_mb"):
        values = [getattr(u, field) for u in usages]
        found[field] = {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }
    return found


def device_seconds(run: Callable[[], object], repetitions: int = 50) -> float:
    """Median over repetitions on a GPU, the caches of the device emptied before each."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repetitions + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[5:])


def machine() -> dict[str, object]:
    """What the figures depend on."""
    cpu = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def write_result(name: str, content: Mapping[str, Any]) -> None:
    """Writes benchmarks/results/NAME.json and prints where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = {"benchmark": name, "date": date.today().isoformat(), "machine": machine()}
    path.write_text(json.dumps({**head, **content}, indent=2) + "\n")
    print(f"wrote {path}")
