"""A real export in a process of its own that is interrupted, killed, or out of space."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from edgeattn.bundle.bundle import Bundle

# The command line with a line on standard error as each stage begins, and a pause for the signal.
PROGRAM = """
import sys, time
from edgeattn.bundle.writer import BundleWriter
from edgeattn.cli import main
from edgeattn.pipeline.clock import Clock

start = Clock.start

def announce(self, stage):
    start(self, stage)
    print(f"STAGE {stage}", file=sys.stderr, flush=True)
    time.sleep(0.2)

Clock.start = announce
commit = BundleWriter.commit

def announced_commit(self):
    print("STAGE committing", file=sys.stderr, flush=True)
    commit(self)
    print("STAGE committed", file=sys.stderr, flush=True)
    time.sleep(0.2)

BundleWriter.commit = announced_commit
main(sys.argv[1:], prog_name="edgeattn")
"""
STAGES = ("reading the checkpoint", "writing the graph", "proving the bundle", "committed")


def start(model: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, "export", str(model), "--target", "cpu", "-o"]
    return subprocess.Popen(
        [*command, str(output), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(child: subprocess.Popen[str], stage: str) -> str:
    assert child.stderr is not None
    seen = ""
    for line in child.stderr:
        seen += line
        if line.startswith(f"STAGE {stage}"):
            return seen
    raise AssertionError(seen)


def is_whole_or_absent(output: Path) -> bool:
    """Whether a bundle is there; asserts that nothing between is."""
    if not output.exists():
        return False
    assert Bundle.open(output)
    return True


def leftovers(output: Path) -> list[str]:
    return [p.name for p in output.parent.iterdir() if p != output]


def next_export(output: Path, model: Path) -> None:
    """What the next export to the same place does first, before it fails on its model."""
    from edgeattn.errors import EdgeattnError
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    with pytest.raises(EdgeattnError):
        export(model / "absent", Recipe("cpu"), output, force=True)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((signal.SIGINT, stage) for stage in STAGES),
        (signal.SIGKILL, "writing the graph"),
        (signal.SIGKILL, "proving the bundle"),
        (signal.SIGTERM, "proving the bundle"),
    ],
)
def test_a_signal_at_a_stage(
    tiny_checkpoint: Path, tmp_path: Path, kind: signal.Signals, stage: str
) -> None:
    output = tmp_path / "bundle"
    with start(tiny_checkpoint, output) as child:
        wait_for(child, stage)
        child.send_signal(kind)
        _, stderr = child.communicate(timeout=60)
    whole = is_whole_or_absent(output)
    assert whole == (stage == "committed")
    if kind == signal.SIGINT:
        assert leftovers(output) == []
        assert child.returncode == 130
        assert "Traceback" not in stderr
        assert "interrupted" in stderr
    next_export(output, tmp_path)
    assert leftovers(output) == []
    assert is_whole_or_absent(output) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_signal_at_any_time(tiny_checkpoint: Path, tmp_path: Path, seed: int) -> None:
    """Also while a bundle is replaced: the old one or the new one is there in the end."""
    draw = random.Random(seed)
    output = tmp_path / "bundle"
    existing = bool(seed % 2)
    if existing:
        with start(tiny_checkpoint, output, "--no-verify") as child:
            assert child.wait() == 0
    with start(tiny_checkpoint, output, "--force") as child:
        time.sleep(draw.uniform(0, 9))
        child.send_signal(draw.choice([signal.SIGINT, signal.SIGKILL]))
        child.communicate(timeout=60)
    if not existing:
        is_whole_or_absent(output)
    next_export(output, tmp_path)
    assert leftovers(output) == []
    assert is_whole_or_absent(output) or not existing


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_space_left(tiny_checkpoint: Path, small_disk: Path) -> None:
    with start(tiny_checkpoint, small_disk / "bundle") as child:
        _, stderr = child.communicate(timeout=60)
    check_refusal(child.returncode, stderr, "MB are free")
    assert list(small_disk.iterdir()) == []


def test_a_file_too_large(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What stands for a full disk where none can be mounted."""
    program = (
        """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""
        + PROGRAM
    )
    command = [sys.executable, "-B", "-c", program, "export", tiny_checkpoint, "--target", "cpu"]
    output = tmp_path / "folder" / "bundle"
    done = subprocess.run(
        [*command, "-o", output], capture_output=True, text=True, check=False, timeout=60
    )
    check_refusal(done.returncode, done.stderr, "File too large")
    assert list(output.parent.iterdir()) == []


def check_refusal(code: int, stderr: str, reason: str) -> None:
    assert code == 1, stderr
    assert "Traceback" not in stderr
    sentence = stderr.strip().splitlines()[-1]
    assert reason in sentence
    assert "free some space" in sentence
