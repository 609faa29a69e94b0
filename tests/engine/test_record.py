"""An engine in the wrong place: each case has its sentence, before TensorRT is asked."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fake_engine import GPU, SM, VERSION, write_engine
from machines import BARE_MACHINE

from edgeattn.bundle.bundle import Bundle, hash_file
from edgeattn.devices.libcuda import GpuFacts
from edgeattn.engine.embed_cubins import TABLE_MARKER
from edgeattn.engine.flavours import Flavour
from edgeattn.engine.plugins import PLUGIN_ABI
from edgeattn.engine.record import Engine, choose_engine, read_engines, require_runs_here
from edgeattn.errors import (
    BundleError,
    EdgeattnError,
    LoweringError,
    MissingDependencyError,
)

HERE = platform.machine()
OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE]
MACHINES = {"x86_64": 62, "aarch64": 183}
LIBRARY = "plugins/here/libedgeattn_plugins.so"
DEVICE = replace(
    BARE_MACHINE,
    arch=HERE,
    gpu=GpuFacts(GPU, SM, 80_000_000_000, 79_000_000_000),
    gpu_problem="",
    driver="13.2",
    tensorrt=VERSION,
    free_memory_bytes=8_000_000_000,
    total_memory_bytes=8_000_000_000,
)


@pytest.fixture
def bundle(export_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    exported = export_tiny("a100", batch=2, context=128, verify=False)
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is installed; what it is asked never comes so far."""
    monkeypatch.setattr(Flavour, "is_available", lambda self: True)


def write_library(bundle: Path, arch: str = HERE, abi: int = PLUGIN_ABI, more: bytes = b"") -> str:
    """Writes a plugin library that has no kernels; its hash."""
    table = {"abi": abi, "arch": arch, "ops": [], "variants": []}
    table |= {"tensorrt_headers": "10.3", "triton": "3.9", "kernels_sha256": ""}
    elf = b"\x7fELF".ljust(18, b"\0") + MACHINES[arch].to_bytes(2, "little")
    marked = b"\0" + TABLE_MARKER.encode() + json.dumps(table).encode() + b"\0"
    file = bundle / LIBRARY
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(elf + marked + more)
    return hash_file(file)


def with_plugins(sha256: str, abi: int = PLUGIN_ABI) -> dict[str, Any]:
    """The part of a record that names the library."""
    return {"plugins": {"abi": abi, "file": LIBRARY, "sha256": sha256, "layers": 2}}


def truncated(bundle: Path) -> Engine:
    engine = write_engine(bundle)
    os.truncate(engine.path, engine.path.stat().st_size - 1)
    return engine


def changed(bundle: Path) -> Engine:
    engine = write_engine(bundle)
    content = engine.path.read_bytes()
    engine.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return engine


def gone(bundle: Path) -> Engine:
    engine = write_engine(bundle)
    engine.path.unlink()
    return engine


def of_another_graph(bundle: Path) -> Engine:
    return write_engine(bundle, record={"model_sha256": "0" * 64})


def with_another_library(bundle: Path) -> Engine:
    engine = write_engine(bundle, record=with_plugins(write_library(bundle)))
    write_library(bundle, more=b"rebuilt")
    return engine


def with_a_library_of_another_processor(bundle: Path) -> Engine:
    return write_engine(bundle, record=with_plugins(write_library(bundle, OTHER)))


def with_a_library_of_another_abi(bundle: Path) -> Engine:
    sha256 = write_library(bundle, abi=PLUGIN_ABI + 1)
    return write_engine(bundle, record=with_plugins(sha256))


def with_plugins_of_another_abi(bundle: Path) -> Engine:
    sha256 = write_library(bundle)
    return write_engine(bundle, record=with_plugins(sha256, PLUGIN_ABI + 1))


def without_its_library(bundle: Path) -> Engine:
    return write_engine(bundle, record=with_plugins("0" * 64))


def of_another_processor(bundle: Path) -> Engine:
    return write_engine(bundle, record={"arch": OTHER})


