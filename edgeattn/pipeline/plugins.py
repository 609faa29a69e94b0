"""Kernels -> plugin library: cross-compiled, embedded, linked, and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from edgeattn.devices.registry import Target, all_devices
from edgeattn.engine.plugins import (
    LIBRARY,
    PluginLibrary,
    plugin_nodes,
    read_library,
    require_variants,
)
from edgeattn.engine.tensorrt_rtx import is_available
from edgeattn.engine.toolchain import ARCHITECTURES, Toolchain, build_library, find_toolchain
from edgeattn.errors import unknown_name
from edgeattn.ops import find_op

if TYPE_CHECKING:
    pass

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
        The library, in the cache.

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
    folder = cache_folder() / "plugins" / _key(toolchain, manifest.kernels_sha256)
    write(manifest, folder / "cubins", cache=cubins)
    embed_cubins(folder / "cubins" / MANIFEST, folder / "embedded")
    with as_file(files("edgeattn.plugins")) as sources:
        built = build_library(toolchain, sources, folder / "embedded", folder / "build")
    library = read_library(built)
    library.require(arch)
    if progress:
        progress(LINKING, 1, 1)
    return library


@dataclass(frozen=True)
class Plugins:
    """The libraries of one graph.

    Attributes:
        target: for the device, which the bundle carries.
        host: for the check with TensorRT-RTX on this machine; None where that has no part.
    """

    target: PluginLibrary
    host: PluginLibrary | None


def plugins_for(
    model_file: Path,
    target: Target,
    *,
    library: Path | None = None,
    progress: Progress | None = None,
) -> Plugins | None:
    """The libraries a graph needs, None where no node has a plugin or nothing would load one.

    Args:
        model_file: the graph.
        target: the device it was exported for.
        library: a library to take for the device instead of building one.
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
    arch = gpu.host
    if library is None:
        chosen = build_plugins(arch, [gpu.sm], progress=progress)
    else:
        chosen = read_library(library)
        chosen.require(arch)
    require_variants(chosen, nodes, gpu.sm)
    host = platform.machine()
    checked = None
    if is_available():
        same = arch == host and gpu.sm == gpu.nearest_rtx_sm
        checked = chosen if same else build_plugins(host, [gpu.nearest_rtx_sm], progress=progress)
    return Plugins(chosen, checked)


def place_library(library: PluginLibrary, folder: Path) -> PluginLibrary:
    """Copies a library to `folder`/ARCH, where it appears whole or not at all."""
    place = folder / library.arch
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{LIBRARY}.partial"
    try:
        shutil.copyfile(library.path, partial)
        partial.replace(place / LIBRARY)
    finally:
        partial.unlink(missing_ok=True)
    return read_library(place / LIBRARY)


def _key(toolchain: Toolchain, kernels_sha256: str) -> str:
    """Which builds share a folder: CMake finds out itself what of the sources has changed."""
    text = json.dumps({**toolchain.to_dict(), "kernels": kernels_sha256}, sort_keys=True)
    return f"{toolchain.arch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
