"""Models whose layers but the first have an attention variant, with tables that are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from edgeattn.attention import FftRope, HeadSparse, LayerAttention
from edgeattn.models.model import Model


def with_variant(
    model: Model, attention: LayerAttention, tables: Callable[[int], Mapping[str, Tensor]]
) -> Model:
    """The model, with `attention` in all layers but the first."""
    shape, layers = model.shape, range(model.shape.num_layers)
    cycle = [replace(shape.layer_kind(i), attention=attention if i else None) for i in layers]
    made = {i: tables(i) for i in layers if i}
    return replace(model, shape=replace(shape, layer_cycle=tuple(cycle)), tables=made)


def with_head_sparse(model: Model, slots: int, *, groups: bool = False) -> Model:
    """The model behind random routers."""
    shape = model.shape

    def tables(layer: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(layer)
        return {
            "router_weight": torch.randn(shape.hidden_size, shape.num_heads, generator=generator),
            "router_bias": torch.randn(shape.num_heads, generator=generator),
        }

    return with_variant(model, HeadSparse(slots, groups), tables)


def with_fft_rope(
    model: Model,
    *,
    polynomial_heads: int | None = None,
    sink: int = 1,
    window: int = 2,
    bound: float = 20.0,
) -> Model:
    """The model with a rough polynomial in its first heads, or in all."""
    shape = model.shape
    count = shape.num_heads if polynomial_heads is None else polynomial_heads

    def tables(layer: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(layer)
        size = (shape.num_heads, shape.head_dim)
        return {
            "coefficients": torch.tensor([[1.0, 1.0, 0.55]]).repeat(shape.num_heads, 1),
            "key_mean": 0.1 * torch.randn(size, generator=generator),
            "score_bound": torch.full((shape.num_heads,), bound),
            "backend": (torch.arange(shape.num_heads) < count).int(),
        }

    return with_variant(model, FftRope(2, sink, window), tables)
