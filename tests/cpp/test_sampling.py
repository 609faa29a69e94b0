"""C++ picks what Python picks; exp, SHA-256 and the refusals are the same."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import struct
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeattn.errors import UsageError
from edgeattn.runtime.sampling import Sampling, exp

VECTORS = Path(__file__).parents[1] / "runtime" / "sampling_vectors.json"
SEEDS = (*range(48), 2**32 + 1, 2**64 - 1)
SETTINGS = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1e-300},
    {"temperature": 0.9, "top_k": 1000, "top_p": 0.95},
)
STEPS = 8


def made_logits() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(7)
    normal = random.standard_normal(300).astype(np.float32) * 3
    masked = np.where(random.random(300) < 0.5, -np.inf, normal).astype(np.float32)
    zeros = np.where(random.random(64) < 0.5, -0.0, 0.0).astype(np.float32)
    return {
        "normal": normal,
        "ties": np.round(normal).astype(np.float32),
        "zeros of both signs": zeros,
        "masked": masked,
        "vocabulary of 1": np.array([-4.5], np.float32),
        "subnormal": np.array([1e-40, -1e-40, 0, 1e-40], np.float32),
        "vocabulary of 50000": random.standard_normal(50_000).astype(np.float32),
    }


def case(sampling: Sampling, logits: NDArray[np.float32], steps: int) -> bytes:
    temperature, top_k, top_p, seed = astuple(sampling)
    head = struct.pack("<ddqQQQ", temperature, top_p, top_k, seed, steps, len(logits))
    return head + logits.tobytes()


@pytest.mark.parametrize("name", made_logits())
def test_the_tokens_of_both_languages_are_the_same(runtime: Any, name: str) -> None:
    logits = made_logits()[name]
    samplings = [Sampling(seed=seed, **s) for s, seed in itertools.product(SETTINGS, SEEDS)]
    steps = 1 if len(logits) > 1000 else STEPS  # Python needs a while for these
    given = b"".join(case(sampling, logits, steps) for sampling in samplings)
    picked = [
        [int(token) for token in line.split()]
        for line in runtime.drive("pick", given).decode().splitlines()
    ]
    assert picked == [[s.pick(logits, i) for i in range(steps)] for s in samplings]
    if name == "normal":  # what always gives the largest would not pass
        assert len({tuple(tokens) for tokens in picked}) > len(SEEDS)


def test_exp_has_the_same_bits(runtime: Any) -> None:
    random = np.random.default_rng(3)
    x = np.concatenate(
        [
            -random.random(60_000) * 720,
            -(2.0 ** (-random.random(40_000) * 60)),
            -np.arange(1100) * np.log(2) / 2,
            [0.0, -0.0, -708.0, np.nextafter(-708.0, -800.0), -np.inf, -5e-324],
        ]
    )
    given = x.astype("<f8").tobytes()
    assert runtime.drive("exp", given) == exp(x).astype("<f8").tobytes()


def test_exp_of_the_committed_vectors(runtime: Any) -> None:
    pairs = [
        [float.fromhex(text) for text in pair] for pair in json.loads(VECTORS.read_text())["exp"]
    ]
    x, y = np.array(pairs).T
    assert runtime.drive("exp", x.tobytes()) == y.tobytes()


@pytest.mark.parametrize(
    ("logits", "came"),
    [
        ([1, np.nan, 2], "4: expected finite logits, but that of token 1 is NaN"),
        ([1, 2, np.inf], "4: expected finite logits, but that of token 2 is +inf"),
        ([-np.inf, -np.inf], "4: expected logits of which one is finite, but none is"),
        ([], "4: expected logits of which one is finite, but none is"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_give_no_token_are_refused(
    runtime: Any, logits: list[float], came: str, temperature: float
) -> None:
    given = case(Sampling(temperature), np.array(logits, np.float32), 1)
    assert runtime.drive("pick", given).decode().startswith(came)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (-1.0, 0, 1.0),
        (np.nan, 0, 1.0),
        (np.inf, 0, 1.0),
        (1.0, -1, 1.0),
        (1.0, 0, 0.0),
        (1.0, 0, 1.5),
    ],
)
def test_settings_outside_their_range_are_refused_as_in_python(
    runtime: Any, temperature: float, top_k: int, top_p: float
) -> None:
    with pytest.raises(UsageError) as refusal:
        Sampling(temperature, top_k, top_p)
    expected = str(refusal.value).partition(", but")[0]
    given = struct.pack("<ddqQQQ", temperature, top_p, top_k, 0, 1, 1) + b"\0" * 4
    assert runtime.drive("pick", given).decode().startswith(f"2: {expected}")


@pytest.mark.parametrize("size", [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 128, 100_001])
def test_sha256_is_that_of_hashlib(runtime: Any, size: int) -> None:
    text = np.random.default_rng(size).bytes(size)
    assert runtime.drive("sha256", text).decode().split() == [hashlib.sha256(text).hexdigest()] * 2


class CSampling(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    )


def test_c_functions_return_codes(runtime: Any, tmp_path: Path) -> None:
    library = ctypes.CDLL(str(runtime.library))
    library.edgeattn_last_error.restype = ctypes.c_char_p
    token, bundle = ctypes.c_int64(-1), ctypes.c_void_p()
    logits = (ctypes.c_float * 3)(1, 2, 0)

    def pick(sampling: CSampling, result: object) -> int:
        size, index = ctypes.c_size_t(3), ctypes.c_uint64(0)
        return int(library.edgeattn_pick(ctypes.byref(sampling), logits, size, index, result))

    assert pick(CSampling(0, 0, 1, 0), ctypes.byref(token)) == 0
    assert token.value == 1
    assert pick(CSampling(-1, 0, 1, 0), ctypes.byref(token)) == 2
    assert b"a temperature 0 or more" in library.edgeattn_last_error()
    assert pick(CSampling(0, 0, 1, 0), None) == 2
    assert b"null" in library.edgeattn_last_error()
    path = str(tmp_path / "none").encode()
    assert library.edgeattn_bundle_open(path, 1, ctypes.byref(bundle)) == 3
    assert b"nothing is there" in library.edgeattn_last_error()
    assert bundle.value is None
