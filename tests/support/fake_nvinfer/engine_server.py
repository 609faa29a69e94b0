"""Runs "engines" for fake_nvinfer.cpp: requests on stdin, answers on stdout.

A message is a line of JSON, then as many bytes as its field "bytes" says. What an engine is, and
what goes wrong in it, is fake_tensorrt's matter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).parents[1] / "fake_tensorrt"))

import tensorrt as trt


class Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def log(self, severity: int, message: str) -> None:
        self.last = message


class Server:
    """One engine."""

    def __init__(self) -> None:
        self.log = Log()

    def open(self, asked: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        self.engine = trt.Runtime(self.log).deserialize_cuda_engine(content)
        if self.engine is None:
            return self.failed()
        names = [*self.engine.inputs, *self.engine.outputs]
        tensors = [
            {
                "name": name,
                "input": name in self.engine.inputs,
                "dtype": self.engine.get_tensor_dtype(name).name,
                "shape": self.engine.get_tensor_shape(name),
            }
            for name in names
        ]
        return {"ok": True, "tensors": tensors, "profiles": self.engine.profiles}, b""

    def shapes(self, asked: dict[str, Any], _: bytes) -> tuple[dict[str, Any], bytes]:
        context = self._context(asked)
        if context is None:
            return self.failed()
        found = {name: context.get_tensor_shape(name) for name in self.engine.outputs}
        return {"ok": True, "shapes": found}, b""

    def run(self, asked: dict[str, Any], raw: bytes) -> tuple[dict[str, Any], bytes]:
        context = self._context(asked)
        if context is None:
            return self.failed()
        held, begin = {}, 0
        for name in self.engine.inputs:
            held[name] = np.zeros(max(self._bytes(context, name), 1), np.uint8)
            size = self._bytes(context, name)
            held[name][:size] = np.frombuffer(raw, np.uint8, size, begin)
            begin += size
        assert begin == len(raw)
        for name in self.engine.outputs:
            held[name] = np.zeros(max(self._bytes(context, name), 1), np.uint8)
        for name, memory in held.items():
            assert context.set_tensor_address(name, memory.ctypes.data)
        if not context.execute_async_v3(1):
            return self.failed()
        outputs = [held[n][: self._bytes(context, n)].tobytes() for n in self.engine.outputs]
        return {"ok": True}, b"".join(outputs)

    def failed(self) -> tuple[dict[str, Any], bytes]:
        return {"ok": False, "error": self.log.last}, b""

    def _context(self, asked: dict[str, Any]) -> Any:
        context = self.engine.create_execution_context()
        context.set_optimization_profile_async(asked["profile"], 1)
        fits = [context.set_input_shape(n, tuple(shape)) for n, shape in asked["shapes"].items()]
        return context if all(fits) else None

    def _bytes(self, context: Any, name: str) -> int:
        """Of a tensor with the shape it has."""
        width = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "BOOL": 1}
        shape = (
            context._shapes[name] if name in self.engine.inputs else context.get_tensor_shape(name)
        )
        return int(np.prod(shape)) * width[self.engine.get_tensor_dtype(name).name]


def main() -> None:
    onnxruntime.set_default_logger_severity(
        3
    )  # errors: that a cache is not updated in place is none
    server, read, write = Server(), sys.stdin.buffer, sys.stdout.buffer
    for line in iter(read.readline, b""):
        asked = json.loads(line)
        answer, raw = getattr(server, asked["do"])(asked, read.read(asked["bytes"]))
        write.write(json.dumps({**answer, "bytes": len(raw)}).encode() + b"\n" + raw)
        write.flush()


if __name__ == "__main__":
    main()
