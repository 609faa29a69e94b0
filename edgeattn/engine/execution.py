"""Runs an engine: a decoder in TensorRT on this machine's GPU, its KV cache kept there."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.engine.cuda import Gpu, Memory
from edgeattn.engine.flavours import FLAVOURS
from edgeattn.engine.record import Engine
from edgeattn.errors import BundleError, LoweringError, RuntimeInputError

_PAST, _PRESENT = "past_key_values.", "present."
# Names of trt.DataType; numpy has no bf16, so its bits stand for it.
_DTYPES: Mapping[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
Shape = tuple[int, ...]


@dataclass(eq=False)
class DeviceCache:
    """Keys and values on the GPU.

    A step takes a cache and gives the next one. A growing cache that was taken lends its memory to
    the step after, a static one is written in place: either is good for one step.

    Attributes:
        shapes: `[B, Hkv, S, D]` by name of the graph's input.
        places: slots in use, padding included.
        taken: whether a step has it already.
    """

    buffers: dict[str, Memory]
    spare: dict[str, Memory]
    shapes: dict[str, Shape]
    places: int
    taken: bool = False

    @property
    def nbytes(self) -> int:
        """Memory on the GPU, with what the next step writes into."""
        every = {id(m): m.nbytes for held in (self.buffers, self.spare) for m in held.values()}
        return sum(every.values())


class EngineRunner:
    """An engine that is loaded; for one thread at a time.

    It lives in this process and can end it if TensorRT crashes: what is run for the first time is
    run in a child (`edgeattn.verify.tensorrt_child`).

    Args:
        engine: that `require_runs_here` accepts.
        bundle: it belongs to.

    Raises:
        MissingDependencyError: no GPU or no TensorRT.
        LoweringError: TensorRT does not load the engine.
        RuntimeInputError: the GPU's memory does not suffice.
    """

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        flavour = FLAVOURS[engine.record.flavour]
        self._trt = flavour.load()
        self.title = f"{flavour.title} {self._trt.__version__}"
        self._name = engine.path.name
        self._gpu = Gpu()
        self._log = _error_log(self._trt)
        with self._gpu.current():
            self._engine = self._deserialize(engine, bundle)
            if engine.record.stripped:
                self._refit(engine, bundle)
            self._context = self._engine.create_execution_context()
        if self._context is None:
            self._refuse("prepare the engine", "free memory on the GPU")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._engine.get_tensor_mode
        self._inputs = [name for name in names if mode(name) == self._trt.TensorIOMode.INPUT]
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        self._dtypes = {name: self._dtype(name) for name in names}
        # of a static cache the slots are a number in the graph
        keys = [name for name in self._past if name.endswith((".key", ".value"))]
        slots = int(tuple(self._engine.get_tensor_shape(keys[0]))[2]) if keys else -1
        self._capacity = slots if slots >= 0 else None
        self._profile: int | None = None
        self._held: dict[str, Memory] = {}

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        cache: DeviceCache | None = None,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """One step of the decoder.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`, 1 at tokens.
            position_ids: `[B, T]`.
            cache: what the step before returned, or None for an empty one.

        Returns:
            Logits `[B, T, V]` (`[B, 1, V]` when the graph keeps the last only) and the new cache.

        Raises:
            LoweringError: the engine was built for other sizes.
            RuntimeInputError: the GPU fails, for one out of memory, or the cache was taken.
        """
        batch, length = input_ids.shape
        feeds = {"input_ids": input_ids, "position_ids": position_ids}
        feeds.update(self._places(attention_mask, length))
        with self._gpu.current():
            past = self._empty_cache(batch) if cache is None else cache
            if past.taken:
                raise RuntimeInputError(
                    expected="the newest cache of an engine",
                    came="this one was given to a step before, which has its memory",
                    todo="run the tokens again from the beginning",
                )
            self._choose_profile({n: a.shape for n, a in feeds.items()} | past.shapes)
            alive = [self._feed(name, array) for name, array in feeds.items()]
            for name in self._past:
                self._set_shape(name, past.shapes[name])
                self._bind(name, past.buffers[name])
            present = self._present(past, attention_mask.shape[1])
            logits = self._output("logits")
            past.taken = True
            self._execute()
            del alive
            array = np.empty(logits[0], self._dtypes["logits"])
            self._gpu.download(array, logits[1])
        return self._to_float32("logits", array), present

    def read(self, cache: DeviceCache, name: str) -> NDArray[np.float32]:
        """Keys or values `[B, Hkv, P, D]` of a cache, or a state, by name of the graph's output."""
        past = _PAST + name.removeprefix(_PRESENT)
        array = np.empty(cache.shapes[past], self._dtypes[past])
        with self._gpu.current():
            self._gpu.download(array, cache.buffers[past])
        found = self._to_float32(past, array)
        return found[:, :, : cache.places] if name.endswith((".key", ".value")) else found

    @property
    def cache_names(self) -> tuple[str, ...]:
        """The graph's outputs that are keys and values."""
        return tuple(_PRESENT + name.removeprefix(_PAST) for name in self._past)

    def _deserialize(self, engine: Engine, bundle: Bundle) -> Any:
        runtime = self._trt.Runtime(self._log)
        if engine.record.plugins is not None:
            library = (bundle.path / engine.record.plugins.file).resolve()
            # gives None where this process has loaded it before
            runtime.get_plugin_registry().load_library(str(library))
        with (
            engine.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            loaded = runtime.deserialize_cuda_engine(content)
        if loaded is None:
            self._refuse(
                "load the engine", "check the driver; else build it with edgeattn build --force"
            )
        self._runtime = runtime  # must outlive the engine
        return loaded

    def _refit(self, engine: Engine, bundle: Bundle) -> None:
        """Puts the weights into an engine that was built without."""
        model = read_graph(bundle)
        if engine.record.plugins is not None:
            del model.functions[:]  # it was built without them
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_bytes(model.SerializeToString(), str(bundle.model_file.resolve())):
            self._refuse("take the weights of the graph", "build it again without --strip-weights")
        if not refitter.refit_cuda_engine():
            self._refuse("take the weights of the graph", "build it again without --strip-weights")

    def _dtype(self, name: str) -> type[np.generic]:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise BundleError(
                expected=f"inputs and outputs of type {', '.join(_DTYPES)}",
                came=f"{name} of {self._name} is {kind}",
                todo="export the bundle again",
            )
        return _DTYPES[kind]

    def _places(self, mask: NDArray[np.int64], length: int) -> dict[str, NDArray[np.int64]]:
        """The inputs that say where keys lie: of a static cache all slots, and the first new."""
        batch, places = mask.shape
        if self._capacity is None:
            return {"attention_mask": mask}
        if places > self._capacity:
            raise LoweringError(
                expected=f"at most {self._capacity} tokens in the static cache of {self._name}",
                came=f"there are {places}",
                todo="give fewer, or export with a larger --context",
            )
        slots = np.zeros((batch, self._capacity), np.int64)
        slots[:, :places] = mask
        return {"attention_mask": slots, "write_indices": np.full(batch, places - length)}

    def _empty_cache(self, batch: int) -> DeviceCache:
        buffers: dict[str, Memory] = {}
        shapes: dict[str, Shape] = {}
        for name in self._past:
            declared = tuple(self._engine.get_tensor_shape(name))
            shapes[name] = (batch, *(max(size, 0) for size in declared[1:]))  # -1 counts places
            buffers[name] = self._gpu.allocate(self._nbytes(name, shapes[name]))
            # a masked slot counts nothing, unless it holds a NaN; a state begins with zeros
            self._gpu.clear(buffers[name])
        return DeviceCache(buffers, {}, shapes, 0)

    def _present(self, past: DeviceCache, places: int) -> DeviceCache:
        """Binds memory for the cache after this step."""
        if self._capacity is not None:
            for name in self._past:
                self._bind(_PRESENT + name.removeprefix(_PAST), past.buffers[name])
            return DeviceCache(past.buffers, {}, past.shapes, places)
        buffers, shapes = {}, {}
        for name in self._past:
            output = _PRESENT + name.removeprefix(_PAST)
            shapes[name] = tuple(self._context.get_tensor_shape(output))
            buffers[name] = self._grown(past.spare.get(name), self._nbytes(output, shapes[name]))
            self._bind(output, buffers[name])
        return DeviceCache(buffers, past.buffers, shapes, places)

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        """The narrowest optimisation profile that holds these shapes: decoding has its own."""
        fitting = {}
        for index in range(self._engine.num_optimization_profiles):
            ranges = {n: self._engine.get_tensor_profile_shape(n, index) for n in self._inputs}
            if all(_within(shapes[name], *map(tuple, ranges[name])) for name in self._inputs):
                fitting[index] = math.prod(ranges["input_ids"][2])
        if not fitting:
            sizes = ", ".join(f"{name} {list(shapes[name])}" for name in sorted(shapes)[:3])
            raise LoweringError(
                expected=f"shapes within an optimisation profile of {self._name}",
                came=f"they are {sizes}",
                todo="give less at once, or build with other sizes: edgeattn build --profile",
            )
        chosen = min(fitting, key=lambda index: fitting[index])
        if chosen != self._profile:
            stream = self._gpu.stream.value
            if not self._context.set_optimization_profile_async(chosen, stream):
                self._refuse("switch to another optimisation profile", "free memory on the GPU")
            self._gpu.synchronize()
            self._profile = chosen

    def _feed(self, name: str, array: NDArray[np.int64]) -> NDArray[np.generic]:
        """Uploads an input; what is returned must live until the stream is done."""
        dense: NDArray[np.generic] = np.ascontiguousarray(array, self._dtypes[name])
        self._set_shape(name, dense.shape)
        self._held[name] = self._at_least(self._held.get(name), dense.nbytes)
        self._gpu.upload(self._held[name], dense)
        self._bind(name, self._held[name])
        return dense

    def _output(self, name: str) -> tuple[Shape, Memory]:
        shape = tuple(self._context.get_tensor_shape(name))
        self._held[name] = self._at_least(self._held.get(name), self._nbytes(name, shape))
        self._bind(name, self._held[name])
        return shape, self._held[name]

    def _at_least(self, memory: Memory | None, nbytes: int) -> Memory:
        """The same memory where it suffices, else more."""
        return memory if memory and memory.nbytes >= nbytes else self._gpu.allocate(nbytes)

    def _grown(self, memory: Memory | None, nbytes: int) -> Memory:
        """Likewise, with room to grow by half, so that few steps need more."""
        room = nbytes + nbytes // 2
        return memory if memory and memory.nbytes >= nbytes else self._gpu.allocate(room)

    def _nbytes(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * np.dtype(self._dtypes[name]).itemsize

    def _set_shape(self, name: str, shape: Shape) -> None:
        if not self._context.set_input_shape(name, shape):
            self._refuse(f"take {name} of shape {list(shape)}", "report this graph")

    def _bind(self, name: str, memory: Memory) -> None:
        if not self._context.set_tensor_address(name, memory.address):
            self._refuse(f"take memory for {name}", "report this graph")

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._gpu.stream.value):
            self._refuse(
                "run the engine", "free memory on the GPU; if that does not help, report it"
            )

    def _refuse(self, what: str, todo: str) -> NoReturn:
        raise LoweringError(
            expected=f"{self.title} to {what} ({self._name})",
            came=f"it says: {self._log.errors[-1]}" if self._log.errors else "it gives no reason",
            todo=todo,
        )

    def _to_float32(self, name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
        if self._dtypes[name] is np.uint16:  # bf16 is the upper half of an fp32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)


def _within(shape: Shape, low: Shape, usual: Shape, high: Shape) -> bool:
    return all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))


def _error_log(trt: Any) -> Any:
    """A logger that keeps what went wrong."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # the package ships no type stubs
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()
