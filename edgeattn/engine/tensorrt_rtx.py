"""A real TensorRT parser and builder without a GPU: TensorRT-RTX, in a child process.

The library may abort or exhaust memory on a graph it does not like; the child pays for it, the
caller gets a report.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError

from edgeattn.engine.plugins import (
    expected_layers,
    missing_plugins,
    plugin_nodes,
    read_library,
    require_states,
    require_variants,
)
from edgeattn.errors import BundleError, LoweringError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

INSTALL_HINT = "install edgeattn[rtx]"
_CHILD_MODULE = "edgeattn.engine.rtx_child"
_BINDINGS, _LIBRARIES = "tensorrt_rtx", "tensorrt_rtx_libs"
# the parser opens the library by this name, the wheel ships it with a version behind
_BARE_NAME = "libtensorrt_rtx.so"
_STDERR_LINES = 3
_PLUGIN_SAYS = "edgeattn: "


@dataclass(frozen=True)
class ParserError:
    """One node TensorRT's parser did not take."""

    message: str
    node: str
    op: str
    code: str


@dataclass(frozen=True)
class RtxReport:
    """What TensorRT-RTX made of a model.

    `reason` says in one sentence why the status is not "built". Figures of stages that were not
    reached are None.
    """

    status: Literal["built", "refused", "not checked"]
    sm: int
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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return asdict(self)


def is_available() -> bool:
    """Whether TensorRT-RTX is installed; does not load it."""
    return all(find_spec(name) is not None for name in (_BINDINGS, _LIBRARIES))


def check_build(
    model: Path,
    *,
    sm: int,
    profiles: Mapping[str, Profile],
    timeout_s: float,
    plugin_library: Path | None = None,
) -> RtxReport:
    """Parses and builds a model for one compute capability.

    Args:
        model: the ONNX file; external data is found next to it.
        sm: compute capability to build for, as an int (86).
        profiles: smallest, usual and largest shape of every input with dynamic dimensions.
        timeout_s: seconds after which the child is killed.
        plugin_library: of edgeattn's plugins; without one the function bodies are built.

    Raises:
        BundleError: there is no such model, or the library cannot be loaded here.
        LoweringError: TensorRT-RTX cannot build for this SM, a profile does not fit the inputs, or
            the library has no kernel for a node.
    """
    _require_file(model)
    expected = _require_plugins(model, sm, plugin_library)
    if not is_available():
        return RtxReport("not checked", sm, reason=INSTALL_HINT)
    with tempfile.TemporaryDirectory(prefix="edgeattn-rtx-") as folder:
        request = {
            "model": str(model.resolve()),
            "sm": sm,
            "profiles": profiles,
            "plugin_library": str(plugin_library.resolve()) if plugin_library else None,
            "result": str(Path(folder, "result.json")),
        }
        exit_detail, stderr = _run_child(json.dumps(request), Path(folder), timeout_s)
        facts = _read_result(Path(folder, "result.json"))
    _raise_for_bad_request(facts, sm)
    return _with_plugins(_report(facts, sm, exit_detail), expected, stderr)


def _require_plugins(model: Path, sm: int, plugin_library: Path | None) -> int:
    """Refuses, before any parse, a graph that the library does not serve; how many layers it must.

    A missing plugin is silent in TensorRT where a function body is there, and a kernel that is
    missing shows only on the device.
    """
    try:
        proto = onnx.load(model, load_external_data=False)
    except DecodeError:
        return 0  # TensorRT's parser says it better
    nodes = plugin_nodes(proto)
    library = read_library(plugin_library) if plugin_library else None
    if library is not None:
        library.require(platform.machine())
        require_variants(library, nodes, sm)
        require_states(library, proto)
    for op in sorted(missing_plugins(proto, nodes) - set(library.ops if library else ())):
        raise LoweringError(
            expected=f"the plugin {op}, as the graph holds no function body of it",
            came=f"{plugin_library} has none" if library else "no plugin library was given",
            todo="build one with edgeattn plugins build",
        )
    return expected_layers(library, nodes)


