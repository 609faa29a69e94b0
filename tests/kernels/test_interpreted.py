"""What kernels compute, and what takes them, in Triton's interpreter on a CPU.

Triton reads TRITON_INTERPRET when kernels are defined, so each file in interpreted/ has a process
of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("interpreted").glob("*.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]")
@pytest.mark.parametrize("tests", FILES, ids=lambda file: file.stem)
def test_interpreted(tests: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
