"""Weight quantisation of a model, one parameter at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from edgeattn.models.encoder_model import EncoderModel
from edgeattn.models.families import EMBEDDING, LM_HEAD
from edgeattn.models.model import Model, ModelWeights
from edgeattn.quant.affine import QuantizedTensor, quantize_symmetric
from edgeattn.quant.scheme import Scheme, WeightFormat

_Model = TypeVar("_Model", Model, EncoderModel)


def quantize(model: _Model, scheme: Scheme, *, scale_dtype: torch.dtype) -> _Model:
    """The model with its linear layers, embedding and head in the formats of `scheme`.

    Args:
        model: with floating-point weights.
        scheme: which formats; "none" returns the model unchanged.
        scale_dtype: dtype of the scales, the one the graph computes in.
    """
    if scheme.linear is None and scheme.embedding is None:
        return model
    return replace(model, weights=_QuantizedWeights(model.weights, scheme, scale_dtype))


@dataclass(frozen=True)
class _QuantizedWeights:
    source: ModelWeights
    scheme: Scheme
    scale_dtype: torch.dtype

    def format(self, name: str) -> WeightFormat | None:
        if name == LM_HEAD:
            return self.scheme.head
        if name == EMBEDDING:
            return self.scheme.embedding
        return self.scheme.format_of(name) if name.endswith("_proj.weight") else None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value, format = self.source.read(name), self.format(name)
        if format is None:
            return value
        assert isinstance(value, Tensor)
        return quantize_symmetric(
            value, format, clip=self.scheme.clip, scale_dtype=self.scale_dtype
        )
