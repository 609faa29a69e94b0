"""Opening a bundle: every change is refused, every manifest gives a bundle or a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.manifest import SCHEMA_VERSION, parse_manifest
from edgeattn.errors import BundleError

FILES = (
    "build_on_device.sh",
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "golden/decoder.npz",
    "model.onnx",
    "model.onnx.data",
    "report.json",
    "report/index.html",
    "tokenizer.json",
)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, path)
    return path


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle / "manifest.json").read_text())


def test_a_whole_bundle_opens(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert sorted(bundle.manifest.files) == sorted(FILES)
    assert bundle.manifest.schema_version == SCHEMA_VERSION
    assert bundle.manifest.verification.status == "passed"
    assert bundle.shape.num_layers == 3
    assert bundle.file("plugins/none.so") is None
    assert not (tiny_bundle / ".lock").exists()


def test_no_verify_is_written_down(export_tiny: Callable[..., Path]) -> None:
    manifest = Bundle.open(export_tiny("cpu", verify=False)).manifest
    assert manifest.verification.status == "skipped"
    assert "golden/decoder.npz" not in manifest.files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_changed_byte_is_refused(copy: Path, name: str, place: float) -> None:
    file = copy / name
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} with the sha256 .* changed"):
        Bundle.open(copy)
    assert Bundle.open(copy, check_hashes=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("check_hashes", [True, False])
def test_a_truncated_file_is_refused(copy: Path, name: str, check_hashes: bool) -> None:
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=f"{name} of .* bytes"):
        Bundle.open(copy, check_hashes=check_hashes)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}, .* the file is missing"):
        Bundle.open(copy)


def test_a_folder_in_a_files_place_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    with pytest.raises(BundleError, match="the file is missing"):
        Bundle.open(copy)


def test_files_of_others_are_left_alone(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt" not in Bundle.open(copy).manifest.files


@pytest.mark.parametrize("name", ["config.json", "model.onnx.data", "golden"])
def test_a_link_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "elsewhere"
    (copy / name).rename(moved)
    (copy / name).symlink_to(moved)
    with pytest.raises(BundleError, match="a link that leads elsewhere"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "golden/../../outside",
        "..",
        ".",
        "",
        "a//b",
        "./config.json",
        "golden/",
        "..\\outside",
        "C:\\outside",
        "C:outside",
        "a\0b",
    ],
)
def test_a_name_that_leads_outside_is_refused(
    copy: Path, manifest: dict[str, Any], name: str
) -> None:
    (copy.parent / "outside").write_text("")
    record = {"bytes": 0, "sha256": "0" * 64}
    files = {**manifest["files"], name: record}
    (copy / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(BundleError, match=r"outside the bundle|no plain file name"):
        Bundle.open(copy)


def test_a_name_no_disk_takes(copy: Path, manifest: dict[str, Any]) -> None:
    files = {**manifest["files"], "a" * 5000: {"bytes": 0, "sha256": "0" * 64}}
    (copy / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(BundleError, match=r"files that can be read|the file is missing"):
        Bundle.open(copy)


def test_a_graph_nobody_vouches_for_is_refused(changed: Callable[..., Path], tiny_bundle: Path):
    bundle = changed(tiny_bundle, files={})
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["model.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"model\.onnx among the files"):
        Bundle.open(bundle)


def test_a_newer_schema_is_refused(copy: Path, manifest: dict[str, Any]) -> None:
    newer = {**manifest, "schema_version": SCHEMA_VERSION + 1, "unheard_of": 1}
    (copy / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(BundleError, match="upgrade edgeattn"):
        Bundle.open(copy)


@pytest.mark.parametrize("kind", ["absent", "empty folder", "file"])
def test_no_bundle(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bundle"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match=f"a bundle at {path}"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_layers": 3},
        {"layer_cycle": 3},
        {"layer_cycle": [{"rope": {"dim": 4, "theta": 1.0, "scaling": []}, "window": None}]},
        {"family": "llama", "num_layers": "three", "layer_cycle": []},
    ],
)
def test_a_shape_that_does_not_add_up(
    changed: Callable[..., Path], tiny_bundle: Path, shape: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match="the model's shape"):
        _ = Bundle.open(changed(tiny_bundle, shape=shape)).shape


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.text() | st.binary())
@example("")
@example("[]")
@example("null")
@example("{}")
@example('{"schema_version": true}')
@example("[" * 100_000)
@example('{"a":' * 100_000)
@example("1" * 10_000)
def test_any_text_is_a_manifest_or_a_sentence(text: str | bytes) -> None:
    with contextlib.suppress(BundleError):
        parse_manifest(text, "manifest.json")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_field_is_a_manifest_or_a_sentence(
    data: st.DataObject, manifest: dict[str, Any]
) -> None:
    key = data.draw(st.sampled_from(sorted(manifest)))
    value = data.draw(json_values)
    changed = {**manifest, key: value}
    if data.draw(st.booleans()) and isinstance(manifest[key], dict):
        inner = data.draw(st.sampled_from([*manifest[key], "new"]))
        changed[key] = {**manifest[key], inner: value}
    with contextlib.suppress(BundleError):
        parse_manifest(json.dumps(changed), "manifest.json")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_file_name_is_inside_or_refused(
    name: str, manifest: dict[str, Any], tiny_bundle: Path
) -> None:
    record = {"bytes": 0, "sha256": "0" * 64}
    with contextlib.suppress(BundleError):
        parsed = parse_manifest(json.dumps({**manifest, "files": {name: record}}), "manifest")
        (kept,) = parsed.files
        assert (tiny_bundle / kept).resolve().is_relative_to(tiny_bundle.resolve())
