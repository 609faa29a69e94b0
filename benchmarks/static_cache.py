"""The static KV cache in ONNX Runtime: memory over 512 decode steps, time of a step by capacity.

    python benchmarks/static_cache.py [--threads 2]

SmolLM2-135M (see export.py) in fp32 for a CPU, once with a growing cache, which there is
GroupQueryAttention's buffer, and once with `--kv-cache static`. Each figure comes from a process of
its own, which opens the bundle with `edgeattn.runtime.Session` and decodes token by token. "Whole"
is a static cache that has its full capacity from the first token on, as an engine has it; "buckets"
is what the runtime does, which takes slots as a text needs them. Times are the best of three
processes' medians, as the machine is shared.
Writes benchmarks/results/static_cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from export import MODEL, smollm2_fp16
from measure import write_result

BUNDLES = {kind: MODEL.parent / f"SmolLM2-135M-cpu-{kind}" for kind in ("growing", "static")}
STEPS, WARM = 512, 8
CAPACITIES = (512, 1024, 2048, 4096, 8192)
PROMPTS = (64, 480)
TIMED, REPEATS = 24, 3
# Pages of the process itself come and go; the cache of 512 tokens takes 47 MB.
GOAL = {"resident memory grows by at most (MB)": 1.0}


def prepare() -> None:
    """Writes both bundles by child processes, unless they are there."""
    model = str(smollm2_fp16())
    for kind, place in BUNDLES.items():
        if not (place / "manifest.json").exists():
            edgeattn = [str(Path(sys.executable).with_name("edgeattn")), "export", model]
            options = ["--target", "cpu", "--kv-cache", kind, "--no-verify", "-o", str(place)]
            subprocess.run([*edgeattn, *options], check=True, stdout=subprocess.DEVNULL)


def resident_mb() -> float:
    """Resident memory of this process that belongs to no file, in MB of 1e6 bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024 / 1e6


def open_session(kind: str, bucket: int, threads: int) -> Any:
    """A session on a bundle whose static cache grows by `bucket` slots (0: as it does)."""
    from edgeattn.runtime import Session, in_place

    if bucket:
        in_place._BUCKET = bucket
    return Session.open(BUNDLES[kind], threads=threads, check_hashes=False)


def memory(kind: str, bucket: int, threads: int) -> dict[str, Any]:
    """Cache and resident memory at the first steps and the most over all that follow."""
    session = open_session(kind, bucket, threads)
    ids = np.random.default_rng(0).integers(5, 40000, (1, STEPS))
    state, resident, cache = None, [], []
    for place in range(STEPS):
        state = session.run(ids[:, place : place + 1], state).state
        if place >= WARM:
            resident.append(resident_mb())
            cache.append(session.cache_bytes(state) / 1e6)
    return {
        "cache_mb": {"first": round(cache[0], 2), "last": round(cache[-1], 2)},
        "resident_mb": {"first": round(resident[0], 1), "most": round(max(resident), 1)},
        "growth_mb": round(max(resident) - resident[0], 2),
    }


def step_ms(kind: str, bucket: int, threads: int) -> dict[str, float]:
    """Median milliseconds of a decode step after prompts of several lengths."""
    session = open_session(kind, bucket, threads)
    ids = np.random.default_rng(0).integers(5, 40000, (1, max(PROMPTS) + TIMED))
    found = {}
    for prompt in PROMPTS:
        state, times = session.run(ids[:, :prompt]).state, []
        for place in range(prompt, prompt + TIMED):
            start = time.perf_counter()
            state = session.run(ids[:, place : place + 1], state).state
            times.append(time.perf_counter() - start)
        found[f"after {prompt} tokens"] = round(1e3 * statistics.median(times), 2)
    return found


def in_child(what: str, kind: str, bucket: int, threads: int) -> Any:
    """Runs `memory` or `step_ms` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", what, kind]
    done = subprocess.run(
        [*command, str(bucket)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    found = json.loads(done.stdout)
    print(what, kind, bucket, found, flush=True)
    return found


def main() -> None:
    """Measures everything, or in a child one thing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, kind, bucket = arguments.child
        measure = memory if what == "memory" else step_ms
        print(json.dumps(measure(kind, int(bucket), arguments.threads)))
        return
    prepare()
    sides = {"growing": ("growing", 0), "static, buckets": ("static", 0)}
    whole = {f"static, whole {c}": ("static", c) for c in CAPACITIES}
    taken = {
        name: in_child("memory", *side, arguments.threads)
        for name, side in {**sides, "static, whole 1024": ("static", 1024)}.items()
    }
    times: dict[str, dict[str, float]] = {}
    for _ in range(REPEATS):
        for name, side in {**sides, **whole}.items():
            found = in_child("step_ms", *side, arguments.threads)
            best = times.setdefault(name, found)
            times[name] = {key: min(best[key], value) for key, value in found.items()}
    most = GOAL["resident memory grows by at most (MB)"]
    write_result(
        "static_cache",
        {
            "model": "SmolLM2-135M-Instruct, fp32",
            "threads": arguments.threads,
            "onnxruntime": version("onnxruntime"),
            "results": {
                f"memory over {STEPS} decode steps, from the {WARM + 1}th on": taken,
                "milliseconds of a decode step": times,
            },
            "goal": {"static, whole 1024": GOAL},
            "goal_met": taken["static, whole 1024"]["growth_mb"] <= most,
        },
    )


if __name__ == "__main__":
    main()
