"""Building an engine: one code path for both TensorRTs, in a child process that may die.

With TensorRT-RTX this is a real parser and builder for GPUs that are not in the machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError

from edgeattn.engine.child_process import Outcome, PhaseProgress, run_child
from edgeattn.engine.flavours import TENSORRT_RTX, Flavour, FlavourName
from edgeattn.engine.plugins import (
    expected_layers,
    missing_plugins,
    plugin_nodes,
    read_library,
    require_states,
    require_variants,
)
from edgeattn.engine.profiles import Profile
from edgeattn.errors import BundleError, LoweringError

_PLUGIN_SAYS = "edgeattn: "


@dataclass(frozen=True)
class ParserError:
    """One node TensorRT's parser did not take."""

    message: str
    node: str
    op: str
    code: str


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's.
        kind: of layer.
        precision: of its first output.
    """

    name: str
    kind: str
    precision: str


@dataclass(frozen=True)
class BuildReport:
    """What TensorRT made of a model.

    `reason` says in one sentence why the status is not "built". Figures of stages that were not
    reached are None.

    Attributes:
        sms: compute capabilities it was asked to build for.
        layer_list: of the engine, where one was kept.
        layer_source: "engine inspector", or "network" where no GPU was there to load the engine.
    """

    status: Literal["built", "refused", "not checked"]
    sms: tuple[int, ...]
    flavour: FlavourName = "tensorrt-rtx"
    reason: str = ""
    version: str | None = None
    parser_errors: tuple[ParserError, ...] = ()
    log_errors: tuple[str, ...] = ()
    warnings: int = 0
    layers: int | None = None
    plugin_layers: int | None = None
    engine_bytes: int | None = None
    seconds_parse: float | None = None
    seconds_build: float | None = None
    peak_rss_mb: float | None = None
    exit_detail: str = ""
    layer_source: str | None = None
    layer_list: tuple[Layer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, the list of layers left out."""
        values = asdict(self)
        del values["layer_list"], values["layer_source"]
        return values


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        plugin_library: of edgeattn's plugins; without one the function bodies are built.
        strip_functions: the parser prefers a function body to a plugin, so take the bodies away.
        strip_weights: leave the weights out; they are put in from the model when it is loaded.
        timing_cache: a file of TensorRT's measurements, read if there and written.
        workspace_bytes: most scratch memory a layer may have; None for TensorRT's own limit.
        threads: of the builder; None for its own choice.
    """

    plugin_library: Path | None = None
    strip_functions: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    threads: int | None = None


def check_build(
    model: Path,
    *,
    sm: int,
    profiles: Mapping[str, Profile],
    timeout_s: float,
    plugin_library: Path | None = None,
    strip_functions: bool = False,
) -> BuildReport:
    """Parses and builds a model with TensorRT-RTX for one compute capability; keeps no engine.

    Args:
        model: the ONNX file; external data is found next to it.
        sm: compute capability to build for, as an int (86).
        profiles: smallest, usual and largest shape of every input with dynamic dimensions.
        timeout_s: seconds after which the child is killed.
        plugin_library: of edgeattn's plugins; without one the function bodies are built.
        strip_functions: see `BuildOptions`.

    Raises:
        BundleError: there is no such model, or the library cannot be loaded here.
        LoweringError: TensorRT-RTX cannot build for this SM, a profile does not fit the inputs, or
            the library has no kernel for a node.
    """
    options = BuildOptions(plugin_library=plugin_library, strip_functions=strip_functions)
    return build_engine(
        model,
        None,
        flavour=TENSORRT_RTX,
        sms=(sm,),
        profiles=[profiles],
        options=options,
        timeout_s=timeout_s,
    )


def build_engine(
    model: Path,
    engine: Path | None,
    *,
    flavour: Flavour,
    sms: Sequence[int],
    profiles: Sequence[Mapping[str, Profile]],
    options: BuildOptions,
    timeout_s: float,
    progress: PhaseProgress | None = None,
) -> BuildReport:
    """Parses and builds a model.

    Args:
        model: the ONNX file; external data is found next to it.
        engine: where the engine goes; None keeps none. The file may be half-written where the
            status is not "built".
        flavour: which TensorRT builds.
        sms: compute capabilities; TensorRT builds for the one GPU in this machine only.
        profiles: optimisation profiles: smallest, usual and largest shape of every dynamic input.
        options: see `BuildOptions`.
        timeout_s: seconds after which the child is killed.
        progress: called with (what TensorRT does, steps done, steps in all).

    Raises:
        BundleError: there is no such model, the library cannot be loaded here, or the engine not
            be written.
        LoweringError: it cannot build for an SM, a profile does not fit the inputs, or the library
            has no kernel for a node.
    """
    _require_file(model)
    library = options.plugin_library
    expected = _require_plugins(model, sms, library, options.strip_functions)
    if not flavour.is_available():
        return BuildReport("not checked", tuple(sms), flavour.name, reason=flavour.todo)
    request = {
        "model": str(model.resolve()),
        "engine": str(engine.resolve()) if engine else None,
        "sms": list(sms) if flavour.builds_for_any else [],
        "profiles": list(profiles),
        "plugin_library": str(library.resolve()) if library else None,
        "plugin_layers": expected,
        "strip_functions": options.strip_functions,
        "strip_weights": options.strip_weights,
        "timing_cache": str(options.timing_cache.resolve()) if options.timing_cache else None,
        "workspace_bytes": options.workspace_bytes,
        "threads": options.threads,
    }
    outcome = run_child(flavour, request, timeout_s=timeout_s, progress=progress)
    _raise_for_bad_request(outcome.facts, flavour, sms)
    _require_written(outcome.facts)
    return _with_plugins(_report(outcome, flavour, sms), expected, outcome.stderr)


def _require_plugins(
    model: Path, sms: Sequence[int], plugin_library: Path | None, strip_functions: bool
) -> int | None:
    """Refuses, before any parse, a graph that the library does not serve; how many layers it must.

    A missing plugin is silent in TensorRT where a function body is there, and a kernel that is
    missing shows only on the device.
    """
    try:
        proto = onnx.load(model, load_external_data=False)
    except DecodeError:
        return None  # TensorRT's parser says it better
    nodes = plugin_nodes(proto)
    library = read_library(plugin_library) if plugin_library else None
    if library is not None:
        library.require(platform.machine())
        for sm in sms:
            require_variants(library, nodes, sm)
        require_states(library, proto)
    missing = {node.op for node in nodes} if strip_functions else missing_plugins(proto, nodes)
    for op in sorted(missing - set(library.ops if library else ())):
        raise LoweringError(
            expected=f"the plugin {op}, as the graph holds no function body of it",
            came=f"{plugin_library} has none" if library else "no plugin library was given",
            todo="build one with edgeattn plugins build",
        )
    return expected_layers(library, nodes)


def _with_plugins(report: BuildReport, expected: int | None, stderr: str) -> BuildReport:
    """The report, refused where the network has not as many plugin layers as it should.

    What a plugin refuses it says on standard error, where TensorRT gives it no logger.
    """
    found = report.plugin_layers
    said = [line for line in stderr.splitlines() if line.startswith(_PLUGIN_SAYS)]
    if said and report.status == "refused":
        return replace(report, reason=said[0].removeprefix(_PLUGIN_SAYS))
    if None in (found, expected) or found == expected or report.parser_errors:
        return report
    if report.exit_detail:
        return report
    reason = f"the network has {found} plugin layers, where the graph has {expected} such nodes"
    return replace(report, status="refused", reason=reason)


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise BundleError(
            expected=f"a file {file.name} to build",
            came=f"{file} does not exist",
            todo="export the model again",
        )


def _raise_for_bad_request(facts: Mapping[str, Any], flavour: Flavour, sms: Sequence[int]) -> None:
    if "available_sm" in facts:
        raise LoweringError(
            expected=f"a compute capability {flavour.title} builds for "
            f"({', '.join(map(str, facts['available_sm']))})",
            came=f"the target asks for SM {', '.join(map(str, sms))}",
            todo="check with the nearest of these",
        )
    if "profile_problem" in facts:
        raise LoweringError(
            expected="a shape profile for every dynamic input",
            came=facts["profile_problem"],
            todo="give smallest, usual and largest shape per input name",
        )


def _require_written(facts: Mapping[str, Any]) -> None:
    if "write_problem" in facts:
        raise BundleError(
            expected="to write the engine that was built",
            came=f"the system says: {facts['write_problem']}",
            todo="free some space if the disk is full, and build it again",
        )


def _report(outcome: Outcome, flavour: Flavour, sms: Sequence[int]) -> BuildReport:
    facts = outcome.facts
    built = not outcome.exit_detail and facts.get("engine_bytes") is not None
    figures = ("layers", "plugin_layers", "engine_bytes", "seconds_parse", "seconds_build")
    return BuildReport(
        status="built" if built else "refused",
        sms=tuple(sms),
        flavour=flavour.name,
        reason="" if built else _reason(facts, outcome.exit_detail, flavour.title),
        version=facts.get("version"),
        parser_errors=tuple(ParserError(**error) for error in facts.get("parser_errors", ())),
        log_errors=tuple(facts.get("errors", ())),
        warnings=facts.get("warnings", 0),
        peak_rss_mb=facts.get("peak_rss_mb"),
        exit_detail=outcome.exit_detail,
        layer_source=facts.get("layer_source"),
        layer_list=tuple(map(_layer, facts.get("layer_list", ()))),
        **{name: facts.get(name) for name in figures},
    )


def _layer(told: Any) -> Layer:
    """A layer as the inspector describes it: an object, or its name alone."""
    if not isinstance(told, dict):
        return Layer(str(told), "", "")
    precision = told.get("Precision")
    outputs = told.get("Outputs") or [{}]
    found = precision or outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or ""
    return Layer(str(told.get("Name", "")), str(told.get("LayerType", "")), str(found))


def _reason(facts: Mapping[str, Any], exit_detail: str, title: str) -> str:
    if exit_detail:
        return f"{title} stopped while {facts['stage']}: {exit_detail}"
    if facts.get("parser_errors"):
        error = facts["parser_errors"][0]
        return f"the parser refuses node '{error['node']}' ({error['op']}): {error['message']}"
    who = "builder refuses the network" if facts.get("parsed") else "parser refuses the file"
    return f"the {who}: {next(iter(facts.get('errors', ())), 'it gives no reason')}"
