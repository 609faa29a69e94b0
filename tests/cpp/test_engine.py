"""An engine in the wrong place gets the same sentence in C++ as in Python."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from machines import BARE_MACHINE

from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.libcuda import GpuFacts
from edgeattn.engine.flavours import Flavour
from edgeattn.engine.record import EngineRecord, PluginRecord, read_engine, require_runs_here
from edgeattn.errors import EdgeattnError, LoweringError

SM, ARCH, VERSION = 87, "aarch64", "10.3.0"
DEVICE = dataclasses.replace(
    BARE_MACHINE,
    arch=ARCH,
    gpu=GpuFacts("made", SM, 8_000_000_000, 7_000_000_000),
    gpu_problem="",
    tensorrt=VERSION,
)
CONTENT, GRAPH = b"an engine", b"a graph"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    (path / "engines").mkdir(parents=True)
    (path / "model.onnx").write_bytes(GRAPH)
    target = {"name": "x@y", "flavour": "tensorrt", "sm": SM, "software_version": None}
    verification = {"status": "skipped", "backends": [], "tensorrt": "not checked"}
    manifest = {
        "schema_version": 1,
        **{name: {} for name in ("tools", "source", "recipe", "lowering", "shape")},
        "target": target,
        "plugin_abi": 1,
        "verification": verification,
        "files": {"model.onnx": {"bytes": len(GRAPH), "sha256": sha256(GRAPH)}},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


RECORD = EngineRecord(
    schema_version=1,
    edgeattn="0.1.0",
    engine="made.engine",
    bytes=len(CONTENT),
    sha256=sha256(CONTENT),
    model_sha256=sha256(GRAPH),
    targets=("x@y",),
    flavour="tensorrt",
    tensorrt=VERSION,
    sms=(SM,),
    arch=ARCH,
    gpu=None,
    driver=None,
    plugins=None,
    profiles={},
    stripped=False,
    layers=0,
    layer_source="network",
    layer_list=(),
    seconds={},
    peak_rss_mb=None,
)
OTHER_ABI = PluginRecord(abi=2, file="plugins/x.so", sha256="", layers=1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sms": (80, 120)},
        {"arch": "x86_64"},
        {"bytes": 3},
        {"sha256": "0" * 64},
        {"model_sha256": "0" * 64},
        {"plugins": OTHER_ABI},
    ],
    ids=lambda change: "-".join(change) or "fits",
)
def test_both_languages_say_the_same(
    runtime: Any, bundle: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)
    engine = bundle / "engines" / "made.engine"
    engine.write_bytes(CONTENT)
    record = RECORD.model_copy(update=change)
    engine.with_name("made.engine.json").write_text(record.to_json())
    expected = ""
    try:
        require_runs_here(read_engine(engine), Bundle.open(bundle), DEVICE)
    except EdgeattnError as error:
        expected = f"{5 if isinstance(error, LoweringError) else 3}: {error}"
    assert bool(expected) == bool(change)
    given = f"{engine} {bundle} {SM} {ARCH}\n"
    assert runtime.drive("engine", given.encode()).decode() == f"{expected}\n"


def test_a_record_that_is_missing_or_broken_is_refused(runtime: Any, bundle: Path) -> None:
    engine = bundle / "engines" / "made.engine"
    given = f"{engine} {bundle} {SM} {ARCH}\n".encode()
    assert b"there is no such file" in runtime.drive("engine", given)
    for text in (b"", b"[]", b"{}", b'{"bytes": -1}', b"\xff"):
        engine.with_name("made.engine.json").write_bytes(text)
        assert runtime.drive("engine", given).startswith(b"3: expected ")
