"""The programs in examples/ do what `edgeattn.runtime` does, and import nothing of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeattn.runtime import Session, generate

PROMPT = "Once upon a time"
# target, scheme, and whether the cache can be written in place
BUNDLES = {
    "in-place": ("cpu", "none", True),
    "int4": ("cpu", "w4-rtn", True),
    "joined": ("jetson-orin@jetpack6.2", "none", False),
}


def run(repository: Path, bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = repository / "examples" / "python" / "onnxruntime_only.py"
    command = [sys.executable, str(program), str(bundle), PROMPT, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(params=BUNDLES)
def bundle(
    request: pytest.FixtureRequest,
    random_checkpoint: Callable[..., Path],
    export_tiny: Callable[..., Path],
) -> tuple[Path, bool]:
    target, quant, in_place = BUNDLES[request.param]
    model = random_checkpoint(tie_word_embeddings=False)
    return export_tiny(target, quant, model=model, verify=False), in_place


def test_tokens_of_onnxruntime_alone(bundle: tuple[Path, bool], repository: Path) -> None:
    path, in_place = bundle
    expected = generate(Session.open(path), PROMPT, max_new_tokens=40)
    done = run(repository, path, "--new-tokens", "40", "--ids")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(expected.token_ids)
    assert len(set(expected.token_ids)) > 5

    done = run(repository, path, "--new-tokens", "40", "--ids", "--in-place")
    if in_place:
        assert json.loads(done.stdout) == list(expected.token_ids)
    else:
        assert done.returncode == 1
        assert "run without --in-place" in done.stderr


def test_it_ends_where_the_bundle_says(
    bundle: tuple[Path, bool], repository: Path, changed: Callable[..., Path]
) -> None:
    whole = generate(Session.open(bundle[0]), PROMPT, max_new_tokens=8)
    ends = json.dumps({"eos_token_id": [271, whole.token_ids[4]]})
    shorter = changed(bundle[0], {"generation_config.json": ends.encode()})
    expected = generate(Session.open(shorter), PROMPT, max_new_tokens=8)
    assert expected.finish_reason == "stop"
    assert expected.text
    done = run(repository, shorter, "--new-tokens", "8")
    assert done.stdout == expected.text + "\n"


def test_it_imports_what_it_says(repository: Path) -> None:
    source = (repository / "examples" / "python" / "onnxruntime_only.py").read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}
