"""How long one pick of a token takes, beside sorting the same logits in numpy.

    python benchmarks/sampling.py

150,000 logits, the largest vocabularies of today; best of 50 picks. Writes
benchmarks/results/sampling.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from measure import write_result

from edgeattn.runtime.sampling import Sampling

VOCABULARY, ROUNDS = 150_000, 50
OPTIONS = {
    "temperature": Sampling(temperature=0.8),
    "top-k 50": Sampling(temperature=0.8, top_k=50),
    "top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
}


def best_ms(work: Callable[[int], object]) -> float:
    """Milliseconds of the fastest of many rounds."""
    found = []
    for index in range(ROUNDS):
        started = time.perf_counter()
        work(index)
        found.append(1e3 * (time.perf_counter() - started))
    return round(min(found), 2)


def main() -> None:
    """Measures every way of sampling."""
    logits = np.random.default_rng(0).normal(0, 4, VOCABULARY).astype(np.float32)
    sort = best_ms(lambda _: np.argsort(-logits))
    picks = {name: best_ms(lambda i, s=way: s.pick(logits, i)) for name, way in OPTIONS.items()}
    write_result("sampling", {"vocabulary": VOCABULARY, "sort_ms": sort, "pick_ms": picks})


if __name__ == "__main__":
    main()
