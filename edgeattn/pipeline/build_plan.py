"""What `build` settles before TensorRT starts: from the bundle, the targets and this machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeattn.bundle.bundle import MODEL, PLUGINS, Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.devices.probe import Probe, probe
from edgeattn.devices.registry import Target, parse_target
from edgeattn.engine.build import BuildOptions
from edgeattn.engine.flavours import FLAVOURS, Flavour
from edgeattn.engine.plugins import LIBRARY, plugin_nodes
from edgeattn.engine.profiles import AnyProfile, dimension_names, model_profiles, with_sizes
from edgeattn.errors import LoweringError, UsageError, unknown_name
from edgeattn.pipeline.work import require_output
from edgeattn.planner.encoder_lowering import fit_any_lowering
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe


@dataclass(frozen=True)
class BuildRequest:
    """How `build` was asked; see the options of `edgeattn build`.

    Attributes:
        targets: NAME[@SOFTWARE]; none takes the bundle's own.
        flavour: "tensorrt" or "tensorrt-rtx"; None takes the targets'.
        profiles: [PROFILE.]DIMENSION=min:opt:max.
        timing_cache: file of TensorRT's measurements.
        strip_weights: leave the weights out of the engine.
        jobs: threads of the builder.
        force: build also what is there already.
    """

    targets: tuple[str, ...] = ()
    flavour: str | None = None
    profiles: tuple[str, ...] = ()
    timing_cache: Path | None = None
    strip_weights: bool = False
    jobs: int | None = None
    force: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """What is settled before TensorRT is started.

    Attributes:
        bundle: opened.
        lowering: of its graph.
        targets: to build for.
        flavour: of TensorRT.
        profiles: sizes to build for.
        options: of the builder.
        found: this machine.
    """

    bundle: Bundle
    lowering: Lowering
    targets: tuple[Target, ...]
    flavour: Flavour
    profiles: tuple[AnyProfile, ...]
    options: BuildOptions
    found: Probe

    @property
    def sms(self) -> tuple[int, ...]:
        """Compute capabilities of the targets."""
        found = {target.device.gpu.sm for target in self.targets if target.device.gpu}
        return tuple(sorted(found))

    @property
    def on_device(self) -> bool:
        """Whether the GPU of this machine is the one it is built for."""
        return self.found.gpu is not None and self.found.gpu.sm in self.sms

    @property
    def host(self) -> str:
        """The processor beside the GPU."""
        return next(t.device.gpu.host for t in self.targets if t.device.gpu is not None)

    @property
    def sizes(self) -> dict[str, dict[str, str]]:
        """min:opt:max of the graph's dimensions, by profile."""
        used = dimension_names(self.bundle.model_file)
        return {
            profile.name: {n: size for n, size in profile.to_dict().items() if n in used}
            for profile in self.profiles
        }

    @property
    def model_sha256(self) -> str:
        """Of the graph."""
        return self.bundle.manifest.files[MODEL].sha256


def plan_build(bundle: Bundle, request: BuildRequest) -> BuildPlan:
    """Settles what is built, for which GPUs, with what.

    Raises:
        EdgeattnError: the graph, the targets and the options do not go together.
    """
    has_plugins = bool(plugin_nodes(read_graph(bundle)))
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    names = request.targets or (bundle.manifest.target.name,)
    named = (fitting_target(name, bundle, lowering) for name in names)
    targets = tuple({target.name: target for target in named}.values())  # each once
    flavour = _flavour(targets, request.flavour)
    _require_known_gpus(targets, flavour)
    if request.timing_cache is not None and flavour.name == "tensorrt-rtx":
        raise UsageError(
            expected="--timing-cache for TensorRT, which measures kernels while it builds",
            came="the flavour is tensorrt-rtx, which measures nothing before it runs",
            todo="leave --timing-cache out",
        )
    if request.timing_cache is not None:
        require_output(request.timing_cache, force=True)  # not after an hour of measuring
    context = lowering.context or bundle.any_shape.max_context
    limits = {"context": context, "batch": lowering.batch}
    options = BuildOptions(
        plugin_library=_library(bundle, targets, flavour) if has_plugins else None,
        strip_functions=has_plugins and any(t.software.graph.strip_functions for t in targets),
        strip_weights=request.strip_weights,
        timing_cache=request.timing_cache,
        threads=request.jobs,
    )
    separate = not flavour.builds_for_any
    profiles = model_profiles(bundle.any_shape, **limits, separate=separate)
    profiles = with_sizes(profiles, request.profiles, **limits)
    return BuildPlan(bundle, lowering, targets, flavour, profiles, options, probe())


