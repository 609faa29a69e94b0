"""Decode and prefill speed of the w4 bundle for a CPU, beside onnxruntime-genai's own int4 model.

    python benchmarks/run.py --text pride_and_prejudice.txt --calibration emma.txt [--runs 40]

Both models are made from the same fp16 SmolLM2-135M (see export.py): ours by `edgeattn export
--target cpu` with int4 weights in groups of 64 (--quant, by default w4a16-spinquant with an int4
head, as theirs is) and run by `edgeattn.runtime.Session`, theirs by onnxruntime-genai's builder
(int4, its default blocks of 32) and run by its Generator. They take turns in one process, each
round starting with the other one, with the same number of threads set on both sides. The ratio is
the median over pairs of rounds, one in each order (geometric mean): a machine whose speed swings
by a fifth from minute to minute hardly changes within a round. Perplexity is that of the same fast
mode, int8 activations, through ONNX Runtime on both graphs.
Writes benchmarks/results/run.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
from export import MODEL, smollm2_fp16
from measure import write_result
from numpy.typing import NDArray

from edgeattn.runtime import Session
from edgeattn.runtime.perplexity import perplexity
from edgeattn.runtime.text import Text

OURS = MODEL.parent / "SmolLM2-135M-cpu-w4"
THEIRS = MODEL.parent / "SmolLM2-135M-genai-int4"
PROMPTS = (17, 512)
DECODE_STEPS = 64


def prepare_ours(quant: str, calibration: Path | None) -> None:
    """Writes our bundle by a child process, unless it is there."""
    manifest = OURS / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["recipe"]["quant"] == quant:
        return
    model = str(smollm2_fp16())
    edgeattn = [str(Path(sys.executable).with_name("edgeattn")), "export", model, "--force"]
    options = ["--target", "cpu", "--quant", quant, "--no-verify", "-o", str(OURS)]
    if calibration is not None:
        options += ["--calibration", str(calibration)]
    subprocess.run([*edgeattn, *options], check=True, stdout=subprocess.DEVNULL)


def prepare(threads: int) -> None:
    """Writes their model by a child process, so that its memory and threads are gone."""
    model = str(smollm2_fp16())
    shutil.rmtree(THEIRS, ignore_errors=True)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model]
    options = ["-o", str(THEIRS), "-p", "int4", "-e", "cpu", "-c", str(THEIRS.parent / "cache")]
    subprocess.run([*builder, *options], check=True, stdout=subprocess.DEVNULL)
    file = THEIRS / "genai_config.json"
    config = json.loads(file.read_text())
    # Its default is one thread on a machine like this one.
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(config))


def run_ours(session: Session, prompt: list[int]) -> tuple[float, float]:
    """Seconds of the prefill, and the median of a greedy step."""
    start = time.perf_counter()
    step = session.run([prompt])
    token = int(step.logits[0, -1].argmax())
    prefill, steps = time.perf_counter() - start, []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        step = session.run([[token]], step.state)
        token = int(step.logits[0, -1].argmax())
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


def run_theirs(model: Any, prompt: list[int]) -> tuple[float, float]:
    """The same with onnxruntime-genai."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = len(prompt) + DECODE_STEPS + 1
    # Equal lengths: no end before all steps are made.
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = onnxruntime_genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    prefill, steps = time.perf_counter() - start, []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        generator.generate_next_token()
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


def speeds(
    sides: dict[str, Callable[[list[int]], tuple[float, float]]], runs: int
) -> dict[str, Any]:
    """Tokens per second by prompt length and side, and the rounds' ratios."""
    ids = np.random.default_rng(0).integers(5, 40000, max(PROMPTS)).tolist()
    found: dict[str, Any] = {}
    for length in PROMPTS:
        rates: dict[str, list[NDArray[Any]]] = {name: [] for name in sides}
        for run in range(runs + 1):
            for name in list(sides)[:: 1 if run % 2 else -1]:
                prefill, step = sides[name](ids[:length])
                if run:  # the first round warms up
                    rates[name].append(np.array([length / prefill, 1 / step]))
        ratios = np.array(rates["edgeattn"]) / np.array(rates["onnxruntime-genai"])
        # Whoever comes second in a round meets the other's threads: two rounds make one figure.
        ratios = np.sqrt(ratios[: len(ratios) // 2 * 2 : 2] * ratios[1::2])
        found[f"after {length} tokens"] = {
            **{name: _by_figure(np.array(values), 1) for name, values in rates.items()},
            "ratio": _by_figure(ratios, 3),
        }
        print(length, json.dumps(found[f"after {length} tokens"]), flush=True)
    return found


def _by_figure(rounds: NDArray[Any], digits: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of `rounds` `[runs, 2]`."""
    quartiles = np.quantile(rounds, (0.25, 0.5, 0.75), axis=0).round(digits).T.tolist()
    return {
        figure: dict(zip(("lower_quartile", "median", "upper_quartile"), found, strict=True))
        for figure, found in zip(("prefill_tokens_s", "decode_tokens_s"), quartiles, strict=True)
    }


def genai_perplexity(text: str, windows: int, threads: int, length: int = 512) -> float:
    """Perplexity of onnxruntime-genai's graph over the windows `perplexity` uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(THEIRS / "model.onnx"), options)
    decoder = json.loads((THEIRS / "genai_config.json").read_text())["model"]["decoder"]
    empty = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    ids = Text.open(Session.open(OURS).bundle).encode(text[2000:], add_special_tokens=False)
    total = 0.0
    for window in range(windows):
        row = np.array([ids[window * length : (window + 1) * length]])
        feeds: dict[str, Any] = {"input_ids": row, "attention_mask": np.ones_like(row)}
        for value in session.get_inputs():
            if value.name.startswith("past"):
                feeds[value.name] = np.zeros(empty, np.float32)
        logits = session.run(["logits"], feeds)[0][0, :-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(length - 1), row[0, 1:]]
        total += float(losses.mean())
    return float(np.exp(total / windows))


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--quant", default="w4a16-spinquant:head=w4")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    prepare_ours(arguments.quant, arguments.calibration)
    prepare(arguments.threads)
    session = Session.open(OURS, threads=arguments.threads)
    model = onnxruntime_genai.Model(str(THEIRS))
    sides = {
        "edgeattn": lambda prompt: run_ours(session, prompt),
        "onnxruntime-genai": lambda prompt: run_theirs(model, prompt),
    }
    measured = speeds(sides, arguments.runs)
    text = arguments.text.read_text("utf-8")
    quality = {
        "edgeattn": perplexity(session, text, windows=arguments.windows).perplexity,
        "onnxruntime-genai": genai_perplexity(text, arguments.windows, arguments.threads),
    }
    print(quality)
    as_fast = all(r["median"] >= 1 for found in measured.values() for r in found["ratio"].values())
    better = quality["edgeattn"] < quality["onnxruntime-genai"]
    write_result(
        "run",
        {
            "model": "SmolLM2-135M-Instruct",
            "quant": arguments.quant,
            "what": f"greedy, {arguments.threads} threads on both sides, taking turns",
            "versions": {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")},
            "results": measured,
            "perplexity": {name: round(value, 3) for name, value in quality.items()},
            "goal": "median ratio at least 1 everywhere, at a lower perplexity",
            "goal_met": as_fast and better,
        },
    )


if __name__ == "__main__":
    main()
