"""Sentence embeddings of exported bundles in ONNX Runtime: what each scheme costs in quality.

    python benchmarks/minilm.py --model DIRECTORY --text FILE --calibration FILE [--schemes w8a8]

Protocol: skip 2,000 characters; of the paragraphs of at least 200 characters the first 200 are
queries and the next 200 the corpus, each of at most 256 tokens, as the model's card says.
"cosine" is the mean of all 400 embeddings with those of the fp32 bundle, "top1" the share of
queries whose nearest paragraph of the corpus is that of the fp32 bundle. Bundles are for target cpu
and evaluated exactly; their proof is part of the export. The figures are of all-MiniLM-L6-v2, Pride
and Prejudice and Emma. Writes benchmarks/results/minilm.json;
schemes that are not asked for keep their figures.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, write_result
from numpy.typing import NDArray

from edgeattn.pipeline import export
from edgeattn.quant.scheme import parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession

SKIPPED, SHORTEST, QUERIES, CORPUS, TOKENS = 2000, 200, 200, 200, 256
# Scheme -> the least cosine and top1 that it shall reach; None has no goal.
GOALS: dict[str, tuple[float, float] | None] = {
    "w8-rtn": None,
    "w4-rtn": None,
    "w8a8": None,
    "w8a8-spinquant:online=off": None,
    "w8a8-spinquant": (0.995, 0.90),
    "w4a16-gptq": None,
    "w4a16-spinquant": (0.97, 0.80),
}


def paragraphs(text: str) -> list[str]:
    """Queries, then the corpus."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text[SKIPPED:]))
    long = [part for part in found if len(part) >= SHORTEST][: QUERIES + CORPUS]
    if len(long) < QUERIES + CORPUS:
        raise SystemExit(f"the text has {len(long)} long paragraphs of {QUERIES + CORPUS}")
    return long


def embeddings(bundle: Path, texts: list[str]) -> NDArray[np.float32]:
    """`[texts, hidden]`, one text at a time, so that no padding is computed."""
    session = EncoderSession.open(bundle, exact=True)
    rows = []
    for text in texts:
        ids = session.text.encode(text)
        if len(ids) > TOKENS:
            ids = [*ids[: TOKENS - 1], ids[-1]]
        rows.append(session.run([ids])[0])
    return np.stack(rows)


def nearest(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """The paragraph of the corpus that is nearest to each query."""
    return (vectors[:QUERIES] @ vectors[QUERIES:].T).argmax(axis=1)


def main() -> None:
    """Measures the schemes and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("model", "text", "calibration"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--windows", type=int, default=128)
    arguments = parser.parse_args()
    texts = paragraphs(arguments.text.read_text("utf-8-sig"))
    calibration: dict[str, Any] = {
        "calibration": str(arguments.calibration),
        "calibration_windows": arguments.windows,
    }
    results = _known(arguments.text.name)
    with tempfile.TemporaryDirectory(prefix="edgeattn-benchmark-") as folder:
        export(arguments.model, Recipe("cpu"), Path(folder) / "none")
        exact = embeddings(Path(folder) / "none", texts)
        for number, scheme in enumerate(arguments.schemes):
            asked = calibration if parse_scheme(scheme).needs_calibration else {}
            bundle = Path(folder) / str(number)
            report = export(arguments.model, Recipe("cpu", scheme, **asked), bundle)
            found = embeddings(bundle, texts)
            results[scheme] = {
                "cosine": round(float((found * exact).sum(axis=1).mean()), 5),
                "top1": round(float((nearest(found) == nearest(exact)).mean()), 4),
                "weight_bytes": report.graph.weight_bytes,
                "calibration": report.transforms.get("calibration"),
            }
            print(scheme, results[scheme], flush=True)
            _write(arguments, results)


def _known(text: str) -> dict[str, Any]:
    """Figures of an earlier run on the same text."""
    file = RESULTS / "minilm.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    return dict(known["results"]) if known.get("text") == text else {}


def _write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    goals = {scheme: goal for scheme, goal in GOALS.items() if goal is not None}
    met = {
        scheme: results[scheme]["cosine"] >= cosine and results[scheme]["top1"] >= top1
        for scheme, (cosine, top1) in goals.items()
        if scheme in results
    }
    content = {
        "model": arguments.model.name,
        "text": arguments.text.name,
        "calibration": arguments.calibration.name,
        "results": {scheme: results[scheme] for scheme in GOALS if scheme in results},
        "goal": {s: {"cosine": cosine, "top1": top1} for s, (cosine, top1) in goals.items()},
        "goal_met": met,
    }
    write_result("minilm", content)


if __name__ == "__main__":
    main()
