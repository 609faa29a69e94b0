"""Traces the decoder once, with one layer per kind, to an ONNX graph without weights.

The module is built and traced under fake tensors: nothing of the model's size is ever allocated.
The values between blocks are made outputs of the trace, so that `exporters.stamp` can cut the graph
at names it knows instead of guessing at node order.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from edgeattn.encoder_shape import AnyShape
from edgeattn.exporters.functions import translations
from edgeattn.models.decoder import Decoder, KVCache
from edgeattn.models.model import TORCH_DTYPES
from edgeattn.planner.lowering import Lowering
from edgeattn.shape import LayerKind, ModelShape

# Sizes that no dimension of a model is likely to equal, so that a trace that bakes one in shows.
_BATCH, _LENGTH, _PAST = 2, 5, 11
# The states of a layer that have a place for every token, on their third axis.
_GROWING = ("key", "value")


@dataclass(frozen=True)
class Trace:
    """A traced decoder or encoder.

    Attributes:
        model: ONNX without weights: its initialisers carry the network's parameter names.
        hidden: names of the residual stream before layer 0 and after each layer.
        kinds: of the traced layers.
        outputs: names of what the network gives, beside its caches.
    """

    model: ir.Model
    hidden: tuple[str, ...]
    kinds: tuple[LayerKind, ...]
    outputs: tuple[str, ...] = ("logits",)

    def block_of(self, layer: int, shape: AnyShape) -> int:
        """The traced layer that is stamped as `layer` of `shape`."""
        whole = len(self.kinds) == shape.num_layers
        return layer if whole else self.kinds.index(shape.layer_kind(layer))


class _Traced(nn.Module):
    """The decoder with its outputs in a flat order that ONNX can name."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: KVCache,
        write_indices: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output = self.decoder(input_ids, attention_mask, position_ids, past, write_indices)
        cache = [tensor for pair in output.present for tensor in pair]
        return (output.logits, *cache, *output.hidden)


def trace_decoder(shape: ModelShape, lowering: Lowering, *, whole: bool = False) -> Trace:
    """Traces one block per kind of layer between embedding and head.

    Args:
        shape: the architecture.
        lowering: opset, dtype and spelling of attention.
        whole: trace every layer instead.
    """
    kinds = traced_kinds(shape, whole=whole)
    is_static = lowering.kv_cache == "static"
    capacity = lowering.context if is_static else None
    assert capacity is not None or not is_static, "fit_lowering settles it"
    names = _Names(kinds, is_static=is_static)
    with FakeTensorMode(), default_dtype(TORCH_DTYPES[lowering.dtype]), quiet():
        decoder = Decoder(
            replace(shape, num_layers=len(kinds), layer_cycle=kinds),
            form=lowering.attention,
            last_logits_only=lowering.logits == "last",
        ).eval()
        model = to_onnx(
            _Traced(decoder),
            _example_inputs(decoder, is_static=is_static),
            input_names=names.inputs,
            output_names=names.outputs,
            dynamic_shapes=_dynamic_shapes(kinds, is_static=is_static),
            opset=lowering.opset,
            has_own_ops=shape.has_variants or is_static,
        )
        _finish(model, names, capacity)
    return Trace(model, tuple(names.hidden), kinds)


def traced_kinds(shape: AnyShape, *, whole: bool) -> tuple[LayerKind, ...]:
    """The kinds of the layers of a trace: each that there is once, or those of every layer."""
    if whole:
        return tuple(shape.layer_kind(i) for i in range(shape.num_layers))
    return shape.layer_kinds


def to_onnx(
    network: nn.Module,
    inputs: tuple[Any, ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
    opset: int,
    has_own_ops: bool,
) -> ir.Model:
    """The graph of a network as torch's exporter writes it, neither named nor optimised."""
    program = torch.onnx.export(
        network,
        inputs,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=dynamic_shapes,
        opset_version=opset,
        dynamo=True,
        optimize=False,
        verbose=False,
        custom_translation_table=translations() if has_own_ops else None,
    )
    assert program is not None
    return program.model


class _Names:
    """Graph inputs and outputs, named as in Hugging Face's ONNX exports and onnxruntime-genai."""

    def __init__(self, kinds: Sequence[LayerKind], *, is_static: bool) -> None:
        pairs = [(i, part) for i, kind in enumerate(kinds) for part in kind.states]
        self.past = [f"past_key_values.{i}.{part}" for i, part in pairs]
        self.inputs = ["input_ids", "attention_mask", "position_ids", *self.past]
        self.inputs += ["write_indices"] if is_static else []
        self.present = [f"present.{i}.{part}" for i, part in pairs]
        self.hidden = [f"hidden.{i}" for i in range(len(kinds) + 1)]
        self.outputs = ["logits", *self.present, *self.hidden]


def _example_inputs(decoder: Decoder, *, is_static: bool) -> tuple[Tensor | KVCache, ...]:
    slots = _PAST + _LENGTH if is_static else _PAST
    past = tuple(
        tuple(
            _with_places(state, slots) if part in _GROWING else state
            for part, state in zip(decoder.shape.layer_kind(i).states, states, strict=True)
        )
        for i, states in enumerate(decoder.empty_cache(_BATCH))
    )
    write_indices = torch.zeros(_BATCH, dtype=torch.int64)
    return (
        torch.zeros(_BATCH, _LENGTH, dtype=torch.int64),
        torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64),
        torch.zeros(_BATCH, _LENGTH, dtype=torch.int64),
        past,
        *([write_indices] if is_static else []),
    )


