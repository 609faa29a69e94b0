"""Each attention variant on SmolLM2-135M: its size, its perplexity, its speed, in one table.

    python benchmarks/attention.py --text pride_and_prejudice.txt --calibration emma.txt [--only …]

Every row is a bundle that `edgeattn export --target cpu` wrote and proved, calibrated on one text
and read on the other (12 windows of 512 tokens; token by token where heads are left out while
decoding; fft-rope in windows of 2,048, beside the plain model in such windows). Tokens a second are
ONNX Runtime's on this CPU after a prompt of 512 tokens, the rows taking turns. The speed on a
Jetson AGX Orin is the roofline's, at 8,192 tokens: predicted, at most, never measured.
Rows that are there already are kept; --only measures some anew.
Writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from export import MODEL, smollm2_fp16
from measure import RESULTS, write_result

from edgeattn.bundle.bundle import WEIGHTS, Bundle
from edgeattn.devices.registry import parse_target
from edgeattn.errors import EdgeattnError
from edgeattn.planner.head_sparsity import cache_share, decode_speedup
from edgeattn.planner.lowering import fit_lowering, plan_lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes
from edgeattn.planner.roofline import predict, rates_of
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session
from edgeattn.runtime.perplexity import perplexity

PLACE = MODEL.parent / "attention"
JETSON, CONTEXT = "jetson-orin", 8192
PROMPT, STEPS, ROUNDS = 512, 32, 5


@dataclass(frozen=True)
class Row:
    """One bundle.

    Attributes:
        attention: values of --attention.
        quant: scheme.
        steps: of recovery training, on the calibration text.
        windows, length: of the text that is read.
        density: share of heads that decoding uses.
    """

    attention: tuple[str, ...] = ()
    quant: str = "none"
    steps: int = 0
    windows: int = 12
    length: int = 512
    density: float = 1.0


ROWS = {
    "softmax": Row(),
    "softmax, windows of 2,048": Row(windows=3, length=2048),
    "gqa:kv_heads=1": Row(("gqa:kv_heads=1",)),
    "gqa:kv_heads=1, 200 steps": Row(("gqa:kv_heads=1",), steps=200),
    "head-sparse:density=8/9": Row(("head-sparse:density=8/9",), density=8 / 9),
    "head-sparse:density=7/9": Row(("head-sparse:density=7/9",), density=7 / 9),
    "fft-rope": Row(("fft-rope",), windows=3, length=2048),
    "softmax, w4a16-spinquant": Row(quant="w4a16-spinquant"),
    "head-sparse:density=8/9, w4a16-spinquant": Row(
        ("head-sparse:density=8/9",), "w4a16-spinquant", density=8 / 9
    ),
}


def exported(name: str, row: Row, calibration: Path) -> Path:
    """The bundle of a row, made once under build/."""
    path = PLACE / "".join(c if c.isalnum() else "-" for c in name)
    if (path / "manifest.json").exists():
        return path
    edgeattn = str(Path(sys.executable).with_name("edgeattn"))
    command = [edgeattn, "export", str(smollm2_fp16()), "--target", "cpu", "--quant", row.quant]
    command += [word for value in row.attention for word in ("--attention", value)]
    if row.attention or row.quant != "none":
        command += ["--calibration", str(calibration)]
    if row.steps:
        command += ["--finetune-text", str(calibration), "--finetune-steps", str(row.steps)]
    command += ["-o", str(path), "--force"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def predicted(bundle: Bundle, row: Row) -> float | None:
    """Tokens a second that a Jetson decodes at most, by the roofline."""
    target = parse_target(JETSON)
    asked = Recipe(JETSON, quant=row.quant, context=CONTEXT)
    lowering = fit_lowering(plan_lowering(asked, target), bundle.shape, target)
    rates = rates_of(target, lowering)
    if rates is None:
        return None
    found = predict(bundle.shape, lowering, CONTEXT, 1, rates).tokens_per_s
    share = cache_share(
        read_bytes(bundle.shape, lowering),
        cache_bytes_per_token(bundle.shape, lowering),
        CONTEXT,
        1,
    )
    return round(found * decode_speedup(share, row.density), 1)


def decode_rates(sessions: dict[str, Session]) -> dict[str, float]:
    """Tokens a second after the prompt, the sessions taking turns; medians over rounds."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    ids = np.random.default_rng(0).integers(100, 40_000, (1, PROMPT))
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            step = session.run(ids)
            begin = time.perf_counter()
            for _ in range(STEPS):
                token = step.logits[:, -1].argmax(-1)[:, None]
                step = session.run(token, step.state)
            found[name].append(STEPS / (time.perf_counter() - begin))
    return {name: round(statistics.median(rates), 1) for name, rates in found.items()}


def measure(name: str, row: Row, path: Path, text: str) -> dict[str, Any]:
    """What one bundle is and how well it reads."""
    session, bundle = Session.open(path, exact=True), Bundle.open(path, check_hashes=False)
    evaluation = perplexity(session, text, windows=row.windows, length=row.length)
    weights = bundle.file(WEIGHTS)
    return {
        "attention": list(row.attention),
        "quant": row.quant,
        "weight_bytes": weights.stat().st_size if weights else None,
        "perplexity": round(evaluation.perplexity, 3),
        "windows": row.windows,
        "length": row.length,
        "predicted_jetson_orin_tokens_per_s": predicted(bundle, row),
    }


def main() -> None:
    """Measures what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=ROWS, metavar="NAME")
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    place = RESULTS / "attention.json"
    rows: dict[str, Any] = json.loads(place.read_text())["rows"] if place.exists() else {}
    sessions = {}
    for name, row in ROWS.items():
        asked = options.only is None or name in options.only
        try:
            path = exported(name, row, options.calibration)
        except subprocess.CalledProcessError as error:
            print(f"{name}: export ended with {error.returncode}", file=sys.stderr)
            continue
        if asked or name not in rows:
            rows[name] = measure(name, row, path, text)
            print(f"{name}: {rows[name]}", flush=True)
        sessions[name] = Session.open(path)
    try:
        for name, rate in decode_rates(sessions).items():
            rows[name]["cpu_tokens_per_s"] = rate
    except EdgeattnError as error:
        print(error, file=sys.stderr)
    write_result(
        "attention",
        {
            "predicted": f"by the roofline at {CONTEXT} tokens in one row; nothing ran on a Jetson",
            "rows": {name: rows[name] for name in ROWS if name in rows},
        },
    )


if __name__ == "__main__":
    main()
