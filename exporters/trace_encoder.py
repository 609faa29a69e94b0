"""Traces the encoder once, with one layer per kind, to an ONNX graph without weights.

As `exporters.trace` does it for the decoder: under fake tensors, the values between blocks made
outputs, so that `exporters.stamp` can cut the graph.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from edgeattn.encoder_shape import EncoderShape, PatchInput
from edgeattn.exporters.trace import (
    Trace,
    default_dtype,
    drop_trace_metadata,
    forget_inner_shapes,
    name_parameters,
    quiet,
    to_onnx,
    traced_kinds,
)
from edgeattn.models.encoder import Encoder
from edgeattn.models.model import TORCH_DTYPES
from edgeattn.planner.lowering import Lowering

# Sizes that no dimension of a model is likely to equal, so that a trace that bakes one in shows.
_BATCH, _LENGTH = 2, 5
_ROWS, _PLACES = ir.SymbolicDim("batch_size"), ir.SymbolicDim("sequence_length")


class _Traced(nn.Module):
    """The encoder with its outputs in a flat order that ONNX can name."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output = self.encoder(values, attention_mask, token_type_ids)
        return (output.output, *output.hidden)


def trace_encoder(shape: EncoderShape, lowering: Lowering, *, whole: bool = False) -> Trace:
    """Traces one block per kind of layer between embedding and head.

    Args:
        shape: the architecture.
        lowering: opset, dtype and spelling of attention.
        whole: trace every layer instead.
    """
    kinds = traced_kinds(shape, whole=whole)
    hidden = tuple(f"hidden.{i}" for i in range(len(kinds) + 1))
    dtype = TORCH_DTYPES[lowering.dtype]
    with FakeTensorMode(), default_dtype(dtype), quiet():
        traced = replace(shape, num_layers=len(kinds), layer_cycle=kinds)
        encoder = Encoder(traced, form=lowering.attention).eval()
        model = to_onnx(
            _Traced(encoder),
            _example_inputs(shape, dtype),
            input_names=list(shape.input.names),
            output_names=[shape.output, *hidden],
            dynamic_shapes=_dynamic_shapes(shape),
            opset=lowering.opset,
            has_own_ops=shape.has_variants,
        )
        name_parameters(model, "encoder.")
        optimizer.optimize_ir(model)
    _separate_output(model.graph, shape.output)
    _name_dimensions(model.graph, shape)
    forget_inner_shapes(model.graph)
    drop_trace_metadata(model)
    return Trace(model, hidden, kinds, (shape.output,))


def _example_inputs(shape: EncoderShape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    read = shape.input
    if isinstance(read, PatchInput):
        return (torch.zeros(_BATCH, read.channels, read.height, read.width, dtype=dtype),)
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
    return (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(read.names)]


def _dynamic_shapes(shape: EncoderShape) -> tuple[dict[int, object], ...]:
    if isinstance(shape.input, PatchInput):
        return ({0: Dim.DYNAMIC},)
    return ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * len(shape.input.names)


def _separate_output(graph: ir.Graph, output: str) -> None:
    """Gives the output a name of its own where it is the residual stream behind the last layer.

    There torch's exporter makes the stream the first output and an Identity of it the last one.
    """
    first, last = graph.outputs[0], graph.outputs[-1]
    node = last.producer()
    if node is not None and node.op_type == "Identity" and node.inputs[0] is first:
        graph.outputs[0], graph.outputs[-1] = last, first
        last.name = output


def _name_dimensions(graph: ir.Graph, shape: EncoderShape) -> None:
    """Replaces torch's symbols by the names clients know; an image has a fixed length."""
    is_image = isinstance(shape.input, PatchInput)
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        sizes = list(value.shape)
        by_token = value in graph.inputs or len(sizes) == 3  # else one vector per row
        places = [] if is_image or not by_token else [_PLACES]
        value.shape = ir.Shape([_ROWS, *places, *sizes[1 + len(places) :]])
