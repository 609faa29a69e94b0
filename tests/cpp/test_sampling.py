"""The C++ library picks the tokens that Python picks, on this machine and on an emulated Jetson."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn import __version__
from edgeattn.errors import UsageError
from edgeattn.runtime.sampling import Sampling, exp, philox, uniform

VECTORS = Path(__file__).parents[1] / "runtime" / "sampling_vectors.json"


@pytest.fixture(params=["application", "sanitized", "emulated"])
def built(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def logits_line(logits: Any) -> str:
    return " ".join(["logits", *(float(x).hex() for x in logits)])


def made_logits(vocabulary: int, seed: int) -> list[float]:
    """See tests/runtime/test_sampling.py."""
    words = (philox((i, 0, 0, 1), (seed, 0))[0] for i in range(vocabulary))
    return [(word >> 16) / 4096 - 8 for word in words]


def test_the_committed_vectors(built: Any) -> None:
    vectors, lines, expected = json.loads(VECTORS.read_text()), [], []
    for x, y in vectors["exp"]:
        lines.append(f"exp {x}")
        expected.append(float.fromhex(y))
    for seed, index, u in vectors["uniform"]:
        lines.append(f"uniform {seed} {index}")
        expected.append(float.fromhex(u))
    for case in vectors["picks"]:
        logits = case.get("logits") or made_logits(case["vocabulary"], case["made_seed"])
        lines.append(logits_line(logits))
        setting = f"{case['temperature'].hex()} {case['top_k']} {case['top_p'].hex()}"
        lines += [f"pick {setting} {seed} {seed % 7}" for seed in range(50)]
        expected += case["ids"]
    answers = built.run("consumer", lines=lines)
    assert [float.fromhex(a) if "x" in a else int(a) for a in answers] == expected


def test_what_python_computes_now(built: Any) -> None:
    rng = np.random.default_rng(3)
    x = -rng.exponential(60, 4000)
    lines = [f"exp {value.hex()}" for value in x.tolist()]
    expected: list[float] = exp(x).tolist()
    picks = []
    for vocabulary in (1, 2, 49152):
        logits = (rng.standard_normal(vocabulary) * 4).astype(np.float32)
        logits[rng.random(vocabulary) < 0.1] = -np.inf
        logits[0] = logits[-1] = 1.0
        lines.append(logits_line(logits))
        for seed in range(50):
            drawn = rng.integers(0, 2**63), rng.integers(0, 2**40)
            sampling = Sampling(0.3 + seed / 20, int(rng.integers(0, 60)), 0.9, int(drawn[0]))
            picks.append(sampling.pick(logits, int(drawn[1])))
            told = f"{sampling.temperature.hex()} {sampling.top_k} {sampling.top_p.hex()}"
            lines.append(f"pick {told} {drawn[0]} {drawn[1]}")
    answers = built.run("consumer", lines=lines)
    assert [float.fromhex(a) for a in answers[: len(x)]] == expected
    assert [int(a) for a in answers[len(x) :]] == picks
    assert uniform(5, 6) == float.fromhex(built.run("consumer", lines=["uniform 5 6"])[0])


@pytest.mark.parametrize(
    ("logits", "setting", "code", "words"),
    [
        ([1.0, 2.0], "-0.5 0 1.0", 1, "a temperature 0 or more, but it is -0.5"),
        ([1.0, 2.0], "nan 0 1.0", 1, "a temperature 0 or more"),
        ([1.0, 2.0], "inf 0 1.0", 1, "a temperature 0 or more"),
        ([1.0, 2.0], "1 0 0", 1, "a top-p above 0 and at most 1"),
        ([1.0, 2.0], "1 0 1.5", 1, "a top-p above 0 and at most 1"),
        ([1.0, math.nan], "0 0 1", 2, "finite logits, but that of token 1 is"),
        ([math.inf, 1.0], "1 0 1", 2, "finite logits, but that of token 0 is inf"),
        ([-math.inf, -math.inf], "1 0 1", 2, "a finite logit, but all are -inf"),
        ([], "1 0 1", 2, "logits of at least one token"),
    ],
)
def test_refusals(sanitized: Any, logits: Any, setting: str, code: int, words: str) -> None:
    (answer,) = sanitized.run("consumer", lines=[logits_line(logits), f"pick {setting} 0 0"])
    assert re.fullmatch(rf"{code} expected .*, but .*: .*", answer)
    assert words in answer


@pytest.mark.parametrize("option", [{"temperature": -0.5}, {"top_p": 1.5}])
def test_python_says_the_same(sanitized: Any, option: dict[str, float]) -> None:
    with pytest.raises(UsageError) as refused:
        Sampling(**option)  # type: ignore[arg-type]
    setting = f"{option.get('temperature', 1.0)} 0 {option.get('top_p', 1.0)}"
    (answer,) = sanitized.run("consumer", lines=["logits 1", f"pick {setting} 0 0"])
    said = re.sub(r"(\.\d+?)0+:", r"\1:", answer)  # C++ writes six digits
    assert said == f"1 {refused.value}"


def test_the_c_header(sanitized: Any) -> None:
    assert sanitized.run("plain_c") == ["0 1 ", "1 2"]
    refused, _ = sanitized.run("plain_c", "-1")
    assert refused.startswith("1 -1 expected a temperature 0 or more")


def test_the_package_says_its_version(application: Any) -> None:
    (config,) = application.installed.rglob("edgeattnConfigVersion.cmake")
    assert f'set(PACKAGE_VERSION "{__version__}")' in config.read_text()
    (told,) = application.installed.rglob("edgeattn.pc")
    assert f"Version: {__version__}" in told.read_text()
