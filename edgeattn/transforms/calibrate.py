"""Quantises a model on a text, one layer after the other: GPTQ weights, scales of activations.

Each layer sees what the quantised layers before it give; a scheme that refits also runs the
original network beside it, whose outputs every layer then aims at. A finished layer is written to
a folder at once, so that work that was stopped goes on where it was. Memory is a layer or two, the
residual streams of the calibration windows, and some K x K matrices of the widest layer input.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from edgeattn.calibration.network import Network, Walk, network_of
from edgeattn.calibration.store import HEAD, LayerStore, StoredLinear
from edgeattn.calibration.walk import LayerWalk
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.encoder_model import EncoderModel
from edgeattn.models.families import EMBEDDING, LM_HEAD
from edgeattn.models.linear import linear_of
from edgeattn.models.model import Model, ModelWeights
from edgeattn.models.stream import Head, batches
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.affine import QuantizedTensor, quantize_symmetric
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.scheme import Scheme, WeightFormat
from edgeattn.transforms.kv_cache import measured_cache, stored_cache
from edgeattn.transforms.linear_quantizer import LinearQuantizer

Progress = Callable[[int, int], None]
_Model = TypeVar("_Model", Model, EncoderModel)


@torch.inference_mode()
def quantize_on_text(
    model: _Model,
    scheme: Scheme,
    windows: Tensor,
    store: LayerStore,
    *,
    scale_dtype: torch.dtype,
    kept: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> _Model:
    """The model with linear layers quantised on `windows`; tables round to nearest.

    Args:
        model: rotated or not, in floating point.
        scheme: what to do.
        windows: token ids `[N, L]`, or pixels `[N, C, height, width]`.
        store: finished layers, those of an earlier run among them.
        scale_dtype: dtype of weight scales, the one the graph computes in.
        kept: weights of the layers that stay at the next higher precision.
        progress: called with (layers done, all layers).
    """
    network, count = network_of(model, windows), model.shape.num_layers
    # What the first layer reads in the graph: rows of the quantised table.
    hidden = network.embedded(_StoredWeights(model.weights, scheme, store, scale_dtype))
    exact = network.embedded(model.weights) if scheme.refit else None
    for index in range(count):
        layer = network.layer(index)
        original = None
        if exact is not None:
            original = network.walk(copy.deepcopy(layer), index, exact)
        walk = network.walk(layer, index, hidden)
        if store.has(index):
            _restore(layer, index, scheme, store)
            walk.run()
            if original is not None:
                original.run()
        else:
            prefix = f"layers.{index}."
            here = {name.removeprefix(prefix) for name in kept if name.startswith(prefix)}
            linears = _quantize_layer(network, layer, walk, original, scheme, scale_dtype, here)
            cache = layer.self_attn.cache if isinstance(layer, DecoderLayer) else None
            store.write(index, linears, None if cache is None else cache.scales)
        if progress:
            progress(index + 1, count)
    if isinstance(model, Model) and scheme.small_head and not store.has(HEAD):
        store.write(HEAD, {HEAD: _quantize_head(model, scheme, hidden, exact, scale_dtype)})
    return stored_model(model, scheme, store, scale_dtype=scale_dtype)


def _restore(layer: nn.Module, index: int, scheme: Scheme, store: LayerStore) -> None:
    """Lets a layer compute as an earlier run left it."""
    for name, stored in store.read(index).items():
        _apply(layer, name, stored)
    if isinstance(layer, DecoderLayer):
        head_dim = layer.self_attn.kv_heads[1]
        layer.self_attn.cache = stored_cache(scheme, store, index, head_dim)


def _quantize_head(
    model: Model, scheme: Scheme, hidden: Tensor, exact: Tensor | None, scale_dtype: torch.dtype
) -> StoredLinear:
    head = Head(model)
    quantizer = LinearQuantizer(scheme, model.shape.hidden_size, scale_dtype)
    for rows, wanted in _pairs(batches(hidden), None if exact is None else batches(exact)):
        quantizer.add(head.normed(rows), None if wanted is None else head.normed(wanted))
    return quantizer.quantize(HEAD, head.matrix)


def _quantize_layer(
    network: Network,
    layer: nn.Module,
    walk: Walk,
    original: Walk | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    kept: Set[str],
) -> dict[str, StoredLinear]:
    found = {}
    for number, names in enumerate(network.stages):
        if number == 1 and isinstance(layer, DecoderLayer) and isinstance(walk, LayerWalk):
            layer.self_attn.cache = measured_cache(layer, walk, scheme, scale_dtype)
        first = linear_of(layer, names[0])
        reads, quantizer = first.reads, LinearQuantizer(scheme, first.in_features, scale_dtype)
        exact = None if original is None else original.inputs(number)
        for inputs, wanted in _pairs(walk.inputs(number), exact):
            quantizer.add(reads(inputs), None if wanted is None else reads(wanted))
        for name in names:
            weight, keep = linear_of(layer, name).weight, f"{name}.weight" in kept
            found[name] = quantizer.quantize(name, weight, keep=keep)
            _apply(layer, name, found[name])
    walk.finish()
    if original is not None:
        original.finish()
    return found


def _pairs(
    seen: Iterator[Tensor], exact: Iterator[Tensor] | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs in the quantised network and, where they are wanted, in the original one."""
    return zip(seen, itertools.repeat(None)) if exact is None else zip(seen, exact, strict=True)


def _apply(layer: nn.Module, name: str, stored: StoredLinear) -> None:
    """Lets a layer compute with what was stored."""
    linear = linear_of(layer, name)
    linear.weight.copy_(stored.weight.dequantize())
    linear.reads = replace(linear.reads, scale=stored.input_scale)


def stored_model(
    model: _Model, scheme: Scheme, store: LayerStore, *, scale_dtype: torch.dtype
) -> _Model:
    """The model whose linear layers are read from a complete store."""
    reads: dict[str, LinearInput] = dict(model.reads)
    for index in range(model.shape.num_layers):
        for name, scale in store.input_scales(index).items():
            key = f"layers.{index}.{name}.weight"
            reads[key] = replace(reads.get(key, LinearInput()), scale=scale)
    weights = _StoredWeights(model.weights, scheme, store, scale_dtype)
    found = replace(model, weights=weights, reads=reads)
    if isinstance(found, Model):
        return replace(found, caches=_stored_caches(found, scheme, store))
    return found


def _stored_caches(model: Model, scheme: Scheme, store: LayerStore) -> dict[int, Int8Cache]:
    found = {
        index: stored_cache(scheme, store, index, model.shape.head_dim)
        for index in range(model.shape.num_layers)
    }
    return {index: cache for index, cache in found.items() if cache is not None}


@dataclass(frozen=True)
class _StoredWeights:
    source: ModelWeights
    scheme: Scheme
    store: LayerStore
    scale_dtype: torch.dtype

    def format(self, name: str) -> WeightFormat | None:
        return self.scheme.embedding if self._is_table(name) else self.store.format(name)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if self._is_table(name) and self.scheme.embedding is not None:
            value = self.source.read(name)
            assert isinstance(value, Tensor)
            return quantize_symmetric(
                value, self.scheme.embedding, clip=self.scheme.clip, scale_dtype=self.scale_dtype
            )
        return self.store.weight(name) or self.source.read(name)

    def _is_table(self, name: str) -> bool:
        """Whether a matrix rounds to nearest, whatever the text."""
        return name == EMBEDDING or (name == LM_HEAD and not self.scheme.small_head)
