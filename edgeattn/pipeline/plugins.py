"""Kernels -> plugin library: cross-compiled, embedded, linked, and kept for the next time."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from edgeattn.devices.registry import Target, all_devices
from edgeattn.devices.schema import Gpu
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.plugins import (
    LIBRARY,
    PluginLibrary,
    PluginNode,
    plugin_nodes,
    read_library,
    require_states,
    require_variants,
    runs_on,
)
from edgeattn.engine.toolchain import ARCHITECTURES, Toolchain, build_library, find_toolchain
from edgeattn.errors import LoweringError, UsageError, unknown_name
from edgeattn.ops import find_op
from edgeattn.pipeline.plugin_cache import (
    LibraryRequest,
    alone_in,
    cache_folder,
    finished_library,
    hashed,
)

if TYPE_CHECKING:
    from edgeattn.kernels.manifest import Manifest
    from edgeattn.kernels.variants import Variant

Progress = Callable[[str, int, int], None]

COMPILING, LINKING = "compiling kernels", "building the library"


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
    ops: Sequence[str] | None = None,
    subset: str | None = None,
    tensorrt: Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PluginLibrary:
    """Builds the plugin library, or takes what it can from the cache.

    Args:
        arch: "x86_64" or "aarch64"; no machine of that kind is needed.
        sms: GPUs to compile kernels for; none is needed either.
        ops: operators to have plugins for; None for all.
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

    request = LibraryRequest(arch, tuple(sms), None if ops is None else tuple(ops), subset)
    place = request.folder()  # of the sources before they are compiled: they may change meanwhile
    cubins = cache_folder() / "cubins"
    manifest = compile_variants(
        _variants(request),
        sms,
        cache=cubins,
        jobs=jobs,
        progress=(lambda done, all: progress(COMPILING, done, all)) if progress else None,
    )
    if progress:
        progress(LINKING, 0, 1)
    with (
        as_file(files("edgeattn.plugins")) as sources,
        alone_in(cache_folder() / "plugins" / _build_key(toolchain, sources, manifest)) as folder,
    ):
        write(manifest, folder / "cubins", cache=cubins)
        embed_cubins(folder / "cubins" / MANIFEST, folder / "embedded")
        library = read_library(
            build_library(toolchain, sources, folder / "embedded", folder / "build")
        )
        library.require(arch)
        library = place_library(library, place)
    if progress:
        progress(LINKING, 1, 1)
    return library


def _variants(request: LibraryRequest) -> list[Variant]:
    from edgeattn.kernels.variants import load_variants

    found = list(load_variants(request.subset))
    if request.ops is None:
        return found
    wanted = {find_op(name).snake_name for name in request.ops}
    return [variant for variant in found if variant.kernel.name.partition(".")[0] in wanted]


def _build_key(toolchain: Toolchain, sources: Path, manifest: Manifest) -> str:
    """Which builds share a folder: CMake finds out itself what of the sources has changed."""
    facts = {"sources": str(sources), "kernels": manifest.kernels_sha256}
    return hashed(toolchain.arch, {**toolchain.to_dict(), **facts})


@dataclass(frozen=True)
class Plugins:
    """The libraries of one graph.

    Attributes:
        target: for the device, which the bundle carries.
        host: for the check with TensorRT-RTX on this machine; None where that has no part, or where
            a library was given for the device and none is there for this machine.
        checked: what the check here says of the plugins, for the report.
    """

    target: PluginLibrary
    host: PluginLibrary | None
    checked: str


def given_library(file: Path, target: Target) -> PluginLibrary:
    """The library a user names, where the target can load it.

    Raises:
        UsageError: nothing on the target loads plugins.
        BundleError: the file is no library of plugins, or one for another processor.
        LoweringError: it has no kernels for the target's GPU.
    """
    gpu = _gpu_with_plugins(target)
    if gpu is None:
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


