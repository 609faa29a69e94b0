"""Weights of a stamped graph: how each parameter is stored, and streaming them to one file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.attention_variants import TABLES
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.encoder_model import EncoderModel
from edgeattn.models.families import parameter_names
from edgeattn.models.model import TORCH_DTYPES, Model, Progress, rounded
from edgeattn.models.rotary import rotary_buffers
from edgeattn.planner.lowering import Lowering
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.packing import pack_int4
from edgeattn.quant.scheme import WeightFormat

IR_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_TABLE_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.int32: ir.DataType.INT32}
# Offsets a runtime can map without copying.
_PAGE = 4096

Part = Literal["float", "qdata", "scale", "zero_point"]


@dataclass(frozen=True)
class StoredTensor:
    """One initialiser of the file.

    Attributes:
        value: its value in the graph.
        parameter: the decoder parameter it comes from.
        part: the floating-point weight, or the integers, scales or zero points of a quantised one.
        transposed: stored as [inputs, outputs], the operand order of MatMul.
    """

    value: ir.Value
    parameter: str
    part: Part
    transposed: bool


@dataclass
class WeightBinder:
    """Creates the initialisers and DequantizeLinear nodes a graph reads its parameters from.

    Attributes:
        model: names, shapes and formats of the parameters.
        lowering: dtype and embedding form.
        stored: every initialiser made so far, in graph order.
        rotary: constants of rotary positions by name.
        tables: of attention variants by name.
    """

    model: Model | EncoderModel
    lowering: Lowering
    stored: dict[str, StoredTensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks the parameter shapes up once."""
        shape, lowering = self.model.shape, self.lowering
        self._shapes = (
            encoder_parameters(shape) if isinstance(shape, EncoderShape) else parameter_names(shape)
        )
        self.rotary = rotary_buffers(
            shape,
            by_position=lowering.attention == "group-query",
            context=lowering.context or shape.max_context,
            dtype=TORCH_DTYPES[lowering.dtype],
        )
        self.tables = {
            f"layers.{layer}.{TABLES}.{name}": tensor
            for layer, tensors in self.model.tables.items()
            for name, tensor in tensors.items()
        }
        self._dtype = IR_DTYPES[self.lowering.dtype]

    def parameter(self, name: str) -> ir.Value:
        """A parameter that is never quantised: norm gains, biases, rotary frequencies, tables."""
        if name in self.tables:
            table = self.tables[name]
            dtype = _TABLE_DTYPES[table.dtype]
            return self._store(name, name, "float", dtype, tuple(table.shape), transposed=False)
        if name in self.rotary:
            table = self.rotary[name]
            wide = ir.DataType.FLOAT if table.dtype == torch.float32 else self._dtype
            return self._store(name, name, "float", wide, tuple(table.shape), transposed=False)
        return self._store(name, name, "float", self._dtype, self._shapes[name], transposed=False)

    def matrix(
        self, name: str, *, transposed: bool, use: str = ""
    ) -> tuple[ir.Value, list[ir.Node]]:
        """A weight matrix as a floating-point value, and the nodes that dequantise it.

        Args:
            name: the parameter, [outputs, inputs] in the decoder.
            transposed: give it as [inputs, outputs].
            use: names the initialisers of a second use of a quantised parameter. Both uses share
                their bytes in the file; ONNX Runtime fuses DequantizeLinear and MatMul only where
                no other node reads the initialisers.
        """
        outputs, inputs = self._shapes[name]
        format = self.model.weights.format(name)
        if format is None:
            size = (inputs, outputs) if transposed else (outputs, inputs)
            value = self._store(name, name, "float", self._dtype, size, transposed=transposed)
            return value, []
        parts = self._quantized(name, format, transposed=transposed, key=use or name)
        node = _dequantize(f"{use or name}_dequantized", parts, format, int(transposed))
        node.outputs[0].type = ir.TensorType(self._dtype)
        return node.outputs[0], [node]

    def rows(self, name: str, indices: ir.Value, output_name: str) -> list[ir.Node]:
        """Nodes that give rows `indices` of a table as floating point, named `output_name`."""
        format = self.model.weights.format(name)
        if format is None or self.lowering.embedding == "dequantize-gather":
            table, nodes = self.matrix(name, transposed=False)
            return [*nodes, _node("Gather", [table, indices], output_name, axis=0)]
        return self._gather_dequantize(name, format, indices, output_name)

    def _gather_dequantize(
        self, name: str, format: WeightFormat, indices: ir.Value, output_name: str
    ) -> list[ir.Node]:
        qdata, scale, *_ = self._quantized(name, format, transposed=False, key=name)
        rows = _node("Gather", [qdata, indices], "embedding.qdata", axis=0)
        scales = _node("Gather", [scale, indices], "embedding.scale", axis=0)
        last = _constant("embedding.last_axis", np.array([-1], dtype=np.int64))
        column = _node("Unsqueeze", [scales.outputs[0], last.outputs[0]], "embedding.scale_column")
        floats = _node("Cast", [rows.outputs[0]], "embedding.float", to=int(self._dtype))
        product = _node("Mul", [floats.outputs[0], column.outputs[0]], output_name)
        return [rows, scales, last, column, floats, product]

    def _quantized(
        self, name: str, format: WeightFormat, *, transposed: bool, key: str
    ) -> list[ir.Value]:
        """Integers, scales and, at 8 bits, zero points of a parameter.

        The zero points are zeros; ONNX Runtime 1.23 takes int8 for uint8 without them.
        """
        outputs, inputs = self._shapes[name]
        integer = ir.DataType.INT4 if format.bits == 4 else ir.DataType.INT8
        size = (inputs, outputs) if transposed else (outputs, inputs)
        if format.group_size is None:
            scales: tuple[int, ...] = (outputs,)
        else:
            groups = inputs // format.group_size
            scales = (groups, outputs) if transposed else (outputs, groups)
        parts: list[tuple[str, Part, ir.DataType, tuple[int, ...]]] = [
            (key, "qdata", integer, size),
            (f"{key}_scale", "scale", self._dtype, scales),
        ]
        if format.bits == 8:
            parts.append((f"{key}_zero_point", "zero_point", integer, scales))
        return [
            self._store(part_key, name, part, dtype, shape, transposed=transposed)
            for part_key, part, dtype, shape in parts
        ]

    def _store(
        self,
        key: str,
        parameter: str,
        part: Part,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        *,
        transposed: bool,
    ) -> ir.Value:
        if key not in self.stored:
            value = ir.Value(name=key, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self.stored[key] = StoredTensor(value, parameter, part, transposed)
        found = self.stored[key]
        assert found.transposed == transposed, f"{key} is wanted in two layouts"
        return found.value


def _dequantize(
    output: str, parts: list[ir.Value], format: WeightFormat, output_axis: int
) -> ir.Node:
    if format.group_size is None:
        return _node("DequantizeLinear", parts, output, axis=output_axis)
    return _node(
        "DequantizeLinear", parts, output, axis=1 - output_axis, block_size=format.group_size
    )


def _node(op_type: str, inputs: list[ir.Value], output: str, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes=attributes, name=f"{op_type}:{output}")
    node.outputs[0].name = output
    return node


def _constant(name: str, array: np.ndarray) -> ir.Node:
    node = ir.node("Constant", [], attributes={"value": ir.tensor(array)}, name=f"Constant:{name}")
    node.outputs[0].name = name
    return node


def write_weights(
    binder: WeightBinder, path: Path, *, progress: Progress | None = None
) -> tuple[int, str]:
    """Streams every bound parameter to `path` and points the initialisers at it.

    Only one parameter (read, quantised, packed) is in memory at a time.

    Returns:
        The size in bytes and the sha256 of the file.
    """
    by_parameter: dict[str, list[StoredTensor]] = {}
    for stored in binder.stored.values():
        by_parameter.setdefault(stored.parameter, []).append(stored)
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        for count, (parameter, parts) in enumerate(by_parameter.items(), start=1):
            places: dict[tuple[Part, bool], tuple[int, int]] = {}
            for stored, data in _encode(binder, parameter, parts):
                layout = (stored.part, stored.transposed)
                if layout not in places:
                    places[layout] = (writer.write_aligned(data), data.nbytes)
                assert stored.value.shape is not None
                assert stored.value.dtype is not None
                stored.value.const_value = ir.ExternalTensor(
                    path.name,
                    *places[layout],
                    stored.value.dtype,
                    shape=stored.value.shape,
                    name=stored.value.name or "",
                    base_dir=path.parent,
                )
            if progress:
                progress(count, len(by_parameter))
    return writer.position, writer.digest.hexdigest()


def _encode(
    binder: WeightBinder, parameter: str, parts: list[StoredTensor]
) -> Iterator[tuple[StoredTensor, np.ndarray]]:
    """The bytes of each part of one parameter, as a flat uint8 array."""
    dtype = TORCH_DTYPES[binder.lowering.dtype]
    constants = {**binder.rotary, **binder.tables}
    if parameter in constants:
        yield parts[0], _bytes(constants[parameter])
        return
    value = binder.model.weights.read(parameter)
    for stored in parts:
        if isinstance(value, QuantizedTensor):
            tensor = _part(value, stored.part)
        else:
            tensor = rounded(parameter, value, dtype)
        if stored.transposed and tensor.dim() == 2:
            tensor = tensor.T.contiguous()
        if stored.value.dtype == ir.DataType.INT4:
            tensor = pack_int4(tensor)
        yield stored, _bytes(tensor)


def _part(value: QuantizedTensor, part: Part) -> Tensor:
    if part == "qdata":
        return value.qdata
    scale = value.scale if value.format.group_size else value.scale.reshape(-1)
    return scale if part == "scale" else torch.zeros_like(scale, dtype=torch.int8)


def _bytes(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return array


class _HashingWriter:
    """Writes arrays at page-aligned offsets and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def write_aligned(self, data: np.ndarray) -> int:
        """Appends `data` and returns the offset it starts at."""
        self._put(memoryview(bytes(-self.position % _PAGE)))
        offset = self.position
        self._put(data.data)
        return offset

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.position += data.nbytes
