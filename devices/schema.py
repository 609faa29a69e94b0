"""What a target file and the software file may say: frozen records, each group with its source."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.types import Strict

Kind = Literal["jetson", "datacenter", "workstation", "geforce", "cpu"]
Flavour = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
Dtype = Literal["fp32", "fp16", "bf16"]
WeightBits = Literal[4, 8]

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Source = Annotated[str, StringConstraints(strip_whitespace=True, min_length=8)]
Version = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)*$")]
Figure = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
ComputeCapability = Annotated[int, Field(ge=75, le=200)]

T = TypeVar("T")
# a TOML array arrives as a list, which strict mode does not take for a tuple
Several = Annotated[tuple[T, ...], Strict(False)]
OneOrMore = Annotated[tuple[T, ...], Strict(False), Field(min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sourced(_Record):
    """A group of figures that says where they come from."""

    source: Source


class Gpu(Sourced):
    """Compute capability as an int (87), and the closest one TensorRT-RTX can build for.

    `host` is the processor beside it, for which a plugin library is compiled.
    """

    sm: ComputeCapability
    nearest_rtx_sm: ComputeCapability
    host: Literal["x86_64", "aarch64"]


class Memory(Sourced):
    """Memory the GPU can use; `shared_with_cpu` when the operating system takes its part of it.

    `mode` is the power mode the bandwidth holds in, None where it holds in all.
    """

    total_gb: Figure
    shared_with_cpu: bool
    bandwidth_gb_s: Figure
    mode: Text | None = None


class Peak(Sourced):
    """Peak dense rates in 10^12 operations per second; a rate that is not published is absent.

    fp16, bf16 and fp8 accumulate in fp32, which halves their rate on GeForce. `mode` is the power
    mode the rates hold in, None where there is but one.
    """

    mode: Text | None = None
    fp32: Figure | None = None
    fp16: Figure | None = None
    bf16: Figure | None = None
    fp8: Figure | None = None
    fp4: Figure | None = None
    int8: Figure | None = None
    int4: Figure | None = None


class PowerMode(_Record):
    """One power mode; without watts it is unconstrained."""

    name: Text
    watts: Figure | None = None


class Power(Sourced):
    """The power modes a user can choose."""

    modes: OneOrMore[PowerMode]


class Dtypes(Sourced):
    """Activation dtypes the hardware computes in."""

    allowed: OneOrMore[Dtype]
    preferred: Dtype

    @model_validator(mode="after")
    def _preferred_is_allowed(self) -> Dtypes:
        if self.preferred not in self.allowed:
            raise ValueError(f"preferred '{self.preferred}' is not among allowed")
        return self


class Weights(Sourced):
    """Widths of quantised weights the hardware's kernels take."""

    bits: OneOrMore[WeightBits]


class SoftwareChoice(Sourced):
    """Software stacks this device can run, and the engine edgeattn builds for the default one."""

    flavour: Flavour
    allowed: OneOrMore[Name]
    default: Name

    @model_validator(mode="after")
    def _default_is_allowed(self) -> SoftwareChoice:
        if self.default not in self.allowed:
            raise ValueError(f"default '{self.default}' is not among allowed")
        return self


class Device(_Record):
    """The facts of one target that do not depend on its software: one TOML file."""

    name: Name
    aliases: Several[Name]
    description: Text
    kind: Kind
    gpu: Gpu | None = None
    memory: Memory | None = None
    peak: Peak | None = None
    power: Power | None = None
    dtypes: Dtypes
    weights: Weights
    software: SoftwareChoice

    @property
    def sm(self) -> int | None:
        """Compute capability as an int (87), None for a CPU."""
        return self.gpu.sm if self.gpu else None

    @property
    def nearest_rtx_sm(self) -> int | None:
        """The compute capability to check a TensorRT-RTX build with, None for a CPU."""
        return self.gpu.nearest_rtx_sm if self.gpu else None

    @property
    def flavour(self) -> Flavour:
        """The engine edgeattn builds for this device with its default software."""
        return self.software.flavour

    @model_validator(mode="after")
    def _gpu_facts_are_there(self) -> Device:
        if self.kind != "cpu" and (self.gpu is None or self.memory is None or self.peak is None):
            raise ValueError(f"a {self.kind} device needs the groups gpu, memory and peak")
        return self

    @model_validator(mode="after")
    def _modes_can_be_chosen(self) -> Device:
        modes = [mode.name for mode in self.power.modes] if self.power else []
        for group in (self.memory, self.peak):
            if group is not None and group.mode is not None and group.mode not in modes:
                raise ValueError(f"'{group.mode}' is not among the power modes")
        return self


class Stack(Sourced):
    """What is installed on the device."""

    engine: Flavour
    version: Version
    cuda: Version | None = None
    l4t: Version | None = None
    python: Version | None = None


class GraphRules(Sourced):
    """The ONNX dialect this software reads.

    `operators` chooses standard ONNX 23 Attention and RMSNormalization, primitive ops, or
    "group-query", the standard ones with ONNX Runtime's GroupQueryAttention where heads and their
    rotated part are multiples of `head_dim_multiple`. Outside `min_head_dim` to `max_head_dim`
    Attention has no kernel and is spelled out.
    `opset_static_cache`: for a static KV cache, None where the software has no TensorScatter;
    `int8_static_cache` where that takes integers.
    `strip_functions`: the parser prefers a function body over a plugin of the same name, so the
    builder must remove the bodies.
    """

    opset: Annotated[int, Field(ge=18, le=28)]
    opset_int4: Annotated[int, Field(ge=21, le=28)]
    opset_static_cache: Annotated[int, Field(ge=24, le=28)] | None = None
    int8_static_cache: bool = False
    operators: Literal["standard", "primitive", "group-query"]
    strip_functions: bool
    kv_cache: Literal["concat", "shared-buffer"]
    dtypes: OneOrMore[Dtype]
    int4_group_sizes: OneOrMore[Count]
    min_head_dim: Count | None = None
    max_head_dim: Count | None = None
    head_dim_multiple: Count = 1


class Software(_Record):
    """One software stack: the facts that do not depend on the board."""

    name: Name
    description: Text
    stack: Stack
    graph: GraphRules