def fitting_target(name: str, bundle: Bundle, lowering: Lowering) -> Target:
    """A target that reads the bundle's graph as it is.

    Raises:
        LoweringError: it has no TensorRT, or reads other graphs.
    """
    target = parse_target(name)
    if target.device.gpu is None or target.flavour == "onnxruntime":
        raise LoweringError(
            expected="a target with TensorRT, to build an engine for",
            came=f"{target.name} runs the graph itself, in ONNX Runtime",
            todo="use edgeattn run, or name a GPU with --target",
        )
    if target.name == bundle.manifest.target.name:
        return target
    recipe = replace(Recipe.from_dict(bundle.manifest.recipe), target=name, dtype=lowering.dtype)
    wanted = fit_any_lowering(plan_lowering(recipe, target), bundle.any_shape, target)
    # every TensorRT reads attention that is spelled out
    checked = (
        "kv_cache",
        "embedding",
        *(["attention"] if lowering.attention != "primitive" else []),
    )
    for what in checked:
        _same(target, bundle, what, getattr(lowering, what), getattr(wanted, what))
    if lowering.opset > wanted.opset:
        _same(target, bundle, "opset", lowering.opset, wanted.opset)
    return target


def _same(target: Target, bundle: Bundle, what: str, came: object, wanted: object) -> None:
    if came != wanted:
        raise LoweringError(
            expected=f"a graph with {what.replace('_', ' ')} {wanted}, as {target.name} reads it",
            came=f"{bundle.path} was exported for {bundle.manifest.target.name} with {came}",
            todo=f"export it with --target {target.name}",
        )


def _flavour(targets: Sequence[Target], asked: str | None) -> Flavour:
    if asked is not None and asked not in FLAVOURS:
        raise unknown_name("flavour", asked, FLAVOURS)
    names = {asked} if asked is not None else {target.flavour for target in targets}
    if len(names) > 1:
        raise UsageError(
            expected="targets of one flavour for one engine",
            came=" and ".join(f"{t.name} has {t.flavour}" for t in targets),
            todo="build one engine for each, or pass --flavour",
        )
    return FLAVOURS[names.pop()]  # type: ignore[index]  # onnxruntime was refused


def _require_known_gpus(targets: Sequence[Target], flavour: Flavour) -> None:
    """TensorRT-RTX builds for the GPUs it knows, TensorRT for the one in the machine."""
    if not flavour.builds_for_any:
        if len(targets) > 1:
            raise UsageError(
                expected=f"one target for {flavour.title}, whose engine is for one GPU",
                came=f"there are {len(targets)}",
                todo="build one engine for each",
            )
        return
    for target in targets:
        gpu = target.device.gpu
        assert gpu is not None
        if gpu.sm != gpu.nearest_rtx_sm:
            raise LoweringError(
                expected=f"a GPU that {flavour.title} knows",
                came=f"{target.device.name} has SM {gpu.sm}, which it does not",
                todo="leave out --flavour: TensorRT builds its engine on the device",
            )


def _library(bundle: Bundle, targets: Sequence[Target], flavour: Flavour) -> Path | None:
    """The plugin library to build with: the bundle's, where this machine can load it."""
    machine = platform.machine()
    own = bundle.file(f"{PLUGINS}/{machine}/{LIBRARY}")
    if own is not None:
        return own.resolve()
    if bundle.manifest.plugin_abi is None:
        return None  # exported with --no-plugins: TensorRT takes the function bodies
    from edgeattn.pipeline.plugins import library_for_machine

    if not flavour.builds_for_any:
        return None  # it is refused for its GPU before it is needed
    sms = sorted({t.device.gpu.sm for t in targets if t.device.gpu is not None})
    return library_for_machine(bundle.model_file, sms).path


def require_tensorrt(target: Target, found: Probe) -> None:
    """Refuses an installed TensorRT that is older than the target's.

    Raises:
        LoweringError: with both versions.
    """
    needed, here = target.software.stack.version, found.tensorrt
    least = version_numbers(needed)
    if here is not None and version_numbers(here)[: len(least)] < least:
        raise LoweringError(
            expected=f"TensorRT {needed} or newer, as {target.name} has",
            came=f"{here} is installed here",
            todo=f"export the bundle for this software: edgeattn targets {target.device.name}",
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: 10.16 comes after 10.3."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())
