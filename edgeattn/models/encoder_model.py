"""`EncoderModel`: an encoder's architecture and its weights, as transforms pass it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.attention import OperatorForm
from edgeattn.models.attention_variants import LayerTables
from edgeattn.models.checkpoint import WeightReader
from edgeattn.models.encoder import Encoder, EncoderLayer, Rotary
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.model import CheckpointWeights, ModelWeights, Progress, rounded, set_reads
from edgeattn.models.rotary import inverse_frequencies, rotary_caches
from edgeattn.quant.activation import LinearInput
from edgeattn.shape import Rope


@dataclass(frozen=True)
class EncoderModel:
    """An encoder between two transforms; the counterpart of `edgeattn.models.model.Model`.

    Attributes:
        shape: the architecture.
        weights: its parameters, lazily.
        reads: how linear layers read their inputs, by the name of the weight; most as they are.
        tables: what the attention variants of `shape` read, by layer (`attention_variants`).
    """

    shape: EncoderShape
    weights: ModelWeights
    reads: Mapping[str, LinearInput] = field(default_factory=dict)
    tables: LayerTables = field(default_factory=dict)


def encoder_of(shape: EncoderShape, weights: WeightReader) -> EncoderModel:
    """The encoder as its checkpoint holds it; a NaN or infinite weight is refused when read."""
    return EncoderModel(shape, CheckpointWeights(weights))


def load_encoder(
    model: EncoderModel,
    *,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: OperatorForm = "standard",
    progress: Progress | None = None,
) -> Encoder:
    """Builds the encoder in PyTorch with every weight loaded.

    Args:
        model: where the weights come from.
        weight_dtype: dtype the weights are rounded to first, as the exported graph stores them.
        compute_dtype: dtype of parameters and activations.
        form: spelling of attention.
        progress: called with (parameters loaded, all parameters).
    """
    encoder = _empty(model.shape, form, compute_dtype)
    names = list(encoder_parameters(model.shape))
    for count, name in enumerate(names, start=1):
        _fill(encoder, model, name, weight_dtype)
        if progress:
            progress(count, len(names))
    encoder.reset_rotary(compute_dtype)
    set_reads(encoder, model.reads, "")
    return encoder


def load_encoder_layer(model: EncoderModel, index: int) -> EncoderLayer:
    """One block in fp32 with its weights; see `load_encoder`."""
    prefix = f"layers.{index}."
    with torch.device("meta"):
        layer = EncoderLayer(model.shape, "standard", model.shape.layer_kind(index))
    layer = layer.to_empty(device="cpu").eval().requires_grad_(False)
    parameters = dict(layer.named_parameters())
    for name, parameter in parameters.items():
        full = prefix + name
        parameter.copy_(rounded(full, model.weights.read(full), torch.float32))
    set_reads(layer, model.reads, prefix)
    return layer


@torch.inference_mode()
def embed_inputs(model: EncoderModel, values: Tensor) -> Tensor:
    """The residual stream before layer 0, `[N, L, hidden]` fp32; no block is read.

    Args:
        model: whose tables are read.
        values: token ids `[N, L]` of one segment, or pixels `[N, C, height, width]`.
    """
    encoder = _empty(replace(model.shape, num_layers=1), "standard", torch.float32)
    for name in encoder_parameters(model.shape):
        if not name.startswith("layers."):
            _fill(encoder, model, name, torch.float32)
    types = torch.zeros_like(values) if "token_type_ids" in model.shape.input.names else None
    return encoder.embed(values, types)


def window_rotary(rope: Rope, length: int) -> Rotary:
    """Cosine and sine `[1, 1, L, R/2]` fp32 of the places of a window without padding."""
    places = torch.arange(length).unsqueeze(0)
    return rotary_caches(rope, inverse_frequencies(rope), places, torch.float32)


def _empty(shape: EncoderShape, form: OperatorForm, dtype: torch.dtype) -> Encoder:
    with torch.device("meta"):
        encoder = Encoder(shape, form=form)
    return encoder.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)


def _fill(encoder: Encoder, model: EncoderModel, name: str, dtype: torch.dtype) -> None:
    """Gives a parameter its weight, rounded to `dtype` first."""
    value = rounded(name, model.weights.read(name), dtype)
    encoder.get_parameter(name).copy_(value)
