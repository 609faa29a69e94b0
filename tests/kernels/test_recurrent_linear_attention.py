"""The kernels of RecurrentLinearAttention compute the operator.

Triton reads TRITON_INTERPRET when kernels are defined, so their tests have a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]")
def test_interpreted() -> None:
    tests = Path(__file__).parent / "interpreted" / "recurrent_linear_attention.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
