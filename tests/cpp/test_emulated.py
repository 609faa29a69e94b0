"""The committed vectors in C++, on this machine and on an emulated Jetson.

An aarch64 compiler fuses multiplications and additions unless it is told not to: only there would a
library built without -ffp-contract=off give other numbers.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cmake_projects import configure, emulator, run

from edgeattn.engine.toolchain import find_cmake
from edgeattn.runtime.sampling import Sampling, exp, philox

VECTORS = Path(__file__).parents[1] / "runtime" / "sampling_vectors.json"
CONSUMER = Path(__file__).with_name("consumer")
Ask = Callable[[Sequence[str]], list[str]]


@pytest.fixture(scope="module", params=[platform.machine(), "aarch64"])
def ask(
    request: pytest.FixtureRequest,
    installed: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Ask:
    """A function from commands to the lines an application answers with."""
    arch = request.param
    runner = emulator(arch)
    folder = tmp_path_factory.mktemp(f"consumer-{arch}")
    found = f"-Dedgeattn_ROOT={installed(arch)}"
    configure(CONSUMER, folder, arch, found, "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=BOTH")
    run([find_cmake(), "--build", folder])

    def answers(lines: Sequence[str]) -> list[str]:
        done = subprocess.run(
            [*runner, folder / "consumer"],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return answers


def made_logits(vocabulary: int, seed: int) -> list[float]:
    """See tests/runtime/test_sampling.py."""
    words = (philox((i, 0, 0, 1), (seed, 0))[0] for i in range(vocabulary))
    return [(word >> 16) / 4096 - 8 for word in words]


def test_the_committed_vectors(ask: Ask) -> None:
    vectors, lines, expected = json.loads(VECTORS.read_text()), [], []
    for x, y in vectors["exp"]:
        lines.append(f"exp {x}")
        expected.append(float.fromhex(y))
    for seed, index, u in vectors["uniform"]:
        lines.append(f"uniform {seed} {index}")
        expected.append(float.fromhex(u))
    for case in vectors["picks"]:
        logits = case.get("logits") or made_logits(case["vocabulary"], case["made_seed"])
        lines.append(" ".join(["logits", *(float(x).hex() for x in logits)]))
        setting = f"{case['temperature'].hex()} {case['top_k']} {case['top_p'].hex()}"
        lines += [f"pick {setting} {seed} {seed % 7}" for seed in range(50)]
        expected += case["ids"]
    assert [float.fromhex(a) if "x" in a else int(a) for a in ask(lines)] == expected


def test_what_python_computes_now(ask: Ask) -> None:
    """Wide enough that a fused operation shows: 4,000 exponentials, a vocabulary of 49,152."""
    rng = np.random.default_rng(3)
    x = -rng.exponential(60, 4000)
    found = ask([f"exp {value.hex()}" for value in x.tolist()])
    assert [float.fromhex(answer) for answer in found] == exp(x).tolist()
    logits = (rng.standard_normal(49152) * 4).astype(np.float32)
    lines = [" ".join(["logits", *(value.hex() for value in logits.tolist())])]
    sampling = [Sampling(0.3 + seed / 20, seed, 0.9, seed) for seed in range(50)]
    lines += [f"pick {s.temperature.hex()} {s.top_k} {s.top_p.hex()} {s.seed} 5" for s in sampling]
    assert [int(answer) for answer in ask(lines)] == [s.pick(logits, 5) for s in sampling]
