"""Quantises a model on a text, one layer after the other: GPTQ weights, scales of activations.

Each layer sees what the quantised layers before it give. A finished layer is written to a folder
at once, so that work that was stopped goes on where it was, and memory stays about one layer plus
the residual stream of the calibration windows.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeattn.calibration.store import HEAD, LayerStore, StoredLinear
from edgeattn.calibration.walk import STAGES, LayerWalk
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.families import EMBEDDING, LM_HEAD
from edgeattn.models.linear import linear_of
from edgeattn.models.model import Model, ModelWeights, load_layer
from edgeattn.models.stream import Head, batches, embed_windows, run_layer, window_inputs
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.affine import QuantizedTensor, quantize_symmetric
from edgeattn.quant.gptq import Hessian, gptq
from edgeattn.quant.hadamard import HadamardFactors, hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.observer import Clip, Observer
from edgeattn.quant.scheme import INT8_PER_CHANNEL, Scheme, WeightFormat

Progress = Callable[[int, int], None]

# Of int8 caches: SmolLM2's perplexity of 28.340 becomes 28.377 so with R3, and
# 28.391 without; where nothing is clipped 28.419 and 28.477.
_CACHE_RANGE: Clip = "mse"


@torch.inference_mode()
def quantize_on_text(
    model: Model,
    scheme: Scheme,
    windows: Tensor,
    store: LayerStore,
    *,
    scale_dtype: torch.dtype,
    kept: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> Model:
    """The model with linear layers quantised on `windows`; tables round to nearest.

    Args:
        model: rotated or not, in floating point.
        scheme: what to do.
        windows: token ids `[N, L]`.
        store: finished layers, those of an earlier run among them.
        scale_dtype: dtype of weight scales, the one the graph computes in.
        kept: weights of the layers that stay at the next higher precision.
        progress: called with (layers done, all layers).
    """
    shape = model.shape
    # What the first layer reads in the graph: rows of the quantised table.
    tables = _StoredWeights(model.weights, scheme, store, scale_dtype)
    hidden = embed_windows(replace(model, weights=tables), windows)
    shared = window_inputs(shape, windows.shape[1])
    for index in range(shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = shared[shape.layer_kind(index)]
        if store.has(index):
            for name, stored in store.read(index).items():
                _apply(layer, name, stored)
            layer.self_attn.cache = _stored_cache(scheme, store, index, shape.head_dim)
            run_layer(layer, hidden, kind)
        else:
            walk = LayerWalk(layer, hidden, kind, shape)
            prefix = f"layers.{index}."
            here = {name.removeprefix(prefix) for name in kept if name.startswith(prefix)}
            linears = _quantize_layer(layer, walk, scheme, scale_dtype, here)
            cache = layer.self_attn.cache
            store.write(index, linears, None if cache is None else cache.scales)
        if progress:
            progress(index + 1, shape.num_layers)
    if scheme.small_head and not store.has(HEAD):
        store.write(HEAD, {HEAD: _quantize_head(model, scheme, hidden, scale_dtype)})
    return stored_model(model, scheme, store, scale_dtype=scale_dtype)


def _quantize_head(
    model: Model, scheme: Scheme, hidden: Tensor, scale_dtype: torch.dtype
) -> StoredLinear:
    head = Head(model)
    statistics = _Statistics(scheme, model.shape.hidden_size)
    for rows in batches(hidden):
        statistics.add(head.normed(rows))
    return StoredLinear(statistics.quantize(HEAD, head.matrix, scale_dtype, keep=False))


def _quantize_layer(
    layer: DecoderLayer,
    walk: LayerWalk,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    kept: Set[str],
) -> dict[str, StoredLinear]:
    found = {}
    for number, names in enumerate(STAGES):
        if number == 1 and scheme.kv_bits is not None:
            layer.self_attn.cache = _measured_cache(layer, walk, scheme, scale_dtype)
        reads = linear_of(layer, names[0]).reads
        statistics = _Statistics(scheme, linear_of(layer, names[0]).in_features)
        for inputs in walk.inputs(number):
            statistics.add(reads(inputs))
        for name in names:
            keep = f"{name}.weight" in kept
            weight = statistics.quantize(name, linear_of(layer, name).weight, scale_dtype, keep)
            scale = None if keep else statistics.input_scale(scale_dtype)
            found[name] = StoredLinear(weight, scale)
            _apply(layer, name, found[name])
    walk.finish()
    return found


class _Statistics:
    """What the inputs of one stage are like."""

    def __init__(self, scheme: Scheme, width: int) -> None:
        self._scheme = scheme
        self._hessian = Hessian(width) if scheme.method == "gptq" else None
        self._observer = Observer()

    def add(self, inputs: Tensor) -> None:
        if self._hessian is not None:
            self._hessian.add(inputs)
        if self._scheme.activation_bits is not None:
            self._observer.add(inputs)

    def quantize(
        self, name: str, weight: Tensor, scale_dtype: torch.dtype, keep: bool
    ) -> QuantizedTensor:
        scheme = self._scheme
        format = INT8_PER_CHANNEL if keep else scheme.format_of(name)
        assert format is not None
        if self._hessian is None or format.bits == 8:
            return quantize_symmetric(weight, format, clip=scheme.clip, scale_dtype=scale_dtype)
        return gptq(
            weight,
            self._hessian.matrix,
            format,
            clip=scheme.clip,
            scale_dtype=scale_dtype,
            act_order=scheme.act_order,
        )

    def input_scale(self, scale_dtype: torch.dtype) -> float | None:
        """The scale of the inputs, as the graph will store it."""
        if self._scheme.activation_bits is None:
            return None
        return self._observer.scale(self._scheme.range, scale_dtype)


def _measured_cache(
    layer: DecoderLayer, walk: LayerWalk, scheme: Scheme, scale_dtype: torch.dtype
) -> Int8Cache:
    """The format of a cache whose keys and values are those of the calibration text."""
    rotation = _key_rotation(scheme, layer.self_attn.kv_heads[1])
    keys, values, unscaled = Observer(), Observer(), Int8Cache(1.0, 1.0, rotation)
    for _, k, v in walk.heads():
        keys.add(unscaled.rotate(k))
        values.add(v)
    key_scale, value_scale = (o.scale(_CACHE_RANGE, scale_dtype) for o in (keys, values))
    return Int8Cache(key_scale, value_scale, rotation)


def _stored_cache(scheme: Scheme, store: LayerStore, index: int, head_dim: int) -> Int8Cache | None:
    scales = store.cache_scales(index)
    return None if scales is None else Int8Cache(*scales, _key_rotation(scheme, head_dim))


def _key_rotation(scheme: Scheme, head_dim: int) -> HadamardFactors | None:
    """R3, for the schemes that rotate."""
    return None if scheme.rotation == "none" else hadamard_factors(head_dim)


def _apply(layer: DecoderLayer, name: str, stored: StoredLinear) -> None:
    """Lets a layer compute with what was stored."""
    linear = linear_of(layer, name)
    linear.weight.copy_(stored.weight.dequantize())
    linear.reads = replace(linear.reads, scale=stored.input_scale)


def stored_model(
    model: Model, scheme: Scheme, store: LayerStore, *, scale_dtype: torch.dtype
) -> Model:
    """The model whose linear layers are read from a complete store."""
    reads: dict[str, LinearInput] = dict(model.reads)
    caches: dict[int, Int8Cache] = {}
    for index in range(model.shape.num_layers):
        cache = _stored_cache(scheme, store, index, model.shape.head_dim)
        if cache is not None:
            caches[index] = cache
        for name, scale in store.input_scales(index).items():
            key = f"layers.{index}.{name}.weight"
            reads[key] = replace(reads.get(key, LinearInput()), scale=scale)
    weights = _StoredWeights(model.weights, scheme, store, scale_dtype)
    return replace(model, weights=weights, reads=reads, caches=caches)


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
