"""A decoder in ONNX Runtime: the one place of the runtime that imports onnxruntime."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.errors import (
    BundleError,
    MissingDependencyError,
    RuntimeInputError,
    UsageError,
    unknown_name,
)
from edgeattn.planner.lowering import Lowering
from edgeattn.runtime.in_place import InPlaceRunner, free_capacity, runner_for
from edgeattn.runtime.kv_buffer import PAST, PRESENT, Prefix, empty_shape
from edgeattn.runtime.layout import Layout
from edgeattn.runtime.providers import (
    DEVICES,
    PROVIDERS,
    provider_chain,
    provider_options,
    require_started,
    run_bound,
    widen_boundary,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto
    from onnxruntime import InferenceSession

_LOG_ERRORS_ONLY = 3
# Older releases requantise an int8 weight that is transposed after DequantizeLinear (a tied LM
# head): logits off by 0.8 %, measured from 1.23.2 to 1.28. There its quantisation passes stay off,
# which costs speed.
_QDQ_SOUND = (1, 30)
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def open_onnxruntime(
    model: Path | bytes,
    *,
    weights_dir: Path | None = None,
    threads: int | None = None,
    exact: bool = False,
    keep_rounding: bool = False,
    provider: str = "cpu",
    provider_options: Mapping[str, str] | None = None,
) -> InferenceSession:
    """Opens a graph in ONNX Runtime.

    Args:
        model: an ONNX file, or the serialised graph.
        weights_dir: folder of the external data; needed for a serialised graph that has any.
        threads: threads of one operator; None takes every core this process may use.
        exact: multiply int4 weights in fp32 instead of rounding activations to int8.
        keep_rounding: round where the graph does; else ONNX Runtime may move a rounding ahead of a
            value that the graph also gives out.
        provider: a name in `PROVIDERS`.
        provider_options: of the provider.

    Raises:
        MissingDependencyError: onnxruntime is not installed, has no such provider or cannot start
            it.
        UsageError: the provider is unknown or `threads` is no positive number.
        BundleError: ONNX Runtime refuses the graph.
    """
    ort = _onnxruntime()
    chain = provider_chain(ort, provider, provider_options or {})
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.intra_op_num_threads = _thread_count(threads)
    options.inter_op_num_threads = 1
    # A pattern is planned and kept for each new input shape, and each decode step has a new one.
    options.enable_mem_pattern = False
    if keep_rounding or _release(ort.__version__) < _QDQ_SOUND:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # An int8 matrix with one scale per output is cut into blocks; the default of 32 reads more.
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if weights_dir is not None and isinstance(model, bytes):
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(weights_dir))
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=chain)
    except Exception as error:  # the classes ONNX Runtime raises have no common base of their own
        raise BundleError(
            expected="a graph that ONNX Runtime loads",
            came=f"onnxruntime {ort.__version__} says: {first_line(error)}",
            todo="upgrade onnxruntime, or export for a software version with an older opset",
        ) from error
    require_started(session, provider)
    return session


class OnnxRuntimeEncoder:
    """A bundle's encoder in ONNX Runtime; see `open_onnxruntime` for the arguments.

    Raises:
        BundleError: ONNX Runtime cannot load or run it.
        UsageError: an unknown provider, or `threads` is no positive number.
        MissingDependencyError: onnxruntime is not installed, or has no such provider.
    """

    def __init__(self, bundle: Bundle, *, provider: str, threads: int | None, exact: bool) -> None:
        if provider not in PROVIDERS:
            raise unknown_name("provider", provider, PROVIDERS)
        _check_graph(bundle, provider)
        try:
            self._session = open_onnxruntime(
                bundle.model_file, threads=threads, exact=exact, provider=provider
            )
        except BundleError as error:
            raise _cannot_load(bundle, error) from error
        shape, self._output = bundle.encoder_shape, bundle.encoder_shape.output
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        if inputs.keys() != set(shape.input.names) or self._first_output() != self._output:
            raise BundleError(
                expected=f"an encoder that gives {self._output} in {bundle.model_file}",
                came=f"the graph reads {', '.join(sorted(inputs))}",
                todo="export the bundle again",
            )
        self._narrow = [name for name, kind in inputs.items() if kind == "tensor(float16)"]

    def _first_output(self) -> str:
        return str(self._session.get_outputs()[0].name)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See `edgeattn.runtime.backend.EncoderBackend.run`."""
        read = {n: a.astype(np.float16) if n in self._narrow else a for n, a in feeds.items()}
        try:
            (found,) = self._session.run([self._output], read)
        except Exception as error:  # as in open_onnxruntime
            shape = next(iter(feeds.values())).shape
            raise RuntimeInputError(
                expected="ONNX Runtime to run the model",
                came=f"inputs of shape {list(shape)} failed: {first_line(error)}",
                todo="give fewer rows at once or free memory",
            ) from error
        output: NDArray[np.float32] = found.astype(np.float32, copy=False)
        return output