NO_GPU = replace(DEVICE, gpu=None, gpu_problem="there is no libcuda.so.1")
HOPPER = replace(DEVICE, gpu=GpuFacts("NVIDIA H100", 90, 80_000_000_000, 79_000_000_000))
WRONG_PAIRS = {
    "no GPU": (
        *(write_engine, NO_GPU, LoweringError),
        r"a GPU with SM 80, to run .*, but this machine has none \(there is no libcuda.so.1\)",
    ),
    "another SM": (
        *(write_engine, HOPPER, LoweringError),
        r"an engine for SM 90, .*it was built for SM 80: build one here",
    ),
    "another major of TensorRT": (
        *(write_engine, replace(DEVICE, tensorrt="10.3.0"), LoweringError),
        r"an engine for TensorRT 10.3.0, .*it was built by TensorRT 11.1.0",
    ),
    "another patch of TensorRT": (
        *(write_engine, replace(DEVICE, tensorrt="11.1.1"), LoweringError),
        r"an engine for TensorRT 11.1.1, .*it was built by TensorRT 11.1.0",
    ),
    "another processor": (
        *(of_another_processor, DEVICE, LoweringError),
        rf"an engine for {HERE}, .*it was built on {OTHER}",
    ),
    "a truncated engine": (truncated, DEVICE, BundleError, r"of \d+ bytes, .*but it has \d+: copy"),
    "a changed engine": (changed, DEVICE, BundleError, r"its content was changed: copy it again"),
    "no engine": (gone, DEVICE, BundleError, r"the engine .*but there is none: copy it again"),
    "a graph exported again": (
        *(of_another_graph, DEVICE, BundleError),
        r"from the bundle's own graph, but the graph is another one: the bundle was exported again",
    ),
    "a plugin library that was built again": (
        *(with_another_library, DEVICE, BundleError),
        r"the plugin library that .* was built with, but .* is another one",
    ),
    "a plugin library for another processor": (
        *(with_a_library_of_another_processor, DEVICE, BundleError),
        rf"a plugin library for {HERE}, but .* is for {OTHER}",
    ),
    "a plugin library of another ABI": (
        *(with_a_library_of_another_abi, DEVICE, BundleError),
        rf"a plugin library of ABI {PLUGIN_ABI}, but .* is of ABI {PLUGIN_ABI + 1}",
    ),
    "plugins of another ABI": (
        *(with_plugins_of_another_abi, DEVICE, BundleError),
        rf"plugins of ABI {PLUGIN_ABI}, but .* of ABI {PLUGIN_ABI + 1}: export the bundle again",
    ),
    "no plugin library": (
        *(without_its_library, DEVICE, BundleError),
        r"edgeattn's plugin library at .*, but there is none",
    ),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_each_wrong_pair_has_its_sentence(name: str, bundle: Path) -> None:
    make, found, kind, sentence = WRONG_PAIRS[name]
    engine = make(bundle)
    with pytest.raises(EdgeattnError) as refusal:
        require_runs_here(engine, Bundle.open(bundle), found)
    assert type(refusal.value) is kind
    assert re.search(sentence, str(refusal.value)), refusal.value
    assert "\n" not in str(refusal.value)


def test_missing_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "is_available", lambda self: False)
    engine = write_engine(bundle)
    with pytest.raises(MissingDependencyError, match=r"TensorRT, .*no Python module tensorrt .*"):
        require_runs_here(engine, Bundle.open(bundle), replace(DEVICE, tensorrt=None))


def test_the_right_pair_is_taken(bundle: Path) -> None:
    engine = write_engine(bundle, record=with_plugins(write_library(bundle)))
    assert choose_engine(Bundle.open(bundle), DEVICE) == engine
    build = replace(DEVICE, tensorrt="11.1.0.7")  # a build of the same release
    assert choose_engine(Bundle.open(bundle), build) == engine


def test_of_several_the_newest_that_runs_is_chosen(bundle: Path) -> None:
    engine = write_engine(bundle)
    for file in (engine.path, engine.path.with_name(f"{engine.path.name}.json")):
        os.utime(file, (1, 1))
        other = file.with_name(file.name.replace("sm80", "sm90"))
        other.write_text(file.read_text().replace(SM_LINE, SM_LINE.replace("80", "90")))
    newest, _ = read_engines(Bundle.open(bundle))
    assert newest.record.sms == (90,)
    assert choose_engine(Bundle.open(bundle), DEVICE) == engine


SM_LINE = '"sms": [\n    80\n  ]'


def test_where_none_runs_the_newest_is_explained(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"an engine in .*but there is none: build one with"):
        choose_engine(Bundle.open(bundle), DEVICE)
    write_engine(bundle)
    with pytest.raises(LoweringError, match="an engine for SM 90"):
        choose_engine(Bundle.open(bundle), HOPPER)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema_version": "1"}', b"\xff"])
def test_a_record_that_does_not_read(bundle: Path, content: bytes) -> None:
    engine = write_engine(bundle)
    engine.path.with_name(f"{engine.path.name}.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"the record of an engine in .*but it does not read"):
        choose_engine(Bundle.open(bundle), DEVICE)