def _gpu_with_plugins(target: Target) -> Gpu | None:
    return None if target.flavour == "onnxruntime" else target.device.gpu


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
    gpu = _gpu_with_plugins(target)
    if gpu is None:
        return None
    model = onnx.load(model_file, load_external_data=False)
    nodes = plugin_nodes(model)
    ops = _ops_with_plugin(nodes)
    if not ops:
        return None
    chosen = library or _library(LibraryRequest(gpu.host, (gpu.sm,), ops), progress)
    require_variants(chosen, nodes, gpu.sm)
    require_states(chosen, model)
    if not TENSORRT_RTX.is_available():
        return Plugins(chosen, None, "no: TensorRT-RTX is not installed")
    here, sm = platform.machine(), gpu.nearest_rtx_sm
    if chosen.arch == here and any(runs_on(sm, compiled) for compiled in chosen.sms):
        return Plugins(chosen, chosen, f"by TensorRT-RTX, for SM {sm}")
    request = LibraryRequest(here, (sm,), ops)
    # Who gives a library may lack the tools that build one.
    host = _library(request, progress) if library is None else finished_library(request)
    if host is None:
        return Plugins(chosen, None, f"no: there is none for {here}; function bodies were built")
    return Plugins(chosen, host, f"by TensorRT-RTX, with those for {here} and SM {sm}")


def _library(request: LibraryRequest, progress: Progress | None) -> PluginLibrary:
    found = finished_library(request)
    return found or build_plugins(request.arch, request.sms, ops=request.ops, progress=progress)


def library_for_machine(model_file: Path, sms: Sequence[int]) -> PluginLibrary:
    """A library for this machine's processor with the plugins of a graph, built where needed.

    Args:
        model_file: the graph.
        sms: GPUs it shall have kernels for.

    Raises:
        EdgeattnError: it cannot be built here.
    """
    ops = _ops_with_plugin(plugin_nodes(onnx.load(model_file, load_external_data=False)))
    return _library(LibraryRequest(platform.machine(), tuple(sms), ops), None)


def library_for_check(model_file: Path, rtx_sm: int | None) -> Path | None:
    """A library built on this machine for the plugins of a graph, never one out of a bundle.

    Args:
        model_file: the graph.
        rtx_sm: the GPU that TensorRT-RTX builds for; None where it has no part.

    Returns:
        None where the graph needs none, or none was built: the function bodies are checked then.
    """
    if rtx_sm is None:
        return None
    ops = _ops_with_plugin(plugin_nodes(onnx.load(model_file, load_external_data=False)))
    found = finished_library(LibraryRequest(platform.machine(), (rtx_sm,), ops)) if ops else None
    return None if found is None else found.path


def _ops_with_plugin(nodes: Sequence[PluginNode]) -> tuple[str, ...]:
    return tuple(sorted({node.op for node in nodes if find_op(node.op).plugin}))


def about_plugins(
    plugins: Plugins | None, given: PluginLibrary | None, verify: bool
) -> dict[str, Any]:
    """What the report says of the plugin library, nothing where there is none."""
    if plugins is None:
        return {} if given is None else {"plugins": {given.path.name: "not needed, left out"}}
    sms = ", ".join(f"SM {sm}" for sm in plugins.target.sms)
    about = {"library": f"for {plugins.target.arch}, {sms}: {', '.join(plugins.target.ops)}"}
    return {"plugins": {**about, "checked here": plugins.checked if verify else "no: --no-verify"}}


def place_library(library: PluginLibrary, folder: Path) -> PluginLibrary:
    """Copies a library to `folder`/ARCH, where it appears whole or not at all."""
    place = folder / library.arch
    place.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{LIBRARY}.", dir=place)
    os.close(descriptor)
    partial = Path(name)
    try:
        shutil.copyfile(library.path, partial)
        partial.chmod(0o644)  # mkstemp keeps it to its owner
        partial.replace(place / LIBRARY)
    finally:
        partial.unlink(missing_ok=True)
    return read_library(place / LIBRARY)