# ONNX Runtime's own tensors, or part of a buffer it writes in place.
Cache = tuple[Any, ...] | Prefix


class OnnxRuntimeBackend:
    """A bundle's decoder in ONNX Runtime."""

    def __init__(self, bundle: Bundle, *, provider: str, threads: int | None, exact: bool) -> None:
        if provider not in PROVIDERS:
            raise unknown_name("provider", provider, PROVIDERS)
        graph, kv_cache = _check_graph(bundle, provider), bundle.manifest.lowering.get("kv_cache")
        # where the cache stays; on the CPU nothing needs to be bound
        self._device = DEVICES[provider] if provider != "cpu" else None
        source: Path | bytes = bundle.model_file
        options: dict[str, str] = {}
        if self._device is not None:
            options = _make_ready(graph, bundle, provider)
        if kv_cache == "static":
            free_capacity(graph)
        if kv_cache == "static" or self._device is not None:
            source = graph.SerializeToString()
        try:
            self._session = open_onnxruntime(
                source,
                weights_dir=bundle.path,
                threads=threads,
                exact=exact,
                provider=provider,
                provider_options=options,
            )
        except BundleError as error:
            raise _cannot_load(bundle, error) from error
        self._value = _onnxruntime().OrtValue
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._past = [name for name in inputs if name.startswith(PAST)]
        self._outputs = ["logits", *(PRESENT + name[len(PAST) :] for name in self._past)]
        given = {value.name for value in self._session.get_outputs()}
        needed = [*_MODEL_INPUTS, *(["write_indices"] if kv_cache == "static" else [])]
        missing = [name for name in needed if name not in inputs]
        missing += [name for name in self._outputs if name not in given]
        if missing or not self._past:
            raise BundleError(
                expected=f"a decoder in {bundle.model_file}",
                came=f"the graph has no {missing[0] if missing else PAST + 'N.key'}",
                todo="export the bundle again",
            )
        self._empty = [(inputs[name].type, inputs[name].shape) for name in self._past]
        self._in_place: InPlaceRunner | None = None
        runner = runner_for(kv_cache)
        if runner is not None:
            context = bundle.manifest.lowering.get("context") or bundle.shape.max_context
            self._in_place = runner(self._session, context)

    def run(
        self,
        input_ids: NDArray[np.int64],
        past: int,
        layout: Layout | None,
        cache: Cache | None,
    ) -> tuple[NDArray[np.float32], Cache]:
        """See `edgeattn.runtime.backend.Backend.run`.

        Raises:
            RuntimeInputError: ONNX Runtime fails, for one out of memory.
        """
        try:
            if self._in_place is not None:
                assert cache is None or isinstance(cache, Prefix)
                outputs, written = self._in_place.run(input_ids, cache, layout)
                return outputs["logits"].astype(np.float32, copy=False), written
            assert not isinstance(cache, Prefix)
            batch, length = input_ids.shape
            feeds = {"input_ids": input_ids, **vars(layout or Layout.dense(batch, past, length))}
            values = {name: self._to_value(array) for name, array in feeds.items()}
            values.update(zip(self._past, cache or self._empty_cache(batch), strict=True))
            if self._device is None:
                found = self._session.run_with_ort_values(self._outputs, values)
            else:
                found = run_bound(self._session, self._outputs, values, self._device)
            logits, *present = found
            return logits.numpy().astype(np.float32, copy=False), tuple(present)
        except Exception as error:  # as in open_onnxruntime
            batch, length = input_ids.shape
            raise RuntimeInputError(
                expected="ONNX Runtime to run the model",
                came=f"{batch} x {length} tokens failed: {first_line(error)}",
                todo="give fewer tokens at once or free memory",
            ) from error

    def cache_bytes(self, cache: Cache) -> int:
        """Memory of a cache in bytes."""
        if isinstance(cache, Prefix):
            return cache.nbytes
        return sum(int(value.tensor_size_in_bytes()) for value in cache)

    def _to_value(self, array: NDArray[np.int64]) -> Any:
        # ONNX Runtime reads the array in place, so it must be dense; the value keeps it alive.
        return self._value.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))

    def _empty_cache(self, batch: int) -> tuple[Any, ...]:
        return tuple(
            # Zeros of any type have these bytes; bfloat16 is none of numpy's.
            self._value.ortvalue_from_numpy_with_onnx_type(
                np.zeros(empty_shape(shape, batch), _SAME_SIZE[kind]), _ELEMENT_TYPES[kind]
            )
            for kind, shape in self._empty
        )


