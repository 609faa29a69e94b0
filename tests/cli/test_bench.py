"""`edgeattn bench`, through the command line's own group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeattn.runtime import Session

Run = Callable[..., Any]
FEW = ("--tokens", 12, "--new-tokens", 2, "--repeats", 2, "--warmup", 0, "--threads", 1)


@pytest.fixture(scope="module")
def record(tiny_bundle: Path) -> dict[str, Any]:
    from edgeattn.runtime.bench import Amount, bench

    amount = Amount(tokens=12, new_tokens=2, repeats=2, warmup=0)
    return bench(tiny_bundle, amount, threads=1).to_dict()


@pytest.fixture
def written(tmp_path: Path, record: dict[str, Any]) -> Callable[..., Path]:
    """A function that writes the record to a new file, with values by dotted name."""

    def write(**values: Any) -> Path:
        content = json.loads(json.dumps(record))
        for name, value in values.items():
            *outer, last = name.split("__")
            place = content
            for key in outer:
                place = place[int(key) if key.isdigit() else key]
            place[last] = value
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps(content))
        return file

    return write


def refused(result: Any, *words: str, exit_code: int = 1) -> bool:
    """One sentence on standard error, nothing on standard output."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    return True


def test_table(edgeattn: Run, tiny_bundle: Path) -> None:
    done = edgeattn("bench", tiny_bundle, *FEW)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    for name in ("prefill", "decode"):
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.count(" ms ") == 2
        assert "tokens/s" in line
    assert any(line.startswith("measured on cpu (") for line in lines)
    assert any(line.startswith("peak memory ") and "; cache " in line for line in lines)


def test_what_the_machine_does_not_show(
    edgeattn: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeattn.devices.sensors import Reading

    readings = [Reading({"cpu": 1000.0}, {}, None), Reading({"cpu": 1500.0}, {}, None)]
    monkeypatch.setattr("edgeattn.runtime.bench.read_sensors", lambda: readings.pop(0))
    lines = edgeattn("bench", tiny_bundle, *FEW).stdout.splitlines()
    assert "clocks: cpu 1000 → 1500 MHz" in lines
    assert "temperature: not shown by this machine" in lines
    assert "power mode: not shown by this machine" in lines


def test_json_and_file(edgeattn: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    done = edgeattn("bench", tiny_bundle, *FEW, "--json", "-o", file)
    found = json.loads(done.stdout)
    assert found == json.loads(file.read_text())
    assert found["quantity"] == {"kind": "decoder", "rows": 1, "tokens": 12, "new_tokens": 2}
    assert found["setup"]["threads"] == 1
    assert [one["samples"] for one in found["phases"]] == [2, 4]
    assert refused(edgeattn("bench", tiny_bundle, *FEW, "-o", file), str(file), "--force")
    assert edgeattn("bench", tiny_bundle, *FEW, "-o", file, "--force").exit_code == 0
    compared = edgeattn("bench", "--compare", file, file, "--json")
    assert {one["ratio"] for one in json.loads(compared.stdout)["ratios"]} == {1.0}


@pytest.mark.parametrize("at", [1, 3, 5])
def test_interrupted(
    edgeattn: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run, count = Session.run, [0]

    def interrupt(*given: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return run(*given, **more)

    monkeypatch.setattr(Session, "run", interrupt)
    done = edgeattn("bench", tiny_bundle, *FEW, "-o", tmp_path / "a.json")
    assert done.exit_code == 130
    assert "nothing half-written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupted_while_writing(
    edgeattn: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old record stays as it was."""
    file = tmp_path / "a.json"
    file.write_text("old")

    def interrupt(self: Path, target: Path) -> None:
        assert target == file
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    assert edgeattn("bench", tiny_bundle, *FEW, "-o", file, "--force").exit_code == 130
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_refusals(edgeattn: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    assert refused(edgeattn("bench", tmp_path / "no"), "a bundle at")
    assert refused(
        edgeattn("bench", tiny_bundle, "--backend", "tf"), "a known backend", exit_code=2
    )
    asked = edgeattn("bench", tiny_bundle, "--device", "jetson-orin", *FEW)
    assert refused(asked, "to run on jetson-orin", "the model runs on cpu here")
    assert edgeattn("bench", tiny_bundle, "--device", "cpu", *FEW).exit_code == 0
    assert edgeattn("bench").exit_code == 2
    both = edgeattn("bench", tiny_bundle, "--compare", "a.json", "b.json")
    assert both.exit_code == 2
    assert "either BUNDLE or --compare" in both.stderr
    lost = edgeattn("bench", tiny_bundle, *FEW, "-o", tmp_path / "no" / "a.json")
    assert refused(lost, "no")


def test_compare(edgeattn: Run, written: Callable[..., Path]) -> None:
    first = written(peak_memory_bytes=100, machine__device="cpu")
    second = written(peak_memory_bytes=250, machine__device="l4")
    done = edgeattn("bench", "--compare", first, second)
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if "peak memory" in line)
    assert line.split()[-1] == "2.500"
    assert "machine: device is cpu in A, l4 in B" in done.stdout
    assert "the machines differ" in done.stdout
    assert "the machines differ" not in edgeattn("bench", "--compare", first, first).stdout


def test_compare_refuses_another_quantity(edgeattn: Run, written: Callable[..., Path]) -> None:
    done = edgeattn("bench", "--compare", written(), written(quantity__tokens=13))
    assert refused(done, "same quantity", "1 x 12 + 2 new tokens, B of decoder, 1 x 13")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"schema_version": 2}, "schema_version is 2, not 1"),
        ({"schema_version": None}, "schema_version is None"),
        ({"phases__0__median_seconds": float("nan")}, "phases.0.median_seconds"),
        ({"phases__0__p90_seconds": float("inf")}, "phases.0.p90_seconds"),
        ({"phases__1__median_seconds": 0.0}, "phases.1.median_seconds"),
        ({"phases__0__median_seconds": "1"}, "phases.0.median_seconds"),
        ({"before__temperatures_c": {"gpu": float("nan")}}, "before.temperatures_c"),
        ({"machine": 3}, "machine"),
        ({"more": 3}, "more"),
    ],
)
def test_records_that_do_not_fit(
    edgeattn: Run, written: Callable[..., Path], values: dict[str, Any], word: str
) -> None:
    good, bad = written(), written(**values)
    for pair in ((good, bad), (bad, good)):
        assert refused(edgeattn("bench", "--compare", *pair), str(bad), word)


@pytest.mark.parametrize(
    "content",
    [b"", os.urandom(4096), b"[]", b"7", b"[" * 100_000, b'{"a":' * 100_000, b" " * (1 << 21)],
    ids=["empty", "random", "list", "number", "deep list", "deep object", "huge"],
)
def test_files_that_are_no_record(
    edgeattn: Run, written: Callable[..., Path], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    done = edgeattn("bench", "--compare", file, written())
    assert refused(done, "a record of `edgeattn bench`", str(file))
    assert refused(edgeattn("bench", "--compare", tmp_path, file), "the system says")
