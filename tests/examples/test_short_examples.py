"""generate.py and embed.py print what the runtime gives, in twenty lines each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeattn.runtime import EncoderSession, Session, generate

MOST_LINES = 20


def run(repository: Path, name: str, *arguments: object) -> str:
    file = repository / "examples" / "python" / name
    assert len(file.read_text().splitlines()) <= MOST_LINES
    command = [sys.executable, str(file), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(repository: Path, tiny_bundle: Path) -> None:
    found = run(repository, "generate.py", tiny_bundle, "Once upon a time", 12)
    expected = generate(Session.open(tiny_bundle), "Once upon a time", max_new_tokens=12)
    assert found == expected.text + "\n"


def test_embed(repository: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from encoders import save_embedder

    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    save_embedder(tmp_path / "model", tiny_checkpoint / "tokenizer.json")
    export(tmp_path / "model", Recipe("cpu"), tmp_path / "out", verify=False)
    texts = ["a cat", "a kitten", "tax"]
    lines = run(repository, "embed.py", tmp_path / "out", *texts).splitlines()
    first, *others = EncoderSession.open(tmp_path / "out").embed(texts)
    nearness = [1.0, *(float(first @ other) for other in others)]
    assert [line.split("  ")[1] for line in lines] == texts
    assert [float(line.split("  ")[0]) for line in lines] == pytest.approx(nearness, abs=6e-5)