def _with_places(state: Tensor, places: int) -> Tensor:
    """Keys or values of so many places, `[B, Hkv, places, D]`."""
    return state.new_zeros(*state.shape[:2], places, state.shape[3])


def _dynamic_shapes(kinds: Sequence[LayerKind], *, is_static: bool) -> tuple[object, ...]:
    rows_and_length = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    grows, stays = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    # _Traced.forward's arguments arrive in one tuple; the cache is nested.
    cache = tuple(
        tuple(grows if part in _GROWING else stays for part in kind.states) for kind in kinds
    )
    shapes = (rows_and_length, rows_and_length, rows_and_length, cache)
    return (*shapes, {0: Dim.DYNAMIC}) if is_static else shapes


def _finish(model: ir.Model, names: _Names, capacity: int | None) -> None:
    """Drops the fake weights, folds constants and names the parameters and dimensions."""
    name_parameters(model, "decoder.")
    _read_shared_sizes(model.graph, is_static=capacity is not None)
    optimizer.optimize_ir(model)
    _name_dimensions(model.graph, names, capacity)
    forget_inner_shapes(model.graph)
    drop_trace_metadata(model)


def _read_shared_sizes(graph: ir.Graph, *, is_static: bool) -> None:
    """Lets batch size and length be read from input_ids, a capacity from attention_mask.

    torch reads a size from any input that has it, from some layer's cache in a trace of several.
    """
    ids, mask = (v for v in graph.inputs if v.name in ("input_ids", "attention_mask"))
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source not in graph.inputs:
            continue
        start = node.attributes.get_int("start", 0)
        one_size = node.attributes.get_int("end", 0) == start + 1
        if one_size and (start == 0 or source.name == "position_ids"):
            node.replace_input_with(0, ids)
        elif is_static and one_size and start == 2:
            node.replace_input_with(0, mask)
            node.attributes["start"], node.attributes["end"] = (
                ir.AttrInt64("start", 1),
                ir.AttrInt64("end", 2),
            )


def _name_dimensions(graph: ir.Graph, names: _Names, capacity: int | None) -> None:
    """Replaces torch's symbols by the names clients know.

    Args:
        graph: of the trace.
        names: of its inputs and outputs.
        capacity: slots of a static cache, a number here alone: inside, the graph reads it from its
            inputs. None for a cache that grows.
    """
    past: ir.SymbolicDim | int
    total: ir.SymbolicDim | int
    batch, length, past, total = (
        ir.SymbolicDim(name)
        for name in (
            "batch_size",
            "sequence_length",
            "past_sequence_length",
            "total_sequence_length",
        )
    )
    if capacity is not None:
        past = total = capacity
    for value in graph.inputs:
        assert value.shape is not None
        if value.name == "write_indices":
            value.shape = ir.Shape([batch])
        elif value.name in names.past:
            value.shape = _state_shape(value, batch, past)
        else:
            last = total if value.name == "attention_mask" else length
            value.shape = ir.Shape([batch, last])
    for value in graph.outputs:
        assert value.shape is not None
        if value.name in names.present:
            value.shape = _state_shape(value, batch, total)
        elif value.name in names.hidden:
            value.shape = ir.Shape([batch, length, value.shape[2]])
        else:
            rows = length if not isinstance(value.shape[1], int) else value.shape[1]
            value.shape = ir.Shape([batch, rows, value.shape[2]])


def name_parameters(model: ir.Model, prefix: str) -> None:
    """Drops the fake weights, and `prefix` from the names of the parameters they stood for."""
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or value.name is None:
            continue
        if value.name.startswith(prefix):
            value.const_value = None
            value.name = value.name.removeprefix(prefix)


def forget_inner_shapes(graph: ir.Graph) -> None:
    """Leaves the shapes within a graph, in torch's symbols, to inference."""
    boundary = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in boundary:
                value.shape = None
                value.type = None


def _state_shape(value: ir.Value, batch: ir.SymbolicDim, places: ir.SymbolicDim | int) -> ir.Shape:
    """The shape of a layer's state: rows, then numbers, and places where it has them."""
    assert value.shape is not None
    assert value.name is not None
    sizes = [batch, *value.shape[1:]]
    if value.name.rpartition(".")[2] in _GROWING:
        sizes[2] = places
    return ir.Shape(sizes)


def drop_trace_metadata(model: ir.Model) -> None:
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
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of `dtype` where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Iterator[None]:
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
