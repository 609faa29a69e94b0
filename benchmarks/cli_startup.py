"""What starting the command line costs: CPU seconds of `edgeattn --help` as a whole process.

Run with the Python of the environment that edgeattn is installed in:
    python benchmarks/cli_startup.py [--runs 10]
Writes benchmarks/results/cli_startup.json. `python -c pass` is timed in turn with it, so that what
the interpreter itself costs can be told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

GOAL_S = 0.3
RESULT = Path(__file__).resolve().parent / "results" / "cli_startup.json"


def cpu_seconds(command: list[str]) -> float:
    """User plus system time of one run of `command`, its output thrown away."""
    null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[null])
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{command} failed with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    commands = {
        "edgeattn --help": [str(Path(sys.executable).parent / "edgeattn"), "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    for command in commands.values():
        cpu_seconds(command)  # compiles the bytecode and warms the disk cache
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    report = {
        "benchmark": "cli_startup",
        "date": date.today().isoformat(),
        "machine": machine(),
        "runs": runs,
        "unit": "CPU seconds (user + system), median",
        "median": medians,
        "all": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "goal": {"edgeattn --help": GOAL_S},
        "goal_met": medians["edgeattn --help"] < GOAL_S,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({"median": medians, "goal_met": report["goal_met"]}))


if __name__ == "__main__":
    main()
