"""How much the loss rises when one linear layer alone is quantised: which few to leave as they are.

All trials pass through the network side by side: each starts where its layer is, so that every
layer is loaded once and memory holds one layer and a residual stream per trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeattn.calibration.walk import STAGES, LayerWalk
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.linear import Linear, linear_of
from edgeattn.models.model import Model, load_layer
from edgeattn.models.stream import Head, embed_windows, run_layer, window_inputs
from edgeattn.quant.affine import quantize_symmetric
from edgeattn.quant.observer import Observer
from edgeattn.quant.scheme import Scheme

# Windows the loss is measured on; the residual stream of each trial is kept for all of them.
_LOSS_WINDOWS = 1
# Windows that show how large activations become.
_BOUND_WINDOWS = 16


@dataclass(frozen=True)
class Trial:
    """What quantising some linear layers alone costs.

    Attributes:
        linears: weights that were quantised, or whose common input was.
        increase: of the mean next-token loss, in nats.
    """

    linears: tuple[str, ...]
    increase: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@torch.inference_mode()
def measure_sensitivity(
    model: Model,
    scheme: Scheme,
    windows: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """One trial for each linear layer, or for each input where activations are rounded.

    Args:
        model: rotated or not, in floating point.
        scheme: how the trials quantise.
        windows: token ids `[N, L]`.
        progress: called with (layers done, all layers).

    Returns:
        Trials, the most harmful first.
    """
    shape = model.shape
    loss_windows, shared = windows[-_LOSS_WINDOWS:], window_inputs(shape, windows.shape[1])
    rounds_inputs = scheme.activation_bits is not None
    hidden = embed_windows(model, windows[:_BOUND_WINDOWS]) if rounds_inputs else None
    plain = embed_windows(model, loss_windows)
    names: list[tuple[str, ...]] = []
    trials: list[Tensor] = []
    for index in range(shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = shared[shape.layer_kind(index)]
        scales: list[float | None] = [None] * len(STAGES)
        if hidden is not None:
            scales = _input_scales(layer, LayerWalk(layer, hidden, kind, shape), scheme)
        for stream in trials:
            run_layer(layer, stream, kind)
        for linears, tried in _trials(layer, plain, scheme, scales, kind):
            names.append(tuple(f"layers.{index}.{name}.weight" for name in linears))
            trials.append(tried)
        run_layer(layer, plain, kind)
        if progress:
            progress(index + 1, shape.num_layers)
    head = Head(model)
    base = float(head.losses(plain, loss_windows).mean())
    losses = [float(head.losses(stream, loss_windows).mean()) for stream in trials]
    found = [Trial(n, loss - base) for n, loss in zip(names, losses, strict=True)]
    return sorted(found, key=lambda trial: -trial.increase)


def choose_kept(trials: Sequence[Trial], scheme: Scheme, linears: int) -> frozenset[str]:
    """The weights of the most harmful trials, at most the scheme's share of all `linears`.

    A trial that does not raise the loss is never kept, nor one that would stay as it is.
    """
    left, kept = int(scheme.keep * linears), set[str]()
    for trial in trials:
        if trial.increase > 0 and len(trial.linears) <= left and _can_be_kept(trial, scheme):
            kept.update(trial.linears)
            left -= len(trial.linears)
    return frozenset(kept)


def _can_be_kept(trial: Trial, scheme: Scheme) -> bool:
    """Whether there is a higher precision: 16-bit inputs, or int8 weights for int4."""
    if scheme.activation_bits is not None:
        return True
    formats = [scheme.format_of(name) for name in trial.linears]
    return any(format is not None and format.bits == 4 for format in formats)


def _input_scales(layer: DecoderLayer, walk: LayerWalk, scheme: Scheme) -> list[float | None]:
    """The int8 scale of each stage's input; the walk passes through the layer."""
    found: list[float | None] = []
    for number, names in enumerate(STAGES):
        reads, observer = linear_of(layer, names[0]).reads, Observer()
        for inputs in walk.inputs(number):
            observer.add(reads(inputs))
        found.append(observer.scale(scheme.range))
    walk.finish()
    return found


def _trials(
    layer: DecoderLayer,
    plain: Tensor,
    scheme: Scheme,
    scales: Sequence[float | None],
    shared: LayerInputs,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The stream behind the layer for each way of quantising a part of it."""
    for number, names in enumerate(STAGES):
        units = [names] if scheme.activation_bits is not None else [(name,) for name in names]
        for unit in units:
            stream = plain.clone()
            linears = {name: linear_of(layer, name) for name in unit}
            with _quantized(linears, scheme, scales[number]):
                run_layer(layer, stream, shared)
            yield unit, stream


@contextmanager
def _quantized(
    linears: Mapping[str, Linear], scheme: Scheme, scale: float | None
) -> Iterator[None]:
    """Linear layers as the scheme would have them, for a while."""
    before = [(linear.weight.data, linear.reads) for linear in linears.values()]
    for name, linear in linears.items():
        format = scheme.format_of(name)
        linear.reads = replace(linear.reads, scale=scale)
        if format is not None:
            quantized = quantize_symmetric(linear.weight.data, format, clip=scheme.clip)
            linear.weight.data = quantized.dequantize()
    try:
        yield
    finally:
        for linear, (weight, reads) in zip(linears.values(), before, strict=True):
            linear.weight.data, linear.reads = weight, reads