def _with_plugins(report: RtxReport, expected: int, stderr: str) -> RtxReport:
    """The report, refused where the network has not as many plugin layers as it should.

    What a plugin refuses it says on standard error, where TensorRT gives it no logger.
    """
    found = report.plugin_layers
    said = [line for line in stderr.splitlines() if line.startswith(_PLUGIN_SAYS)]
    if said and report.status == "refused":
        return replace(report, reason=said[0].removeprefix(_PLUGIN_SAYS))
    if found is None or found == expected or report.status != "built":
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


def _run_child(request: str, folder: Path, timeout_s: float) -> tuple[str, str]:
    """Runs the child to its end; how it died, empty when it did not, and its standard error."""
    with subprocess.Popen(
        [sys.executable, "-m", _CHILD_MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # `-m` puts the working directory on the child's import path: let it be an empty one
        cwd=folder,
        env=_child_environment(folder),
    ) as child:
        try:
            _, stderr = child.communicate(request, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return f"no result after {timeout_s:g} s, killed", ""
        except BaseException:
            # Ctrl-C above all: nothing may go on building for a caller who left
            child.kill()
            raise
    if child.returncode == 0:
        return "", stderr
    tail = " | ".join(stderr.strip().splitlines()[-_STDERR_LINES:])
    return _exit_words(child.returncode) + (f": {tail}" if tail else ""), stderr


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        # nobody but the kernel's memory guard sends it to a child of ours that did not time out
        return f"died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"died of signal {-code}"


def _child_environment(folder: Path) -> dict[str, str]:
    spec = find_spec(_LIBRARIES)
    libraries = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    versioned = sorted(f for place in libraries for f in place.glob(f"{_BARE_NAME}*"))
    if versioned:
        (folder / _BARE_NAME).symlink_to(versioned[-1])
    paths = [str(folder), *map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(p for p in paths if p)}


def _read_result(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # the child died before its first word
        facts = {"stage": "starting"}
    return facts


def _raise_for_bad_request(facts: dict[str, Any], sm: int) -> None:
    if "available_sm" in facts:
        raise LoweringError(
            expected="a compute capability TensorRT-RTX builds for "
            f"({', '.join(map(str, facts['available_sm']))})",
            came=f"the target asks for SM {sm}",
            todo="check with the nearest of these",
        )
    if "profile_problem" in facts:
        raise LoweringError(
            expected="a shape profile for every dynamic input",
            came=facts["profile_problem"],
            todo="give smallest, usual and largest shape per input name",
        )


def _report(facts: dict[str, Any], sm: int, exit_detail: str) -> RtxReport:
    built = not exit_detail and facts.get("engine_bytes") is not None
    parser_errors = tuple(ParserError(**error) for error in facts.get("parser_errors", ()))
    log_errors = tuple(facts.get("errors", ()))
    figures = ("layers", "plugin_layers", "engine_bytes", "seconds_parse", "seconds_build")
    return RtxReport(
        status="built" if built else "refused",
        sm=sm,
        reason="" if built else _reason(facts, exit_detail),
        version=facts.get("version"),
        parser_errors=parser_errors,
        log_errors=log_errors,
        warnings=facts.get("warnings", 0),
        peak_rss_mb=facts.get("peak_rss_mb"),
        exit_detail=exit_detail,
        **{name: facts.get(name) for name in figures},
    )


def _reason(facts: dict[str, Any], exit_detail: str) -> str:
    if exit_detail:
        return f"TensorRT-RTX stopped while {facts['stage']}: {exit_detail}"
    if facts.get("parser_errors"):
        error = facts["parser_errors"][0]
        return f"the parser refuses node '{error['node']}' ({error['op']}): {error['message']}"
    who = "builder refuses the network" if facts.get("parsed") else "parser refuses the file"
    return f"the {who}: {next(iter(facts.get('errors', ())), 'it gives no reason')}"
