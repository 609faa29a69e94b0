"""Model -> graph on disk: trace, stamp, stream the weights, write, check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgeattn.exporters.check import check_graph
from edgeattn.exporters.functions import attach_functions
from edgeattn.exporters.inserter import Inserter
from edgeattn.exporters.kv_cache import insert_int8_caches
from edgeattn.exporters.passes import fuse_residual_norms
from edgeattn.exporters.reads import insert_reads
from edgeattn.exporters.stamp import stamp
from edgeattn.exporters.trace import trace_decoder
from edgeattn.exporters.trace_encoder import trace_encoder
from edgeattn.exporters.weights import IR_DTYPES, WeightBinder, write_weights
from edgeattn.models.encoder_model import EncoderModel
from edgeattn.models.model import Model, Progress
from edgeattn.planner.lowering import Lowering


@dataclass(frozen=True)
class GraphReport:
    """What was written.

    Attributes:
        nodes: of the graph.
        weight_bytes: size of the external data.
        weight_sha256: its hash.
    """

    nodes: int
    weight_bytes: int
    weight_sha256: str


def export_graph(
    model: Model | EncoderModel,
    lowering: Lowering,
    model_file: Path,
    weights_file: Path,
    *,
    progress: Progress | None = None,
) -> GraphReport:
    """Writes the ONNX graph of `model` and its external weights.

    Args:
        model: transformed and quantised.
        lowering: which graph.
        model_file: where the graph goes.
        weights_file: beside it, where the weights go.
        progress: called with (parameters written, all parameters).
    """
    binder = WeightBinder(model, lowering)
    if isinstance(model, EncoderModel):
        graph = stamp(trace_encoder(model.shape, lowering), binder)
    else:
        graph = stamp(trace_decoder(model.shape, lowering), binder)
    attach_functions(graph)
    inserter = Inserter(graph, IR_DTYPES[lowering.dtype])
    if not isinstance(model, EncoderModel):
        insert_int8_caches(graph, model.caches, inserter)
    insert_reads(graph, model.reads, inserter)
    if lowering.attention == "group-query":
        fuse_residual_norms(graph)
    size, sha256 = write_weights(binder, weights_file, progress=progress)
    ir.save(graph, model_file)
    check_graph(model_file)
    return GraphReport(len(list(graph.graph)), size, sha256)
