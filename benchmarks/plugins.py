"""What the plugin library of a Jetson costs to build, with no GPU and no Jetson.

    python benchmarks/plugins.py

Runs `edgeattn plugins build --arch aarch64 --sm 87,110` with an empty cache, and again with the
cache that left. Needs edgeattn[plugins] and TensorRT's headers (EDGEATTN_TENSORRT_INCLUDE). zig
builds its C++ runtime the first time it runs; its own cache is emptied as well. CPU seconds are
those of all processes that ended. Writes benchmarks/results/plugins.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import run_process, write_result

from edgeattn.engine.plugins import LIBRARY, read_library

ARCH, SMS = "aarch64", "87,110"
GOALS = {"cold_s": 360.0, "warm_s": 20.0, "library_mb": 16.0}


def build(cache: Path, output: Path) -> dict[str, float]:
    """One run of the command in a process of its own."""
    command = [str(Path(sys.executable).with_name("edgeattn")), "plugins", "build"]
    command += ["--arch", ARCH, "--sm", SMS, "-o", str(output)]
    environment = {"XDG_CACHE_HOME": str(cache), "ZIG_GLOBAL_CACHE_DIR": str(cache / "zig")}
    usage = run_process(command, env=environment)
    return {"wall_s": round(usage.wall_s, 1), "cpu_s": round(usage.cpu_s, 1)}


def main() -> None:
    """Builds twice and writes the result."""
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as name:
        folder = Path(name)
        cold = build(folder / "cache", folder / "first")
        warm = build(folder / "cache", folder / "second")
        library = read_library(folder / "second" / ARCH / LIBRARY)
        size = round(library.path.stat().st_size / 1e6, 2)
        facts: dict[str, Any] = {
            "arch": library.arch,
            "sms": list(library.sms),
            "variants": len(library.variants),
            "triton": library.triton,
            "tensorrt_headers": library.tensorrt_headers,
        }
    found = {"cold_s": cold["wall_s"], "warm_s": warm["wall_s"], "library_mb": size}
    missed = [figure for figure, goal in GOALS.items() if found[figure] > goal]
    print(json.dumps(found))
    runs = {"empty cache": cold, "warm cache": warm}
    content = {"library": facts, "results": {**found, "runs": runs}}
    write_result("plugins", {**content, "goals": GOALS, "missed": missed})
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
