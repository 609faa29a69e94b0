"""Kernels -> plugin library: cross-compiled, embedded, linked, and kept for the next time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from edgeattn.devices.registry import Target, all_devices
from edgeattn.engine.plugins import (
    LIBRARY,
    PluginLibrary,
    plugin_nodes,
    read_library,
    require_variants,
    runs_on,
)
from edgeattn.engine.tensorrt_rtx import is_available
from edgeattn.engine.toolchain import ARCHITECTURES, Toolchain, build_library, find_toolchain
from edgeattn.errors import BundleError, LoweringError, UsageError, unknown_name
from edgeattn.ops import find_op

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from edgeattn.kernels.manifest import Manifest

Progress = Callable[[str, int, int], None]

COMPILING, LINKING = "compiling kernels", "building the library"


def cache_folder() -> Path:
    """Where compiled kernels and libraries are kept, as the XDG specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edgeattn")


def default_sms(arch: str) -> tuple[int, ...]:
    """The GPUs of all known targets whose processor is of an architecture."""
    found = {
        device.gpu.sm
        for device in all_devices()
        if device.gpu is not None and device.gpu.host == arch
    }
    return tuple(sorted(found))


def build_plugins(
    arch: str,
    sms: Sequence[int],
    *,
    subset: str | None = None,
    tensorrt: Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PluginLibrary:
    """Builds the plugin library, or takes what it can from the cache.

    Args:
        arch: "x86_64" or "aarch64"; no machine of that kind is needed.
        sms: GPUs to compile kernels for; none is needed either.
        subset: of the table of variants; None for all.
        tensorrt: folder of TensorRT's headers, instead of looking.
        jobs: compilers at a time; None for one per processor.
        progress: called with (stage, done, total).

    Returns:
        The library, in the cache, where `finished_library` finds it again.

    Raises:
        MissingDependencyError: a tool is missing; the sentence says what to install.
        LoweringError: a kernel does not compile.
        BundleError: the library does not.
    """
    if arch not in ARCHITECTURES:
        raise unknown_name("architecture", arch, ARCHITECTURES)
    toolchain = find_toolchain(arch, tensorrt=tensorrt)  # before minutes of compiling
    from edgeattn.engine.embed_cubins import embed_cubins
    from edgeattn.kernels.aot import compile_variants, write
    from edgeattn.kernels.manifest import MANIFEST
    from edgeattn.kernels.variants import load_variants

    cubins = cache_folder() / "cubins"
    manifest = compile_variants(
        load_variants(subset),
        sms,
        cache=cubins,
        jobs=jobs,
        progress=(lambda done, all: progress(COMPILING, done, all)) if progress else None,
    )
    if progress:
        progress(LINKING, 0, 1)
    with (
        as_file(files("edgeattn.plugins")) as sources,
        _alone(cache_folder() / "plugins" / _build_key(toolchain, sources, manifest)) as folder,
    ):
        write(manifest, folder / "cubins", cache=cubins)
        embed_cubins(folder / "cubins" / MANIFEST, folder / "embedded")
        library = read_library(
            build_library(toolchain, sources, folder / "embedded", folder / "build")
        )
        library.require(arch)
        library = place_library(library, _finished(arch, sms, subset))
    if progress:
        progress(LINKING, 1, 1)
    return library


def finished_library(
    arch: str, sms: Sequence[int], *, subset: str | None = None
) -> PluginLibrary | None:
    """What `build_plugins` made of these very sources before; needs no tool.

    Returns:
        None where it was not built, or the file is damaged.
    """
    try:
        return read_library(_finished(arch, sms, subset) / arch / LIBRARY)
    except BundleError:
        return None


@dataclass(frozen=True)
class Plugins:
    """The libraries of one graph.

    Attributes:
        target: for the device, which the bundle carries.
        host: for the check with TensorRT-RTX on this machine; None where that has no part, or where
            a library was given for the device and none is there for this machine.
    """

    target: PluginLibrary
    host: PluginLibrary | None


def given_library(file: Path, target: Target) -> PluginLibrary:
    """The library a user names, where the target can load it.

    Raises:
        UsageError: nothing on the target loads plugins.
        BundleError: the file is no library of plugins, or one for another processor.
        LoweringError: it has no kernels for the target's GPU.
    """
    gpu = target.device.gpu
    if gpu is None or target.flavour == "onnxruntime":
        raise UsageError(
            expected="--plugin-lib for a target with TensorRT",
            came=f"{target.name} runs ONNX Runtime, which takes the operators' function bodies",
            todo="leave --plugin-lib out",
        )
    library = read_library(file)
    library.require(gpu.host)
    if not any(runs_on(gpu.sm, sm) for sm in library.sms):
        raise LoweringError(
            expected=f"a plugin library with kernels for SM {gpu.sm}",
            came=f"{file} has those for {', '.join(f'SM {sm}' for sm in library.sms) or 'none'}",
            todo=f"build one with edgeattn plugins build --arch {gpu.host} --sm {gpu.sm}",
        )
    return library


def plugins_for(
    model_file: Path,
    target: Target,
    *,
    library: PluginLibrary | None = None,
    progress: Progress | None = None,
) -> Plugins | None:
    """The libraries a graph needs, None where no node has a plugin or nothing would load one.

    Args:
        model_file: the graph.
        target: the device it was exported for.
        library: from `given_library`, instead of one that is built.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: the library cannot be built, or has no kernel for a node.
    """
    nodes = plugin_nodes(onnx.load(model_file, load_external_data=False))
    gpu = target.device.gpu
    if gpu is None or target.flavour == "onnxruntime":
        return None
    if not any(find_op(node.op).plugin for node in nodes):
        return None
    chosen = library or _library(gpu.host, gpu.sm, progress)
    require_variants(chosen, nodes, gpu.sm)
    if not is_available():
        return Plugins(chosen, None)
    here, sm = platform.machine(), gpu.nearest_rtx_sm
    if chosen.arch == here and any(runs_on(sm, compiled) for compiled in chosen.sms):
        return Plugins(chosen, chosen)
    # Who gives a library may lack the tools that build one.
    host = _library(here, sm, progress) if library is None else finished_library(here, [sm])
    return Plugins(chosen, host)


def _library(arch: str, sm: int, progress: Progress | None) -> PluginLibrary:
    return finished_library(arch, [sm]) or build_plugins(arch, [sm], progress=progress)


def place_library(library: PluginLibrary, folder: Path) -> PluginLibrary:
    """Copies a library to `folder`/ARCH, where it appears whole or not at all."""
    place = folder / library.arch
    place.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{LIBRARY}.", dir=place)
    os.close(descriptor)
    partial = Path(name)
    try:
        shutil.copyfile(library.path, partial)
        partial.chmod(0o644)  # which mkstemp keeps to its owner
        partial.replace(place / LIBRARY)
    finally:
        partial.unlink(missing_ok=True)
    return read_library(place / LIBRARY)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder of a build, when no other process builds there any more."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _build_key(toolchain: Toolchain, sources: Path, manifest: Manifest) -> str:
    """Which builds share a folder: CMake finds out itself what of the sources has changed."""
    facts = {"sources": str(sources), "kernels": manifest.kernels_sha256}
    return _hashed(toolchain.arch, {**toolchain.to_dict(), **facts})


def _finished(arch: str, sms: Sequence[int], subset: str | None) -> Path:
    """The folder of the library that is made of this edgeattn's sources."""
    sources = {
        f"{package}/{name}": hashlib.sha256(content).hexdigest()
        for package in ("kernels", "ops", "plugins")
        for name, content in _contents(files(f"edgeattn.{package}"))
    }
    facts = {"sms": sorted(set(sms)), "subset": subset, "sources": sources}
    return cache_folder() / "libraries" / _hashed(arch, facts)


def _contents(folder: Traversable) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a folder and those below."""
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry.name, entry.read_bytes()
        elif entry.name != "__pycache__":
            yield from ((f"{entry.name}/{name}", content) for name, content in _contents(entry))


def _hashed(arch: str, facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True)
    return f"{arch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
