"""What the light install weighs, package by package, and how long the runtime takes to import.

    python benchmarks/install_size.py

A wheel of this tree is built and installed with the extra `ort` into a fresh environment, as on a
device that runs bundles with ONNX Runtime. A package's size is that of the files its own record
lists, with the bytecode that pip compiles. The import is of a whole process, in turn with `python
-c pass`. Writes benchmarks/results/install_size.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from measure import Usage, run_process, summary, write_result

REPOSITORY = Path(__file__).resolve().parent.parent
GOAL_MB, GOAL_S = 260, 1.0
RUNS = 5
IMPORT, NOTHING = "import edgeattn.runtime", "pass"
# Run inside the environment: which packages there are and what their files weigh.
SIZES = """
import json
from importlib.metadata import distributions

sizes = {}
for one in distributions():
    files = {file.locate().resolve() for file in one.files or ()}
    sizes[one.metadata["Name"].lower()] = sum(f.stat().st_size for f in files if f.is_file())
print(json.dumps(sizes))
"""


def install(folder: Path) -> Path:
    """The Python of an environment with the wheel and nothing that it does not need."""
    wheels = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, REPOSITORY], check=True)
    (wheel,) = wheels.glob("edgeattn-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", f"{wheel}[ort]"], check=True)
    return python


def main() -> None:
    """Measures and writes the result."""
    with tempfile.TemporaryDirectory() as folder:
        python = install(Path(folder))
        done = subprocess.run([python, "-c", SIZES], capture_output=True, text=True, check=True)
        bytes_of: dict[str, int] = json.loads(done.stdout)
        usages: dict[str, list[Usage]] = {IMPORT: [], NOTHING: []}
        for run in range(RUNS + 1):
            for code, found in usages.items():
                usage = run_process([str(python), "-c", code])
                if run:  # the first warms the disk
                    found.append(usage)
    packages = dict(sorted(bytes_of.items(), key=lambda item: -item[1]))
    total = sum(packages.values()) / 1e6
    imports = {code: summary(found) for code, found in usages.items()}
    seconds = imports[IMPORT]["wall_s"]["median"]
    results = {
        "total_mb": round(total, 1),
        "packages_mb": {name: round(size / 1e6, 2) for name, size in packages.items()},
        "imports": imports,
    }
    goal = {"total_mb": GOAL_MB, IMPORT: {"wall_s": GOAL_S}}
    met = total <= GOAL_MB and seconds < GOAL_S
    write_result("install_size", {"results": results, "goal": goal, "goal_met": met})


if __name__ == "__main__":
    main()
