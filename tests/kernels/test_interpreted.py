"""What kernels compute, and what takes them, in Triton's interpreter on a CPU.

Triton reads TRITON_INTERPRET when kernels are defined, so each file in interpreted/ has a process
of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from interpreted_files import FILES

Done = subprocess.CompletedProcess[str]


def run(tests: Path) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Mapping[Path, Future[Done]]]:
    """The files that were asked for, on as many cores: they take minutes, and share nothing."""
    asked = {item.callspec.params["tests"] for item in request.session.items if _is_one(item)}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {file: pool.submit(run, file) for file in FILES if file in asked}
        pool.shutdown(cancel_futures=True)


def _is_one(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and hasattr(item, "callspec")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]")
@pytest.mark.parametrize("tests", FILES, ids=lambda file: file.stem)
def test_interpreted(tests: Path, running: Mapping[Path, Future[Done]]) -> None:
    done = running[tests].result()
    assert done.returncode == 0, done.stdout + done.stderr
