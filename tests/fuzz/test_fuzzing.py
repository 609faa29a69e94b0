"""Ten minutes of made-up manifests and records for the readers of each language.

What is found is a file in the working folder, named by the failing test; the mended reader's corpus
then takes it in, so that the default tests read it in both languages.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_projects import json_include

TESTS = Path(__file__).resolve().parents[1]
RUNTIME = TESTS.parent / "plugins" / "runtime"
SOURCES = ("bundle", "engine", "facts", "manifest", "sha256")
SECONDS = int(os.environ.get("EDGEATTN_FUZZ_SECONDS", "600"))

pytestmark = pytest.mark.slow


def fuzz(command: list[str | Path], folder: Path) -> str:
    """Runs libFuzzer, which ends at the first crash; its last words."""
    corpus, found = TESTS / "fuzz" / "corpus", folder / "corpus"
    found.mkdir()
    options = [
        f"-max_total_time={SECONDS}",
        f"-dict={TESTS / 'fuzz' / 'json.dict'}",
        "-max_len=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={folder}/",
    ]
    paths = os.pathsep.join([str(TESTS / "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *options, found, corpus],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (runs,) = re.findall(r"stat::number_of_executed_units: +(\d+)", done.stderr)
    assert int(runs) > len(list(corpus.iterdir()))
    print(*re.findall(r"^(?:#\d+\s+DONE.*|stat::.*)$", done.stderr, re.MULTILINE), sep="\n")
    return done.stderr


def test_the_readers_of_cpp(tmp_path: Path) -> None:
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("needs clang++ with libFuzzer (apt install clang)")
    program = tmp_path / "fuzz_readers"
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{RUNTIME}", f"-I{RUNTIME.parent / 'include'}"]
    sources = [RUNTIME / f"{name}.cpp" for name in SOURCES]
    main = RUNTIME / "test" / "fuzz_readers.cpp"
    build = [clang, *flags, "-isystem", json_include(), main, *sources, "-o", program]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if "libclang_rt.fuzzer" in done.stderr:
        pytest.skip("needs libFuzzer beside clang++ (apt install clang)")
    assert done.returncode == 0, done.stderr[-3000:]
    fuzz([program], tmp_path)


def test_the_readers_of_python(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install 'edgeattn[fuzz]'")
    fuzz([sys.executable, TESTS / "fuzz" / "fuzz_readers.py"], tmp_path)
