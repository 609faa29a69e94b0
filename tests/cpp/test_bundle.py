"""C++ and Python give the same verdict on every bundle."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import BundleError

CONTENTS = {"model.onnx": b"a graph", "golden/decoder.npz": b"x" * 3000, "empty": b""}
MANIFEST = {
    "schema_version": 1,
    "tools": {"edgeattn": "0.1.0"},
    "source": {"repo": "made \u00e9", "size": 1.5},
    "recipe": {"weights": "w4"},
    "lowering": {"layers": [{"op": None}]},
    "shape": {"num_layers": 1},
    "target": {
        "name": "orin@jetpack-6.2",
        "flavour": "tensorrt",
        "sm": 87,
        "software_version": "10.3",
    },
    "plugin_abi": 1,
    "verification": {"status": "passed", "backends": ["numpy"], "tensorrt": "not checked"},
    "quality": None,
    "files": {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    },
}
Verdict = Callable[[Path], str]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    for name, content in CONTENTS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    write(path, MANIFEST)
    return path


@pytest.fixture(scope="session")
def cpp(runtime: Any) -> Iterator[Verdict]:
    """One process for all; a sanitizer that finds something ends it."""
    command = [runtime.driver, "open"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def verdict(path: Path) -> str:
            process.stdin.write(f"{path}\n".encode())
            process.stdin.flush()
            line = process.stdout.readline().decode("utf-8", "replace")
            assert line.endswith("\n"), "the driver ended"
            return line[:-1]

        yield verdict
        process.stdin.close()
        assert process.wait() == 0  # LeakSanitizer speaks at the end


def write(path: Path, manifest: object) -> None:
    (path / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def python(path: Path) -> str:
    try:
        Bundle.open(path)
    except BundleError as error:
        return str(error).replace("\n", " ")
    return ""


def changed(*keys: str, to: object) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    place: Any = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return manifest


def test_a_whole_bundle_opens(bundle: Path, cpp: Verdict) -> None:
    assert python(bundle) == cpp(bundle) == ""


def _link_out(path: Path) -> None:
    outside = path.parent / "outside"
    (path / "golden").rename(outside)
    (path / "golden").symlink_to(outside)


def _drop_model(path: Path) -> None:
    files = {name: record for name, record in MANIFEST["files"].items() if name != "model.onnx"}
    write(path, {**MANIFEST, "files": files})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path / "golden/decoder.npz", 2999),
    "changed": lambda path: (path / "model.onnx").write_bytes(b"A graph"),
    "missing file": lambda path: (path / "empty").unlink(),
    "folder for a file": lambda path: ((path / "empty").unlink(), (path / "empty").mkdir()),
    "fifo for a file": lambda path: ((path / "empty").unlink(), os.mkfifo(path / "empty")),
    "link in the way": _link_out,
    "link to a file": lambda path: (
        (path / "empty").unlink(),
        (path / "empty").symlink_to(path / "model.onnx"),
    ),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "newer schema": lambda path: write(path, {**MANIFEST, "schema_version": 2}),
    "much newer schema": lambda path: write(path, {**MANIFEST, "schema_version": 2**63}),
    "no JSON": lambda path: (path / "manifest.json").write_bytes(b"{"),
    "empty manifest": lambda path: (path / "manifest.json").write_bytes(b""),
    "a list": lambda path: write(path, [MANIFEST]),
    "endless nesting": lambda path: (path / "manifest.json").write_bytes(b"[" * 200_000),
    "no model listed": _drop_model,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_has_the_same_sentence_in_both_languages(
    bundle: Path, cpp: Verdict, name: str
) -> None:
    DAMAGE[name](bundle)
    sentence = cpp(bundle)
    assert sentence
    assert sentence == python(bundle)


def test_nothing_there_has_the_same_sentence(tmp_path: Path, cpp: Verdict) -> None:
    assert cpp(tmp_path / "none") == python(tmp_path / "none") != ""


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../b", "./a", "a//b", "a/", "", ".", "..", "a\\b", "c:x", "a\0b"],
)
def test_paths_that_lead_outside_are_refused(bundle: Path, cpp: Verdict, name: str) -> None:
    write(bundle, changed("files", name, to=MANIFEST["files"]["empty"]))
    for sentence in (python(bundle), cpp(bundle)):
        assert sentence.startswith("expected a valid field 'files")
        assert "leads outside the bundle" in sentence or "is no plain file name" in sentence


@pytest.mark.parametrize("depth", [150, 190, 197, 198, 199, 200, 201, 202, 300])
def test_nesting_is_believed_to_the_same_depth(bundle: Path, cpp: Verdict, depth: int) -> None:
    nested: object = 1
    for _ in range(depth):
        nested = [nested]
    write(bundle, changed("source", "nested", to=nested))
    assert bool(python(bundle)) == bool(cpp(bundle)) == (depth > 198)


def _paths(value: object, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*at, name)
            yield from _paths(inner, (*at, name))


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
_FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_FUZZ
@given(st.sampled_from(sorted(_paths(MANIFEST))), _ANY, st.sampled_from(["set", "drop", "add"]))
def test_a_changed_field_gets_the_same_verdict(
    bundle: Path, cpp: Verdict, keys: tuple[str, ...], value: Any, how: str
) -> None:
    manifest = changed(*keys, to=value) if how == "set" else copy.deepcopy(MANIFEST)
    place: Any = manifest
    for key in keys[:-1]:
        place = place[key]
    if how == "drop":
        del place[keys[-1]]
    elif how == "add":
        place["another"] = value
    write(bundle, manifest)
    assert bool(cpp(bundle)) == bool(python(bundle)), (cpp(bundle), python(bundle))


@_FUZZ
@given(st.data())
def test_changed_bytes_are_refused_or_read_as_python_reads_them(
    bundle: Path, cpp: Verdict, data: st.DataObject
) -> None:
    text = bytearray(json.dumps(MANIFEST), "utf-8")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from((0, 1, 1, 1, 40)))
        text[start:end] = data.draw(st.binary(max_size=3))
    (bundle / "manifest.json").write_bytes(text)
    # Python also believes NaN and numbers beyond 64 bits, so this is one-sided.
    if not cpp(bundle):
        assert not python(bundle)
