"""The half of the fake TensorRT that parses and builds: what `edgeattn.engine.child` calls of it.

FAKE_TENSORRT_ENGINE, JSON, is added to the engines it makes.
"""

from __future__ import annotations

import enum
import json
import os
from typing import Any

import onnx

__all__ = [
    "Builder",
    "BuilderFlag",
    "IProgressMonitor",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "PreviewFeature",
    "ProfilingVerbosity",
]

NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"])
BuilderFlag = enum.Enum("BuilderFlag", ["STRIP_PLAN", "REFIT_IDENTICAL"])
PreviewFeature = enum.Enum("PreviewFeature", ["ALIASED_PLUGIN_IO_10_03"])
MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
LayerType = enum.Enum("LayerType", ["PLUGIN_V3", "OTHER"])
LayerInformationFormat = enum.Enum("LayerInformationFormat", ["JSON"])


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        dimensions = value.type.tensor_type.shape.dim
        self.shape = [d.dim_value if d.HasField("dim_value") else -1 for d in dimensions]


class _Layer:
    type = LayerType.OTHER


class _Network:
    def __init__(self) -> None:
        self.graph, self.file, self.num_layers = onnx.GraphProto(), "", 0

    @property
    def num_inputs(self) -> int:
        return len(self.graph.input)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.graph.input[index])

    def get_layer(self, index: int) -> _Layer:
        return _Layer()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: _Network, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        return self.parse(onnx.load(model, load_external_data=False).SerializeToString(), model)

    def parse(self, model: bytes, path: str) -> bool:
        self._network.graph.CopyFrom(onnx.load_from_string(model).graph)
        self._network.file = path
        self._network.num_layers = len(self._network.graph.node)
        return True


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *triple: tuple[int, ...]) -> None:
        self.shapes[name] = [list(shape) for shape in triple]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"measured"


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.flags: set[BuilderFlag] = set()
        self.progress_monitor: Any = None
        self._cache: _TimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        pass

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        pass

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if cache.content == b"of another GPU":
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: Any) -> None:
        self.logger, self.max_threads = logger, 1

    def create_network(self, flags: int) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        import numpy as np

        fixed = {t.name: [t.shape] * 3 for t in map(_Tensor, network.graph.input)}
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 1)
        monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        told = {
            "model": network.file,
            "profiles": [{**fixed, **profile.shapes} for profile in config.profiles],
            "stripped": BuilderFlag.STRIP_PLAN in config.flags,
            **json.loads(os.environ.get("FAKE_TENSORRT_ENGINE", "{}")),
        }
        return np.frombuffer(json.dumps(told).encode(), np.uint8)