# Numbers of onnx.TensorProto.DataType, which covers bfloat16, unlike numpy's names.
_ELEMENT_TYPES: Mapping[str, int] = {
    "tensor(float)": 1,
    "tensor(int8)": 3,
    "tensor(float16)": 10,
    "tensor(bfloat16)": 16,
}
_SAME_SIZE: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(int8)": np.int8,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
}


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0))
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UsageError(
            expected="a positive number of threads",
            came=f"it is {threads!r}",
            todo="give 1 or more",
        )
    return threads


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            expected="ONNX Runtime, which runs the bundle",
            came=f"onnxruntime cannot be imported ({error})",
            todo="pip install edgeattn[ort], or edgeattn[gpu] for a machine with an NVIDIA GPU",
        ) from error
    return onnxruntime


def _release(version: str) -> tuple[int, int]:
    """Major and minor of "1.23.2"."""
    major, minor, *_ = [*re.findall(r"\d+", version), "0", "0"]
    return int(major), int(minor)


def _make_ready(proto: ModelProto, bundle: Bundle, provider: str) -> dict[str, str]:
    """Changes a graph for a provider on a GPU; the provider's options."""
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    # buffers that are written in place are numpy's
    every = [value.name for value in (*proto.graph.input, *proto.graph.output)]
    widen_boundary(proto, every if runner_for(lowering.kv_cache) else ["logits"])
    context = lowering.context or bundle.shape.max_context
    model, batch = bundle.model_file, lowering.batch
    return provider_options(proto, model, provider, context=context, batch=batch)


def _check_graph(bundle: Bundle, provider: str) -> ModelProto:
    """The graph; refuses what would load and misbehave, or fail with an unhelpful message."""
    graph = read_graph(bundle)
    if bundle.manifest.lowering.get("dtype") == "bf16" and provider == "cpu":
        raise BundleError(
            expected="a bundle in fp32 or fp16 to run on a CPU",
            came=f"{bundle.path} computes in bf16, which ONNX Runtime's CPU kernels do not",
            todo="export it with --dtype fp16, or run it on its own device",
        )
    return graph


def _cannot_load(bundle: Bundle, error: BundleError) -> BundleError:
    lowering, proven = bundle.manifest.lowering, bundle.manifest.tools.get("onnxruntime")
    about = [f"opset {lowering['opset']}"] if "opset" in lowering else []
    about += [f"proven with onnxruntime {proven}"] if proven else []
    known = f" ({', '.join(about)})" if about else ""
    needed = f">={proven}" if proven else ""
    return BundleError(
        expected=f"an ONNX Runtime that loads {bundle.path}{known}",
        came=error.came,
        todo=f"pip install --upgrade 'onnxruntime{needed}', "
        "or export for software with an older opset, as NAME@jetpack6.2",
    )


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its code, C++ signature and further lines."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    line = re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", line)
    return line[:300].rstrip(" .")
