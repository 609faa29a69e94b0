"""Each layer of a graph on its own: torch on the inputs the graph itself gave that layer.

Where activations or caches are rounded to int8 at run time, a last bit turns into a whole step, and
what that does to a token is amplified from layer to layer. A comparison of whole networks has to
allow as much. Here nothing is carried on: every layer starts from the graph's residual stream and
the graph's cache, so that what differs was made in that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeattn.models.attention import OperatorForm
from edgeattn.models.decoder import DecoderLayer
from edgeattn.models.model import TORCH_DTYPES, Model
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.cases import Case
from edgeattn.verify.compare import Comparison
from edgeattn.verify.drive import Backend
from edgeattn.verify.reference import REFERENCE_DTYPES, TorchLayers
from edgeattn.verify.tolerance import allowed_error, plain_runs, typical_error

# What one layer gives for the tokens of all cases, padding left out: "output" is what it adds to
# the residual stream `[tokens, hidden]`, "key" and "value" are `[tokens, Hkv, D]`.
_Parts = dict[str, NDArray[np.float64]]
_PARTS = ("output", "key", "value")
Measure = Callable[[NDArray[np.floating], NDArray[np.floating]], float]


@dataclass(frozen=True)
class _Recorded:
    """What a graph computed in one case.

    Attributes:
        case: its inputs.
        hidden: per step the residual stream before layer 0 and after each, `[B, T, hidden]`.
        present: keys and values of each layer after the last step, `[B, Hkv, S, D]`; steps append
            to caches, so that they hold those of every step.
    """

    case: Case
    hidden: list[list[NDArray[np.generic]]]
    present: list[tuple[NDArray[np.generic], NDArray[np.generic]]]

    def cache(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` places, `[B, Hkv, length, D]` each."""
        keys, values = (torch.from_numpy(x)[:, :, :length] for x in self.present[layer])
        return keys, values


@torch.inference_mode()
def compare_layers(
    model: Model,
    lowering: Lowering,
    backend: Backend,
    cases: Sequence[Case],
    progress: Callable[[int, int], None] | None = None,
    measure: Measure = typical_error,
) -> list[Comparison]:
    """Runs a graph once, then compares each layer of it with torch.

    Args:
        model: transformed and quantised, as the graph was made from it.
        lowering: what was decided.
        backend: gives the residual stream too, and arrays of numpy.
        cases: inputs; of a backend that packs its cache only those without padding count.
        progress: called with (layers done, all layers).
        measure: of how far tokens are from their reference.

    Returns:
        For each layer what it adds to the stream, its new keys and its new values, named
        "layer.N.output", "layer.N.key" and "layer.N.value".
    """
    shape, rows = model.shape, []
    recorded = [
        _record(backend, case, shape.num_layers)
        for case in cases
        if not (backend.packed_cache and _is_padded(case))
    ]
    layers = TorchLayers(model, lowering)
    for index in range(shape.num_layers):
        rows += _compare_layer(layers, index, recorded, lowering, measure)
        if progress:
            progress(index + 1, shape.num_layers)
    return rows


def _is_padded(case: Case) -> bool:
    return not all(step.attention_mask.all() for step in case.steps)


def _record(backend: Backend, case: Case, num_layers: int) -> _Recorded:
    hidden, output = [], None
    for step in case.steps:
        output = backend.step(step, output)
        hidden.append([_array(output, f"hidden.{i}") for i in range(num_layers + 1)])
    assert output is not None
    present = [
        (_array(output, f"present.{i}.key"), _array(output, f"present.{i}.value"))
        for i in range(num_layers)
    ]
    return _Recorded(case, hidden, present)


def _array(output: Mapping[str, object], name: str) -> NDArray[np.generic]:
    """A copy: a backend may use its memory again."""
    return np.array(output[name])


def _compare_layer(
    layers: TorchLayers,
    index: int,
    recorded: Sequence[_Recorded],
    lowering: Lowering,
    measure: Measure,
) -> list[Comparison]:
    module = layers.load(index)
    found = _of_graph(recorded, index)
    # From wide to narrow, as in `reference`.
    expected = _of_torch(
        layers, module, index, recorded, REFERENCE_DTYPES[lowering.dtype], layers.form
    )
    plain = [
        _of_torch(layers, module, index, recorded, TORCH_DTYPES[run.dtype], run.form or layers.form)
        for run in plain_runs(lowering, lowering.dtype)
    ]
    rows = []
    for part in _PARTS:
        error = measure(found[part], expected[part])
        low = max(measure(run[part], expected[part]) for run in plain)
        quantized = bool(lowering.scheme.weight_bits)
        allowed = allowed_error(lowering.dtype, low, quantized=quantized)
        rows.append(Comparison(f"layer.{index}.{part}", error, low, allowed))
    return rows


def _of_graph(recorded: Sequence[_Recorded], index: int) -> _Parts:
    pieces = []
    for run in recorded:
        for step, hidden in zip(run.case.steps, run.hidden, strict=True):
            before, after = (torch.from_numpy(x) for x in hidden[index : index + 2])
            present = run.cache(index, step.attention_mask.shape[1])
            pieces.append(_parts(before, after, present, step.new_mask))
    return _joined(pieces)


def _of_torch(
    layers: TorchLayers,
    module: DecoderLayer,
    index: int,
    recorded: Sequence[_Recorded],
    dtype: torch.dtype,
    form: OperatorForm,
) -> _Parts:
    """One layer in one precision and spelling, from the graph's own inputs of every step."""
    module.to(dtype)
    module.spell(form)
    pieces = []
    for run in recorded:
        for step, hidden in zip(run.case.steps, run.hidden, strict=True):
            before = torch.from_numpy(hidden[index]).to(dtype)
            length = step.attention_mask.shape[1] - step.input_ids.shape[1]
            keys, values = (_as_held(x, dtype) for x in run.cache(index, length))
            after, present = layers.step(module, index, step, before, (keys, values))
            pieces.append(_parts(before, after, present, step.new_mask))
    return _joined(pieces)


def _as_held(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as torch holds them that computes in `dtype`: integers stay what they are."""
    return cache if cache.dtype == torch.int8 else cache.to(dtype)


def _parts(
    before: Tensor, after: Tensor, present: tuple[Tensor, ...], new: NDArray[np.bool_]
) -> _Parts:
    """What a step gave for the tokens that are no padding.

    Without the stream that passes by the layer: beside it a layer's own error may be small.

    Args:
        before: the stream, `[B, T, hidden]`.
        after: of the same shape.
        present: keys and values `[B, Hkv, P + T, D]`.
        new: `[B, T]`, which of the new tokens are no padding.
    """
    parts = {"output": (after.double() - before.double()).numpy()[new]}
    for name, cache in zip(("key", "value"), present, strict=True):
        places = cache[:, :, -new.shape[1] :].transpose(1, 2)
        parts[name] = places.double().numpy()[new]
    return parts


def _joined(pieces: Sequence[_Parts]) -> _Parts:
    return {part: np.concatenate([piece[part] for piece in pieces]) for part in _PARTS}
