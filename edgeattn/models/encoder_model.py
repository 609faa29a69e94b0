"""`EncoderModel`: an encoder's architecture and its weights, as transforms pass it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.attention import OperatorForm
from edgeattn.models.attention_variants import LayerTables
from edgeattn.models.checkpoint import WeightReader
from edgeattn.models.encoder import Encoder
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.model import CheckpointWeights, ModelWeights, Progress, rounded, set_reads
from edgeattn.quant.activation import LinearInput


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
    with torch.device("meta"):
        encoder = Encoder(model.shape, form=form)
    encoder = encoder.to(compute_dtype).to_empty(device="cpu").eval().requires_grad_(False)
    parameters = dict(encoder.named_parameters())
    names = encoder_parameters(model.shape)
    for count, name in enumerate(names, start=1):
        parameters[name].copy_(rounded(name, model.weights.read(name), weight_dtype))
        if progress:
            progress(count, len(names))
    encoder.reset_rotary(compute_dtype)
    set_reads(encoder, model.reads, "")
    return encoder
