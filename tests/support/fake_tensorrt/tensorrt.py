"""A TensorRT for machines without a GPU: an "engine" is JSON that names an ONNX graph.

`fake_builder` makes such engines. ONNX Runtime runs the graph on what lies at the addresses it is
given, which are the host's where libcuda is the fake one, too. The JSON: "model", "profiles"
(shapes by input), "stripped", "bf16" (an fp32 graph keeps its numbers as one in bf16 would); and
what goes wrong: "perturb" (output -> what is added to its first number), "fail" (a function) and
"crash". Misuse is an error, as it would be on a GPU: shapes outside the profile, an address that is
missing, a growing cache written over itself, weights that were not put in.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "11.1.0"


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class Logger(ILogger):
    def __init__(self, severity: int = ILogger.WARNING) -> None:
        super().__init__()

    def log(self, severity: int, message: str) -> None:
        pass


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8, INT32, INT64, BOOL = range(7)


_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int8)": (DataType.INT8, np.int8),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}


class IPluginRegistry:
    def load_library(self, plugin_path: str) -> object:
        assert os.path.isabs(plugin_path)
        ctypes.CDLL(plugin_path)
        return object()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def get_plugin_registry(self) -> IPluginRegistry:
        return IPluginRegistry()

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        told = json.loads(bytes(serialized_engine))
        if told.get("crash") == "deserialize":
            os.kill(os.getpid(), signal.SIGSEGV)
        if told.get("fail") == "deserialize":
            self._logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1")
            return None
        return ICudaEngine(told, self._logger)


class ICudaEngine:
    def __init__(self, told: dict[str, Any], logger: ILogger) -> None:
        import onnxruntime

        self.told, self.logger, self.stripped = told, logger, told.get("stripped", False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(
            told["model"], options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.profiles = told["profiles"]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.num_optimization_profiles = len(self.profiles)

    def _value(self, name: str) -> Any:
        return self.inputs[name] if name in self.inputs else self.outputs[name]

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.BF16 if self.is_bf16(name) else _TYPES[self._value(name).type][0]

    def is_bf16(self, name: str) -> bool:
        return self.told.get("bf16", False) and self._value(name).type == "tensor(float)"

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._value(name).shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self.profiles[profile_index][name]

    def create_engine_inspector(self) -> ICudaEngine:
        return self

    def get_engine_information(self, format: object) -> str:
        layer = {"Name": "all", "LayerType": "onnxruntime", "Precision": "FP16"}
        return json.dumps({"Layers": [layer]})

    def create_execution_context(self) -> IExecutionContext | None:
        return None if self.told.get("fail") == "create_context" else IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, list[int]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._shapes = profile_index, {}
        if log := os.environ.get("FAKE_TENSORRT_PROFILES"):
            with Path(log).open("a") as file:
                file.write(f"{profile_index}\n")
        return bool(stream_handle) and self._engine.told.get("fail") != "set_profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.profiles[self._profile][name]
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            self._engine.logger.log(ILogger.ERROR, f"setInputShape: {name} {shape}")
            return False
        self._shapes[name] = list(shape)
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        sizes: dict[str, int] = {}
        for given, value in self._engine.inputs.items():
            for size, dimension in zip(self._shapes[given], value.shape, strict=True):
                if isinstance(dimension, str):
                    assert sizes.setdefault(dimension, size) == size, (given, dimension)
        shape = self._engine._value(name).shape
        return [size if isinstance(size, int) else sizes[size] for size in shape]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if engine.told.get("crash") == "execute":
            os.kill(os.getpid(), signal.SIGSEGV)
        if engine.told.get("fail") == "execute" or engine.stripped or not stream_handle:
            engine.logger.log(ILogger.ERROR, "IExecutionContext::enqueueV3: Error Code 1")
            return False
        feeds = {name: self._read(name) for name in engine.inputs}
        found = engine.session.run(list(engine.outputs), feeds)
        for name, value in zip(engine.outputs, found, strict=True):
            value = value.copy()
            value.flat[0] += engine.told.get("perturb", {}).get(name, 0)
            self._require_apart(name, value.shape)
            narrow = (value.view(np.uint32) >> 16) if engine.is_bf16(name) else value
            self._at(name, value.shape)[...] = narrow
        return True

    def _read(self, name: str) -> np.ndarray:
        raw = self._at(name)
        if self._engine.is_bf16(name):
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.copy()

    def _at(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """What lies at a tensor's address."""
        dtype = _TYPES[self._engine._value(name).type][1]
        dtype = np.uint16 if self._engine.is_bf16(name) else dtype
        shape = tuple(self._shapes[name]) if shape is None else shape
        count = int(np.prod(shape))
        raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(
            self._addresses[name]
        )
        return np.frombuffer(raw, dtype, count).reshape(shape)

    def _require_apart(self, output: str, shape: tuple[int, ...]) -> None:
        """Only a static cache may be written where it is read."""
        for name in self._engine.inputs:
            if self._addresses[name] == self._addresses[output]:
                assert tuple(self._shapes[name]) == tuple(shape), (name, output)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.engine, self.loaded = engine, False

    def refit_cuda_engine(self) -> bool:
        self.engine.stripped = not self.loaded
        return self.loaded


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str | None = None) -> bool:
        self._refitter.loaded = bool(model) and path == self._refitter.engine.told["model"]
        return self._refitter.loaded


from fake_builder import *  # noqa: E402, F403
