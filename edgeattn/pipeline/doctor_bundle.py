"""What `doctor` finds about a bundle: whole, for this target, with its plugins and engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.bundle.bundle import PLUGINS, WEIGHTS, Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.devices.probe import Probe
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import is_image
from edgeattn.engine.plugins import (
    LIBRARY,
    missing_plugins,
    plugin_nodes,
    read_library,
    require_states,
    require_variants,
)
from edgeattn.engine.record import ENGINES, Engine, read_engines, require_runs_here, require_sound
from edgeattn.errors import BundleError, EdgeattnError
from edgeattn.pipeline.build_plan import fitting_target
from edgeattn.pipeline.doctor_machine import is_here
from edgeattn.pipeline.doctor_model import available_bytes, check_limits, memory_findings
from edgeattn.pipeline.findings import Finding, attempt, refused, size
from edgeattn.planner.fit import MemoryFit, memory_fit, what_fits
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from onnx import ModelProto


def examine(
    bundle: Bundle, target: Target, found: Probe, *, context: int | None, batch: int | None
) -> tuple[list[Finding], MemoryFit]:
    """What is to be said of a bundle on a target.

    Args:
        bundle: opened, so that its files are sound.
        target: where it shall run.
        found: this machine.
        context: tokens of the longest sequence; None for those it was exported for.
        batch: rows; None likewise.

    Returns:
        Findings, and what it takes.

    Raises:
        BundleError: its manifest does not add up.
    """
    manifest, shape = bundle.manifest, bundle.any_shape
    lowering = Lowering.from_dict(manifest.lowering)
    count, made = len(manifest.files), manifest.target.name
    findings = [Finding("ok", "bundle", f"{count} files as they were written, for {made}")]
    if manifest.verification.status == "skipped":
        findings.append(
            Finding("warning", "proof", "it was exported with --no-verify", "export it again")
        )
    support = _support(bundle, target, lowering)
    graph = [] if support.level == "problem" else list(_graph_findings(bundle, target, found))
    findings += [support, *graph]
    findings += check_limits(shape, lowering, context, batch)
    context = None if is_image(shape) else context
    asked = replace(lowering, context=context or lowering.context, batch=batch or lowering.batch)
    available = available_bytes(target, found)
    fit = memory_fit(
        shape,
        asked,
        target.device.memory,
        available=available,
        stored=manifest.files[WEIGHTS].bytes,
    )
    if any(finding.about == ENGINES and finding.level == "ok" for finding in graph):
        fit = replace(fit, build=0)
    recipe = Recipe.from_dict(manifest.recipe)
    recipe = replace(recipe, target=target.name, context=asked.context, batch=asked.batch)
    choices = [] if fit.fits else what_fits(shape, recipe, target, available=available)
    return [*findings, *memory_findings(fit, target, found, choices)], fit


def open_bundle(path: Path) -> Bundle | Finding:
    """The bundle with its hashes compared, or what is wrong with it."""
    try:
        return Bundle.open(path)
    except BundleError as error:
        return refused("bundle", error)


def _support(bundle: Bundle, target: Target, lowering: Lowering) -> Finding:
    """Whether the target reads the graph as it is."""
    if target.flavour != "onnxruntime":
        said = f"{target.name} reads opset {lowering.opset}, {lowering.attention} attention"
        return attempt("support", lambda: (fitting_target(target.name, bundle, lowering), said)[1])
    if bundle.manifest.target.flavour == "onnxruntime":
        return Finding("ok", "support", f"opset {lowering.opset} in ONNX Runtime")
    made = bundle.manifest.target.name
    return Finding(
        "warning",
        "support",
        f"it was made for {made}: ONNX Runtime runs it, but not with its fastest operators",
        f"export it with --target {target.device.name}",
    )


def _graph_findings(bundle: Bundle, target: Target, found: Probe) -> Iterator[Finding]:
    """What the graph needs besides itself: plugins, and engines made of it."""
    try:
        graph = read_graph(bundle)
    except EdgeattnError as error:
        yield refused("graph", error)
        return
    if target.flavour == "onnxruntime":
        return
    yield from _plugins(bundle, graph, target)
    yield from _engines(bundle, target, found)


def _plugins(bundle: Bundle, graph: ModelProto, target: Target) -> Iterator[Finding]:
    """Whether the bundle's library serves the graph's nodes on the target's GPU."""
    gpu = target.device.gpu
    try:
        nodes = plugin_nodes(graph)
    except EdgeattnError as error:
        yield refused("plugins", error)
        return
    if not nodes or gpu is None:
        return
    if bundle.manifest.plugin_abi is None and not missing_plugins(graph, nodes):
        said = f"exported without: TensorRT builds the function bodies of {len(nodes)} nodes"
        yield Finding("warning", "plugins", said, "export it again without --no-plugins")
        return

    def check() -> str:
        library = read_library(_library(bundle, gpu.host))
        library.require(gpu.host)
        require_variants(library, nodes, gpu.sm)
        require_states(library, graph)
        return f"{library.path.name} has kernels for SM {gpu.sm} and all {len(nodes)} nodes"

    yield attempt("plugins", check)


def _library(bundle: Bundle, arch: str) -> Path:
    file = bundle.file(f"{PLUGINS}/{arch}/{LIBRARY}")
    if file is not None:
        return file
    names = [name for name in bundle.manifest.files if name.endswith(f"/{LIBRARY}")]
    raise BundleError(
        expected=f"a plugin library for {arch} in {bundle.path / PLUGINS}",
        came=f"there is {', '.join(names) or 'none'}",
        todo="export the bundle for this target",
    )


def _engines(bundle: Bundle, target: Target, found: Probe) -> Iterator[Finding]:
    """Whether one of the engines runs on the target: on this machine, or by its record."""
    try:
        engines = read_engines(bundle)
    except EdgeattnError as error:
        yield refused(ENGINES, error)
        return
    anywhere = target.flavour == "tensorrt-rtx"
    if not engines:
        todo = f"edgeattn build {bundle.path}" + ("" if anywhere else f", on {target.device.name}")
        yield Finding("warning", ENGINES, "none is built yet", todo)
    judged = [_engine(engine, bundle, target, found) for engine in engines]
    if any(finding.level == "ok" for finding in judged):  # the others are never chosen
        judged = [finding for finding in judged if finding.level == "ok"]
    yield from judged


def _engine(engine: Engine, bundle: Bundle, target: Target, found: Probe) -> Finding:
    record, name = engine.record, engine.path.name
    said = f"{name}, {size(record.bytes)}, {record.where}"
    here = is_here(found, target)

    def check() -> str:
        if here:
            require_runs_here(engine, bundle, found)
        else:
            require_sound(engine, bundle)
        return said

    if here or target.device.sm in record.sms:
        return attempt(ENGINES, check)
    sms = " or ".join(map(str, record.sms))
    return Finding(
        "problem",
        ENGINES,
        f"{name} is for SM {sms}, {target.device.name} has SM {target.device.sm}",
        f"edgeattn build {bundle.path} --target {target.name}",
    )
