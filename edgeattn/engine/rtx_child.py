"""The child process that holds TensorRT-RTX: parses and builds one model, writes JSON.

Run as `python -m edgeattn.engine.rtx_child` with the request as JSON on standard input. The library
can abort on a bad graph; the result file is written after every stage so that what was learnt
survives.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

# the report is for people; a broken graph can repeat one message thousands of times
_MAX_MESSAGES = 50
_PR_SET_PDEATHSIG = 1


class _Result:
    """What is known so far, kept in a file that the parent reads also when this process dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = {"stage": "starting", "errors": [], "warnings": 0}

    def write(self, **facts: Any) -> None:
        """Adds facts and makes them visible to the parent at once."""
        self.facts.update(facts, peak_rss_mb=_peak_rss_mb())
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.facts), encoding="utf-8")
        draft.replace(self._path)


def _peak_rss_mb() -> float:
    # ru_maxrss starts at the parent's peak after fork and exec; VmHWM belongs to this process alone
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _die_with_parent() -> None:
    # a parent that is killed cannot stop us: ask the kernel to
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _logger(trt: Any, result: _Result) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the package ships no type stubs
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            facts = result.facts
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                if len(facts["errors"]) < _MAX_MESSAGES:
                    facts["errors"].append(message)
                    # an abort often follows the message that explains it
                    result.write()
            elif severity == trt.ILogger.WARNING:
                facts["warnings"] += 1

    return Logger()


def _parser_errors(parser: Any) -> list[dict[str, str]]:
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, _MAX_MESSAGES))]
    return [
        {"message": e.desc(), "node": e.node_name(), "op": e.node_operator(), "code": str(e.code())}
        for e in errors
    ]


def _add_profile(
    builder: Any, config: Any, network: Any, shapes: dict[str, list[list[int]]]
) -> str | None:
    """Adds the shape profile; returns what is wrong with it, if anything."""
    profile = builder.create_optimization_profile()
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        return f"a profile names {unknown[0]}, which is no input (inputs: {', '.join(inputs)})"
    for name, tensor in inputs.items():
        if -1 not in tensor.shape:
            continue
        if name not in shapes:
            return f"input {name} has a dynamic shape {tuple(tensor.shape)} and no profile"
        triple = [tuple(shape) for shape in shapes[name]]
        if not _fits(triple, tuple(tensor.shape)):
            return f"the profile {triple} of {name} does not fit {tuple(tensor.shape)}"
        profile.set_shape(name, *triple)
    if any(-1 in tensor.shape for tensor in inputs.values()) and (
        config.add_optimization_profile(profile) < 0
    ):
        return "the shape profile is refused"
    return None


def _fits(triple: list[tuple[int, ...]], declared: tuple[int, ...]) -> bool:
    # the library ignores what a profile says about a fixed dimension and words the rest poorly
    if any(len(shape) != len(declared) for shape in triple):
        return False
    smallest, usual, largest = triple
    ranges = zip(smallest, usual, largest, declared, strict=True)
    return all(
        0 <= low <= mid <= high and (fixed == -1 or low == mid == high == fixed)
        for low, mid, high, fixed in ranges
    )


def _count_plugins(trt: Any, network: Any) -> int:
    kinds = (network.get_layer(i).type for i in range(network.num_layers))
    return sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)


def _check(trt: Any, request: dict[str, Any], result: _Result) -> None:
    capability = getattr(trt.ComputeCapability, f"SM{request['sm']}", None)
    if capability is None:
        names = (name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        result.write(available_sm=sorted(int(name) for name in names))
        return
    builder = trt.Builder(_logger(trt, result))
    if request["plugin_library"]:
        trt.get_plugin_registry().load_library(request["plugin_library"])
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    result.write(stage="parsing")
    start = time.perf_counter()
    # from the real path: the weights are found next to the model
    parsed = parser.parse_from_file(request["model"])
    result.write(
        seconds_parse=round(time.perf_counter() - start, 3),
        parsed=parsed,
        parser_errors=_parser_errors(parser),
        layers=network.num_layers,
        plugin_layers=_count_plugins(trt, network),
    )
    if parsed:
        _build(trt, builder, network, capability, request, result)


def _build(
    trt: Any, builder: Any, network: Any, capability: Any, request: dict[str, Any], result: _Result
) -> None:
    config = builder.create_builder_config()
    if request["plugin_library"]:  # states that a plugin updates in place
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    problem = _add_profile(builder, config, network, request["profiles"])
    if problem:
        result.write(profile_problem=problem)
        return
    result.write(stage="building")
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    result.write(
        seconds_build=round(time.perf_counter() - start, 3),
        engine_bytes=plan.nbytes if plan is not None else None,
    )


def main() -> None:
    """Reads the request, does the work, leaves the result file."""
    _die_with_parent()
    request = json.load(sys.stdin)
    result = _Result(Path(request["result"]))
    trt = importlib.import_module("tensorrt_rtx")
    result.write(version=trt.__version__)
    _check(trt, request, result)
    result.write(stage="done")
    # the library's own tear-down has nothing to add and could only spoil the exit code
    os._exit(0)


if __name__ == "__main__":
    main()
