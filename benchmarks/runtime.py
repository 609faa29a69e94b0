"""What the Python runtime adds to a decode step of the w4 bundle: time outside ONNX Runtime's run.

    python benchmarks/runtime.py [--quant w4-rtn] [--rounds 12]

SmolLM2-135M for a CPU (see run.py) continues a prompt of 17 and of 512 tokens by 64, once greedily
and once sampled (temperature 0.8, top-k 40, top-p 0.95). A step is what `stream` does for one
token: the session's checks and arrays, the run, choosing the token, its text. Within it, the time
inside ONNX Runtime's own call is measured at that call. The overhead is the rest of the step, in
share of the step: the median over steps, and its quartiles over rounds.
Writes benchmarks/results/runtime.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from measure import write_result
from run import DECODE_STEPS, OURS, PROMPTS, prepare_ours

from edgeattn.runtime import Session, stream

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
}
inside = 0.0


def measure_inside() -> None:
    """Adds the time of every run of ONNX Runtime to `inside`."""
    for name in ("run", "run_with_iobinding", "run_with_ort_values"):
        plain = getattr(onnxruntime.InferenceSession, name)

        def timed(*arguments: Any, _plain: Any = plain, **named: Any) -> Any:
            global inside
            start = time.perf_counter()
            found = _plain(*arguments, **named)
            inside += time.perf_counter() - start
            return found

        setattr(onnxruntime.InferenceSession, name, timed)


def steps(session: Session, prompt: list[int], mode: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds of each decode step, whole and inside ONNX Runtime."""
    found = []
    tokens = stream(session, prompt, max_new_tokens=DECODE_STEPS + 1, **mode)
    iterator = iter(tokens)
    next(iterator)  # the prompt is read
    for _ in range(DECODE_STEPS):
        before, start = inside, time.perf_counter()
        if next(iterator, None) is None:
            break
        found.append((time.perf_counter() - start, inside - before))
    return found


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quant", default="w4-rtn")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_ours(arguments.quant, arguments.calibration)
    session = Session.open(OURS, threads=arguments.threads)
    measure_inside()
    random = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for length in PROMPTS:
        for name, mode in MODES.items():
            shares, milliseconds = [], []
            for round_ in range(arguments.rounds + 1):
                # another text each round: one that repeats would have its words at hand
                prompt = random.integers(5, 40000, length).tolist()
                measured = steps(session, prompt, mode)
                if round_:  # the first warms up
                    rest = [(whole - run) / whole for whole, run in measured]
                    shares.append(statistics.median(rest))
                    milliseconds += [1e3 * (whole - run) for whole, run in measured]
            low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75)).round(4).tolist()
            results[f"{name}, after {length} tokens"] = {
                "share_outside": {"lower_quartile": low, "median": middle, "upper_quartile": high},
                "ms_outside": round(statistics.median(milliseconds), 3),
            }
            print(length, name, results[f"{name}, after {length} tokens"], flush=True)
    write_result(
        "runtime",
        {
            "model": "SmolLM2-135M-Instruct",
            "quant": arguments.quant,
            "threads": arguments.threads,
            "onnxruntime": version("onnxruntime"),
            "results": results,
            "goal": "at most 0.03 of a greedy step outside ONNX Runtime",
            "goal_met": all(
                found["share_outside"]["median"] <= 0.03
                for name, found in results.items()
                if name.startswith("greedy")
            ),
        },
    )


if __name__ == "__main__":
    main()
