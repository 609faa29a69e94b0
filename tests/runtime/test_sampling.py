"""Sampling against a slow reading of the written algorithm, published vectors and committed ones.

`python tests/runtime/test_sampling.py` writes sampling_vectors.json anew, from the slow reading.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeattn.errors import UsageError
from edgeattn.runtime.sampling import Sampling, exp, philox, uniform

VECTORS = Path(__file__).with_name("sampling_vectors.json")

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def slow_exp(x: float) -> float:
    if x < -708.0:
        return 0.0
    k = round(x * float.fromhex("0x1.71547652b82fep+0"))  # ties to even
    high, low = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
    r = (x - k * high) - k * low
    y = 1.0 / math.factorial(13)
    for n in range(12, -1, -1):
        y = y * r + 1.0 / math.factorial(n)
    return math.ldexp(y, k)


def slow_pick(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int, index: int
) -> int:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return order[0]
    order = order[:top_k] if top_k else order
    cumulated, total = [], 0.0
    for i in order:
        total += slow_exp((logits[i] - logits[order[0]]) / temperature)
        cumulated.append(total)
    kept = next(n for n, c in enumerate(cumulated, 1) if c >= top_p * total)
    words = philox((index % 2**32, index >> 32, 0, 0), (seed % 2**32, seed >> 32))
    u = ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53
    edge = u * cumulated[kept - 1]
    return next((order[n] for n in range(kept) if cumulated[n] > edge), order[kept - 1])


def made_logits(vocabulary: int, seed: int) -> list[float]:
    """Numbers that any language can make, exact in fp32: multiples of 2**-12 in [-8, 8)."""
    words = (philox((i, 0, 0, 1), (seed, 0))[0] for i in range(vocabulary))
    return [(word >> 16) / 4096 - 8 for word in words]


SETTINGS = (  # temperature, top_k, top_p
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (0.7, 40, 1.0),
    (0.8, 0, 0.9),
    (1.3, 50, 0.95),
    (0.01, 0, 0.5),
    (100.0, 0, 0.999),
    (1.0, 1, 1.0),
)


def made_vectors() -> dict:
    ties = [1.0, 3.0, -0.0, 0.0, 3.0, -2.5, 3.0, 0.0]
    rows = [(64, 1), (1000, 2)]
    picks = []
    for setting in SETTINGS:
        for logits, about in [(ties, {"logits": ties})] + [
            (made_logits(*row), {"vocabulary": row[0], "made_seed": row[1]}) for row in rows
        ]:
            names = ("temperature", "top_k", "top_p")
            ids = [slow_pick(logits, *setting, seed, seed % 7) for seed in range(50)]
            picks.append({**about, **dict(zip(names, setting, strict=True)), "ids": ids})
    inputs = [0.0, -1e-300, -0.5, -1.0, -math.pi, -0.34657359, -20.25, -700.5, -708.0, -708.5]
    return {
        "about": "picks: seeds 0 to 49, index = seed % 7; made logits: see test_sampling.py",
        "exp": [[x.hex(), slow_exp(x).hex()] for x in inputs],
        "uniform": [
            [seed, index, uniform(seed, index).hex()]
            for seed, index in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**33 + 5))
        ],
        "picks": picks,
    }


def pick(logits: list[float], index: int = 0, **options: float) -> int:
    return Sampling(**options).pick(np.array(logits, np.float32), index)  # type: ignore[arg-type]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert philox(counter, key) == answer


def test_committed_vectors():
    vectors = json.loads(VECTORS.read_text())
    for x, y in vectors["exp"]:
        assert exp(np.array([float.fromhex(x)]))[0] == float.fromhex(y)
    for seed, index, u in vectors["uniform"]:
        assert uniform(seed, index) == float.fromhex(u)
    for case in vectors["picks"]:
        logits = case.get("logits") or made_logits(case["vocabulary"], case["made_seed"])
        options = {name: case[name] for name in ("temperature", "top_k", "top_p")}
        found = [pick(logits, seed % 7, seed=seed, **options) for seed in range(50)]
        assert found == case["ids"], options


def test_committed_vectors_are_current():
    assert json.loads(VECTORS.read_text()) == json.loads(json.dumps(made_vectors()))


@given(st.lists(st.floats(-1000, 0, allow_subnormal=False), min_size=1, max_size=50))
def test_exp_is_math_exp_to_a_unit_in_the_last_place(values):
    found = exp(np.array(values))
    for x, y in zip(values, found.tolist(), strict=True):
        assert y == slow_exp(x)
        if x >= -708.0:
            assert abs(y - math.exp(x)) <= math.ulp(y)
        else:
            assert y == 0.0


def test_exp_at_the_edges():
    assert exp(np.array([0.0, -math.inf, -1e-320])).tolist() == [1.0, 0.0, 1.0]


LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 1.0, -math.inf])),
    min_size=1,
    max_size=80,
)
OPTIONS = {
    "temperature": st.one_of(st.just(0.0), st.floats(1e-3, 100), st.just(1e-320)),
    "top_k": st.integers(0, 90),
    "top_p": st.floats(0.001, 1),
    "seed": st.integers(0, 2**64 - 1),
}


@given(LOGITS, st.integers(0, 2**40), st.fixed_dictionaries(OPTIONS))
def test_pick_equals_the_written_algorithm(logits, index, options):
    assume(max(logits) > -math.inf)
    assert pick(logits, index, **options) == slow_pick(logits, index=index, **options)


@given(LOGITS, st.fixed_dictionaries(OPTIONS))
def test_the_pick_is_among_the_top_k(logits, options):
    assume(max(logits) > -math.inf)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert pick(logits, **options) in order[: options["top_k"] or None]
    assert pick(logits, **options) == pick(logits, **options)


@given(LOGITS, st.integers(0, 100), st.floats(0.1, 3), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_top_p_picks_no_likelier_token(logits, seed, temperature, one, other):
    """The same draw of a wider nucleus lies at the same place or further down the order."""
    assume(max(logits) > -math.inf)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    narrow, wide = (
        order.index(pick(logits, temperature=temperature, top_p=p, seed=seed))
        for p in sorted((one, other))
    )
    assert narrow <= wide


def test_frequencies_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(temperature=1.0, seed=3)
    counts = np.bincount([sampling.pick(logits, i) for i in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature 0 or more"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top-k 0"),
        ({"top_p": 0.0}, "top-p above 0"),
        ({"top_p": 1.01}, "top-p above 0"),
        ({"top_p": math.nan}, "top-p above 0"),
        ({"seed": -1}, "seed from 0"),
        ({"seed": 2**64}, "seed from 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Sampling(**options)


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(made_vectors()) + "\n")
