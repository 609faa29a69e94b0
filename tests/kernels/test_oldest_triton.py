"""The kernels on the oldest Triton they must run on, interpreted and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from interpreted_files import FOLDER

# Every operator in every case and dtype, and a whole model; tilings are Triton's newest alone.
FILES = [FOLDER / "torch_operators.py", FOLDER / "triton_backend.py"]
# Its interpreter does what NumPy 2.4 refuses and 2.3 warns of.
PACKAGES = ("triton==3.6.0", "numpy==2.3.5")
WARNING = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
# One GPU of each generation, but for SM 110, which it does not know.
COMPILE = """
import sys, triton
from pathlib import Path
from edgeattn.kernels.aot import SMS, compile_variants
from edgeattn.kernels.variants import load_variants
variants = load_variants("smoke")
sms = list({sm // 10: sm for sm in SMS if sm != 110}.values())
found = compile_variants(variants, sms, cache=Path(sys.argv[1]))
assert len(found.cubins) == len(variants) * len(sms)
print(triton.__version__, "compiled all")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: edgeattn[kernels]"),
]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Triton is the oldest."""
    folder = tmp_path_factory.mktemp("oldest")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    if subprocess.run([*install, str(folder), *PACKAGES], check=False).returncode:
        pytest.skip(f"needs {' and '.join(PACKAGES)} from the package index")
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("tests", FILES, ids=lambda file: file.stem)
def test_interpreted(oldest: dict[str, str], tests: Path) -> None:
    pytest_of = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", WARNING)
    run({**oldest, "TRITON_INTERPRET": "1"}, *pytest_of, str(tests))


def test_compiled(oldest: dict[str, str], tmp_path: Path) -> None:
    assert run(oldest, "-c", COMPILE, str(tmp_path)) == "3.6.0 compiled all\n"
