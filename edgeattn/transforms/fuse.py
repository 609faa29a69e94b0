"""Stacks projections of the same input to one matrix: q, k and v, and gate and up.

It changes no number. A decode step on a CPU is as much dispatching as multiplying, and ONNX
Runtime's GroupQueryAttention takes stacked q, k and v as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeattn.models.model import Model, ModelWeights
from edgeattn.quant.activation import AS_IT_IS
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat

# Name of the stacked projection -> names of its parts, in order.
FUSED = {
    "self_attn.qkv_proj": tuple(f"self_attn.{part}_proj" for part in "qkv"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def fuse_projections(model: Model) -> Model:
    """The model with stacked projections; as it is where parts are stored in different formats."""
    if not _alike(model):
        return model
    reads = {}
    for name, read in model.reads.items():
        for fused, (first, *_) in FUSED.items():
            name = name.replace(first, fused)
        reads[name] = read
    shape = replace(model.shape, fused=True)
    return replace(model, shape=shape, weights=_FusedWeights(model.weights), reads=reads)


def _alike(model: Model) -> bool:
    """Whether the parts of each stack are stored alike and read their input alike."""
    for layer in range(model.shape.num_layers):
        for parts in FUSED.values():
            names = [f"layers.{layer}.{part}.weight" for part in parts]
            formats = {model.weights.format(name) for name in names}
            scales = {model.reads.get(name, AS_IT_IS).scale for name in names}
            if len(formats) > 1 or len(scales) > 1:
                return False
    return True


@dataclass(frozen=True)
class _FusedWeights:
    source: ModelWeights

    def format(self, name: str) -> WeightFormat | None:
        return self.source.format(self._parts(name)[0])

    def read(self, name: str) -> Tensor | QuantizedTensor:
        parts = [self.source.read(part) for part in self._parts(name)]
        if len(parts) == 1:
            return parts[0]
        quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
        if quantized:
            qdata = torch.cat([part.qdata for part in quantized])
            scale = torch.cat([part.scale for part in quantized])
            return QuantizedTensor(qdata, scale, quantized[0].format)
        return torch.cat([part for part in parts if isinstance(part, Tensor)])

    def _parts(self, name: str) -> list[str]:
        for fused, parts in FUSED.items():
            if fused in name:
                return [name.replace(fused, part) for part in parts]
        return [name]
