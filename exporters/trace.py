"""Traces the decoder once, with one layer per kind, to an ONNX graph without weights.

The module is built and traced under fake tensors: nothing of the model's size is ever allocated.
The values between blocks are made outputs of the trace, so that `exporters.stamp` can cut the graph
at names it knows instead of guessing at node order.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from edgeattn.exporters.functions import translations
from edgeattn.models.decoder import Decoder, KVCache
from edgeattn.models.model import TORCH_DTYPES
from edgeattn.planner.lowering import Lowering
from edgeattn.shape import LayerKind, ModelShape

# Sizes that no dimension of a model is likely to equal, so that a trace that bakes one in shows.
_BATCH, _LENGTH, _PAST = 2, 5, 11


@dataclass(frozen=True)
class Trace:
    """A traced decoder.

    Attributes:
        model: ONNX without weights: its initialisers carry the decoder's parameter names.
        hidden: names of the residual stream before layer 0 and after each layer.
        kinds: of the traced layers.
    """

    model: ir.Model
    hidden: tuple[str, ...]
    kinds: tuple[LayerKind, ...]

    def block_of(self, layer: int, shape: ModelShape) -> int:
        """The traced layer that is stamped as `layer` of `shape`."""
        whole = len(self.kinds) == shape.num_layers
        return layer if whole else self.kinds.index(shape.layer_kind(layer))


class _Traced(nn.Module):
    """The decoder with its outputs in a flat order that ONNX can name."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: KVCache
    ) -> tuple[Tensor, ...]:
        output = self.decoder(input_ids, attention_mask, position_ids, past)
        cache = [tensor for pair in output.present for tensor in pair]
        return (output.logits, *cache, *output.hidden)


def trace_decoder(shape: ModelShape, lowering: Lowering, *, whole: bool = False) -> Trace:
    """Traces one block per kind of layer between embedding and head.

    Args:
        shape: the architecture.
        lowering: opset, dtype and spelling of attention.
        whole: trace every layer instead.
    """
    kinds = shape.layer_kinds
    if whole:
        kinds = tuple(shape.layer_kind(i) for i in range(shape.num_layers))
    num_layers = len(kinds)
    names = _Names(num_layers)
    with FakeTensorMode(), _default_dtype(TORCH_DTYPES[lowering.dtype]), _quiet():
        decoder = Decoder(
            replace(shape, num_layers=num_layers, layer_cycle=kinds),
            form=lowering.attention,
            last_logits_only=lowering.logits == "last",
        ).eval()
        program = torch.onnx.export(
            _Traced(decoder),
            _example_inputs(decoder),
            input_names=names.inputs,
            output_names=names.outputs,
            dynamic_shapes=_dynamic_shapes(num_layers),
            opset_version=lowering.opset,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=translations() if shape.has_variants else None,
        )
        assert program is not None
        model = program.model
        _finish(model, names)
    return Trace(model, tuple(names.hidden), kinds)


class _Names:
    """Graph inputs and outputs, named as in Hugging Face's ONNX exports and onnxruntime-genai."""

    def __init__(self, num_layers: int) -> None:
        pairs = [(i, part) for i in range(num_layers) for part in ("key", "value")]
        self.past = [f"past_key_values.{i}.{part}" for i, part in pairs]
        self.inputs = ["input_ids", "attention_mask", "position_ids", *self.past]
        self.present = [f"present.{i}.{part}" for i, part in pairs]
        self.hidden = [f"hidden.{i}" for i in range(num_layers + 1)]
        self.outputs = ["logits", *self.present, *self.hidden]


def _example_inputs(decoder: Decoder) -> tuple[Tensor, Tensor, Tensor, KVCache]:
    shape = decoder.shape
    past = torch.zeros(_BATCH, shape.num_kv_heads, _PAST, shape.head_dim)
    return (
        torch.zeros(_BATCH, _LENGTH, dtype=torch.int64),
        torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64),
        torch.zeros(_BATCH, _LENGTH, dtype=torch.int64),
        tuple((past.clone(), past.clone()) for _ in range(shape.num_layers)),
    )


def _dynamic_shapes(num_layers: int) -> tuple[object, ...]:
    rows_and_length = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    cache = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    # _Traced.forward's arguments arrive in one tuple of four; the cache is nested.
    return (rows_and_length, rows_and_length, rows_and_length, ((cache, cache),) * num_layers)


def _finish(model: ir.Model, names: _Names) -> None:
    """Drops the fake weights, folds constants and names the parameters and dimensions."""
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or value.name is None:
            continue
        if value.name.startswith("decoder."):
            value.const_value = None
            value.name = value.name.removeprefix("decoder.")
    _read_sizes_from_ids(model.graph)
    optimizer.optimize_ir(model)
    _name_dimensions(model.graph, names)
    _drop_trace_metadata(model)


def _read_sizes_from_ids(graph: ir.Graph) -> None:
    """Lets batch size and length be read from input_ids.

    torch reads a size from any input that has it, from some layer's cache in a trace of several.
    """
    ids = next(v for v in graph.inputs if v.name == "input_ids")
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source not in graph.inputs:
            continue
        start = node.attributes.get_int("start", 0)
        one_size = node.attributes.get_int("end", 0) == start + 1
        if one_size and (start == 0 or source.name == "position_ids"):
            node.replace_input_with(0, ids)


def _name_dimensions(graph: ir.Graph, names: _Names) -> None:
    """Replaces torch's symbols by the names clients know; inner shapes are left to inference."""
    batch, length, past, total = (
        ir.SymbolicDim(name)
        for name in (
            "batch_size",
            "sequence_length",
            "past_sequence_length",
            "total_sequence_length",
        )
    )
    for value in graph.inputs:
        assert value.shape is not None
        if value.name in names.past:
            value.shape = ir.Shape([batch, value.shape[1], past, value.shape[3]])
        else:
            last = total if value.name == "attention_mask" else length
            value.shape = ir.Shape([batch, last])
    for value in graph.outputs:
        assert value.shape is not None
        if value.name in names.present:
            value.shape = ir.Shape([batch, value.shape[1], total, value.shape[3]])
        elif value.name in names.hidden:
            value.shape = ir.Shape([batch, length, value.shape[2]])
        else:
            rows = length if not isinstance(value.shape[1], int) else value.shape[1]
            value.shape = ir.Shape([batch, rows, value.shape[2]])
    boundary = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in boundary:
                value.shape = None
                value.type = None


def _drop_trace_metadata(model: ir.Model) -> None:
    """Removes torch's per-node notes: they name source files of the exporting machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's remarks on torchvision and on initialisers that have no value yet."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
