"""An engine that is loaded: shapes, memory and the stream, whatever the model is."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.engine.cuda import Gpu, Memory
from edgeattn.engine.flavours import FLAVOURS
from edgeattn.engine.record import Engine
from edgeattn.errors import BundleError, LoweringError

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


class LoadedEngine:
    """An engine on this machine's GPU; for one thread at a time.

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
        self._dtypes = {name: self._dtype(name) for name in names}
        self._profile: int | None = None
        self._held: dict[str, Memory] = {}

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

    def _choose_profile(self, shapes: Mapping[str, Shape], *, of: str) -> None:
        """The optimisation profile that holds these shapes and is narrowest in the input `of`."""
        fitting = {}
        for index in range(self._engine.num_optimization_profiles):
            ranges = {n: self._engine.get_tensor_profile_shape(n, index) for n in self._inputs}
            if all(_within(shapes[name], *map(tuple, ranges[name])) for name in self._inputs):
                fitting[index] = math.prod(ranges[of][2])
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

    def _feed(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """Uploads an input; what is returned must live until the stream is done."""
        dense = np.ascontiguousarray(self._as_input(name, array))
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

    def _download(self, name: str, shape: Shape, memory: Memory) -> NDArray[np.float32]:
        """An output in fp32, once the stream is done."""
        array = np.empty(shape, self._dtypes[name])
        self._gpu.download(array, memory)
        return self._to_float32(name, array)

    def _as_input(self, name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
        dtype = self._dtypes[name]
        return to_bf16(array) if dtype is np.uint16 else array.astype(dtype, copy=False)

    def _to_float32(self, name: str, array: NDArray[np.generic]) -> NDArray[np.float32]:
        if self._dtypes[name] is np.uint16:  # bf16 is the upper half of an fp32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)


def to_bf16(array: NDArray[np.generic]) -> NDArray[np.uint16]:
    """Bits of the nearest numbers in bf16, ties to even; for finite numbers."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


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
