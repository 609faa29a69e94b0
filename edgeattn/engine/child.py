"""The child process that holds TensorRT: parses and builds one model, leaves JSON and an engine.

Run as `python -m edgeattn.engine.child` with the request as JSON on standard input. The library can
abort on a bad graph; the result file is written after every stage so that what was learnt survives.
One code path serves both TensorRTs. Lines that only NVIDIA's enterprise TensorRT reaches are marked
"enterprise only": no machine that tests this has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from edgeattn.engine.child_report import Result, die_with_parent, tell

# the report is for people; a broken graph can repeat one message thousands of times
_MAX_MESSAGES = 50
_PROGRESS_EVERY_S = 0.1


def _logger(trt: Any, result: Result) -> Any:
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


def _monitor(trt: Any) -> Any:
    """Tells the parent how far TensorRT is: one JSON line [phase, done, total] at a time."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self._sizes: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._sizes[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._sizes.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> None:
            now = time.monotonic()
            if now - self._last >= _PROGRESS_EVERY_S:
                self._last = now
                total = max(self._sizes.get(phase, done), done, 1)
                tell(phase, done, total)

    return Monitor()


def _parser_errors(parser: Any) -> list[dict[str, str]]:
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, _MAX_MESSAGES))]
    return [
        {"message": e.desc(), "node": e.node_name(), "op": e.node_operator(), "code": str(e.code())}
        for e in errors
    ]


def _add_profile(
    builder: Any, config: Any, network: Any, shapes: dict[str, list[list[int]]]
) -> str | None:
    """Adds a shape profile; returns what is wrong with it, if anything."""
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


def _layers(trt: Any, network: Any) -> Any:
    return map(network.get_layer, range(network.num_layers))


def _count_plugins(trt: Any, network: Any) -> int:
    return sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in _layers(trt, network))


def _capabilities(trt: Any, request: dict[str, Any], result: Result) -> list[Any] | None:
    """The GPUs to build for, empty for the one in this machine; None where one is unknown."""
    names = {f"SM{sm}" for sm in request["sms"]}
    if not names:
        return []
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    if not names <= known:
        result.write(available_sm=sorted(int(name[2:]) for name in known))
        return None
    return [getattr(trt.ComputeCapability, f"SM{sm}") for sm in request["sms"]]


def _work(trt: Any, request: dict[str, Any], result: Result) -> None:
    capabilities = _capabilities(trt, request, result)
    if capabilities is None:
        return
    builder = trt.Builder(_logger(trt, result))
    if request["threads"]:
        builder.max_threads = request["threads"]
    if request["plugin_library"]:
        builder.get_plugin_registry().load_library(request["plugin_library"])
    # TensorRT 11 knows no other networks and may drop the flag
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, builder.logger)
    result.write(stage="parsing")
    start = time.perf_counter()
    parsed = _parse(parser, request)
    result.write(
        seconds_parse=round(time.perf_counter() - start, 3),
        parsed=parsed,
        parser_errors=_parser_errors(parser),
        layers=network.num_layers,
        plugin_layers=_count_plugins(trt, network),
    )
    expected = request["plugin_layers"]
    if parsed and expected is not None and result.facts["plugin_layers"] != expected:
        return  # minutes of building would be for nothing
    if parsed:
        _build(trt, builder, network, capabilities, request, result)


def _parse(parser: Any, request: dict[str, Any]) -> bool:
    model = request["model"]
    if not request["strip_functions"]:
        # from the real path: the weights are found next to the model
        return bool(parser.parse_from_file(model))
    import onnx

    stripped = onnx.load(model, load_external_data=False)
    del stripped.functions[:]  # this parser prefers a function body to a plugin of its name
    return bool(parser.parse(stripped.SerializeToString(), model))


def _configure(trt: Any, builder: Any, capabilities: list[Any], request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    if request["plugin_library"]:  # states that a plugin updates in place
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(capability, place)
    if request["strip_weights"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if request["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
    config.progress_monitor = _monitor(trt)
    return config


def _build(
    trt: Any,
    builder: Any,
    network: Any,
    capabilities: list[Any],
    request: dict[str, Any],
    result: Result,
) -> None:
    config = _configure(trt, builder, capabilities, request)
    for shapes in request["profiles"]:
        problem = _add_profile(builder, config, network, shapes)
        if problem:
            result.write(profile_problem=problem)
            return
    cache = request["timing_cache"]
    if cache:
        _use_measurements(config, Path(cache))
    result.write(stage="building")
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = round(time.perf_counter() - start, 3)
    if plan is None:
        result.write(seconds_build=seconds, engine_bytes=None)
        return
    if request["engine"]:
        result.write(stage="writing the engine", **_inspect(trt, builder, network, plan))
    try:
        _write(config, plan, request)
    except OSError as error:
        result.write(seconds_build=seconds, write_problem=error.strerror or str(error))
        return
    result.write(seconds_build=seconds, engine_bytes=plan.nbytes)


def _use_measurements(config: Any, cache: Path) -> None:
    """Begins with what was measured before; anew where that is damaged or of another GPU."""
    known = cache.read_bytes() if cache.exists() else b""
    for content in (known, b""):
        measured = config.create_timing_cache(content)
        # enterprise only: TensorRT-RTX keeps no measurements
        if measured is not None and config.set_timing_cache(measured, False):
            return


def _write(config: Any, plan: Any, request: dict[str, Any]) -> None:
    """Writes the engine and what was measured for it, where they are asked for."""
    if request["engine"]:
        Path(request["engine"]).write_bytes(plan)
    cache = request["timing_cache"]
    measured = config.get_timing_cache() if cache else None
    if measured is not None:  # enterprise only
        draft = Path(f"{cache}.{os.getpid()}")
        draft.write_bytes(measured.serialize())
        draft.replace(cache)


def _inspect(trt: Any, builder: Any, network: Any, plan: Any) -> dict[str, Any]:
    """The engine's layers as its inspector tells them, or without a GPU those of the network."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    engine = runtime.deserialize_cuda_engine(memoryview(plan)) if _has_gpu() else None
    if engine is not None:  # not executed where no GPU is
        told = engine.create_engine_inspector().get_engine_information(
            trt.LayerInformationFormat.JSON
        )
        return {"layer_source": "engine inspector", "layer_list": json.loads(told)["Layers"]}
    layers = [
        {
            "Name": layer.name,
            "LayerType": layer.type.name,
            "Precision": layer.get_output(0).dtype.name if layer.num_outputs else None,
        }
        for layer in _layers(trt, network)
    ]
    return {"layer_source": "network", "layer_list": layers}


def _has_gpu() -> bool:
    with contextlib.suppress(OSError, AttributeError):
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    return False


def main() -> None:
    """Reads the request, does the work, leaves the result file."""
    die_with_parent()
    request = json.load(sys.stdin)
    sys.path += request["import_paths"]
    result = Result(Path(request["result"]))
    trt = importlib.import_module(request["bindings"])
    result.write(version=trt.__version__)
    _work(trt, request, result)
    result.write(stage="done")
    # the library's own tear-down has nothing to add and could only spoil the exit code
    os._exit(0)


if __name__ == "__main__":
    main()
