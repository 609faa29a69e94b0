"""What starting the command line costs: CPU seconds of `edgeattn --help` as a whole process.

    python benchmarks/cli_startup.py [--runs 10]

And of what a shell starts when Tab is pressed behind `--target`. `python -c pass` is timed in turn
with them, so that what the interpreter itself costs can be told apart. Writes
benchmarks/results/cli_startup.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import Usage, run_process, summary, write_result

GOAL_S = 0.3


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    program, line = str(Path(sys.executable).with_name("edgeattn")), "edgeattn export m --target t"
    asked = [f"COMP_LINE={line}", f"COMP_POINT={len(line)}", "_EDGEATTN_COMPLETE=bash_complete"]
    commands = {
        "edgeattn --help": [program, "--help"],
        "completion of a target": ["env", *asked, program],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    usages: dict[str, list[Usage]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            usage = run_process(command)
            if run:  # the first round compiles bytecode and warms the disk
                usages[name].append(usage)
    results = {name: summary(values) for name, values in usages.items()}
    met = results["edgeattn --help"]["cpu_s"]["median"] < GOAL_S
    write_result(
        "cli_startup",
        {"results": results, "goal": {"edgeattn --help": {"cpu_s": GOAL_S}}, "goal_met": met},
    )


if __name__ == "__main__":
    main()
