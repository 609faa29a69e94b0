"""`Model`: an architecture and its weights, read on demand, as transforms pass it on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.attention import OperatorForm
from edgeattn.models.attention_variants import LayerTables
from edgeattn.models.checkpoint import Checkpoint, WeightReader, check_finite
from edgeattn.models.decoder import Decoder, DecoderLayer
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.families import parameter_names
from edgeattn.models.linear import Linear
from edgeattn.quant.activation import AS_IT_IS, LinearInput
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.scheme import WeightFormat
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.models.encoder_checkpoint import EncoderCheckpoint

Progress = Callable[[int, int], None]

# The names of a recipe's dtypes in torch.
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ModelWeights(Protocol):
    """Parameters of a model after the transforms so far, each computed when it is read."""

    def format(self, name: str) -> WeightFormat | None:
        """How `name` is quantised, known without reading it; None is floating point."""
        ...

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """The parameter, floating point or quantised as `format` says."""
        ...


@dataclass(frozen=True)
class Model:
    """A model between two transforms.

    Attributes:
        shape: the architecture.
        weights: its parameters, lazily.
        reads: how linear layers read their inputs, by the name of the weight; most as they are.
        caches: formats of int8 caches by layer; the others hold keys and values as computed.
        tables: what the attention variants of `shape` read, by layer (`attention_variants`).
        basis: R1 `[d, d]` where the residual stream is the checkpoint's times it, else None.
    """

    shape: ModelShape
    weights: ModelWeights
    reads: Mapping[str, LinearInput] = field(default_factory=dict)
    caches: Mapping[int, Int8Cache] = field(default_factory=dict)
    tables: LayerTables = field(default_factory=dict)
    basis: Tensor | None = None


@dataclass(frozen=True)
class CheckpointWeights:
    """Parameters as a checkpoint holds them; a NaN or infinite weight is refused when read.

    Attributes:
        reader: of the checkpoint.
    """

    reader: WeightReader

    def format(self, name: str) -> WeightFormat | None:
        """None: nothing is quantised."""
        return None

    def read(self, name: str) -> Tensor:
        """The parameter in the dtype it is stored in."""
        tensor = self.reader.read(name)
        check_finite(name, tensor)
        return tensor


def model_of(checkpoint: Checkpoint) -> Model:
    """The model as the checkpoint holds it; a NaN or infinite weight is refused when read."""
    return Model(checkpoint.shape, CheckpointWeights(checkpoint.weights))


def checkpoint_digest(checkpoint: Checkpoint | EncoderCheckpoint) -> str:
    """SHA-256 that tells a checkpoint from others of the same architecture.

    Its fingerprint is over config and headers, which fine-tuned models share, and what is measured
    on one of them would fit the shape of the others; the first row of every parameter is added.
    """
    digest = hashlib.sha256(str(checkpoint.identity["fingerprint"]).encode())
    weights, shape = CheckpointWeights(checkpoint.weights), checkpoint.shape
    of_kind = encoder_parameters if isinstance(shape, EncoderShape) else parameter_names
    for name in of_kind(shape):  # type: ignore[arg-type]
        weight = weights.read(name)
        row = weight[0] if weight.dim() > 1 else weight
        digest.update(row.float().numpy().tobytes())
    return digest.hexdigest()


def rounded(name: str, value: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """A parameter as a graph in `dtype` sees it: dequantised, rounded to `dtype`.

    Raises:
        CheckpointError: a weight overflows the dtype.
    """
    if isinstance(value, QuantizedTensor):
        return value.dequantize().to(dtype)
    cast = value.to(dtype)
    check_finite(name, cast)
    return cast


def load_decoder(
    model: Model,
    *,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: OperatorForm = "standard",
    last_logits_only: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """Builds the decoder in PyTorch with every weight loaded.

    Args:
        model: where the weights come from.
        weight_dtype: dtype the weights are rounded to first, as the exported graph stores them.
        compute_dtype: dtype of parameters and activations.
        form: spelling of attention.
        last_logits_only: see `Decoder`.
        progress: called with (parameters loaded, all parameters).
    """
    with torch.device("meta"):
        decoder = Decoder(model.shape, form=form, last_logits_only=last_logits_only)
    decoder = decoder.to(compute_dtype).to_empty(device="cpu").eval().requires_grad_(False)
    parameters = dict(decoder.named_parameters())
    names = parameter_names(model.shape)
    for count, name in enumerate(names, start=1):
        value = rounded(name, model.weights.read(name), weight_dtype)
        parameters[name].copy_(value)
        if progress:
            progress(count, len(names))
    decoder.reset_rotary()
    set_reads(decoder, model.reads, "")
    for index, block in enumerate(decoder.blocks()):
        _set_attention(block, model, index)
    return decoder


def load_layer(
    model: Model, index: int, *, weight_dtype: torch.dtype, form: OperatorForm = "standard"
) -> DecoderLayer:
    """Builds one block in PyTorch with its weights, in `weight_dtype`; see `load_decoder`."""
    with torch.device("meta"):
        layer = DecoderLayer(model.shape, form, model.shape.layer_kind(index))
    layer = layer.to(weight_dtype).to_empty(device="cpu").eval().requires_grad_(False)
    prefix = f"layers.{index}."
    parameters = dict(layer.named_parameters())
    for name in parameter_names(model.shape):
        if name.startswith(prefix):
            value = rounded(name, model.weights.read(name), weight_dtype)
            parameters[name.removeprefix(prefix)].copy_(value)
    set_reads(layer, model.reads, prefix)
    _set_attention(layer, model, index)
    return layer


def _set_attention(layer: DecoderLayer, model: Model, index: int) -> None:
    if layer.is_recurrent:
        return
    layer.self_attn.cache = model.caches.get(index)
    if layer.self_attn.tables is not None:
        layer.self_attn.tables.fill(model.tables[index])


def set_reads(module: nn.Module, reads: Mapping[str, LinearInput], prefix: str) -> None:
    """Lets the linear layers of a module read their inputs as `reads` says.

    Args:
        module: the whole network or a block.
        reads: by the name of the weight.
        prefix: of the module's names, "" or "layers.3.".
    """
    for name, part in module.named_modules():
        if isinstance(part, Linear):
            part.reads = reads.get(f"{prefix}{name}.weight", AS_IT_IS)
