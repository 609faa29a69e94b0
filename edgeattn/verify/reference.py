"""The torch model of a recipe run layer by layer: the reference, and plain low precision.

The inputs of every step are known beforehand (decoding is teacher-forced), so a layer can run all
steps of all cases before the next one is loaded. Memory is about one layer, whatever the depth, and
each weight is read, transformed and dequantised once for all runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeattn.models.attention import OperatorForm, RMSNorm
from edgeattn.models.decoder import DecoderLayer, embed, soften
from edgeattn.models.families import EMBEDDING, FINAL_NORM, LM_HEAD
from edgeattn.models.layer_inputs import layer_inputs
from edgeattn.models.model import TORCH_DTYPES, Model, load_layer, rounded
from edgeattn.models.rotary import inverse_frequencies
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.drive import Tensors, of_tokens, places_of
from edgeattn.verify.tolerance import Plain

# What the reference computes in: one step above the bundle's dtype.
REFERENCE_DTYPES = {"fp32": torch.float64, "fp16": torch.float32, "bf16": torch.float32}
# Rows of the LM head multiplied at once, so that a wide vocabulary is never held in fp64.
_HEAD_ROWS = 16384


@dataclass
class _Run:
    """One precision on its way through the network.

    Attributes:
        dtype: of activations and weights.
        form: spelling of attention.
        hidden: residual stream per case and step, `[B, T, hidden]`.
        found: what was recorded so far, named as in `drive`.
    """

    dtype: torch.dtype
    form: OperatorForm
    hidden: list[list[Tensor]]
    found: Tensors


@torch.inference_mode()
def run_reference(
    model: Model,
    lowering: Lowering,
    cases: Sequence[Case],
    plain: Sequence[Plain],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensors, list[Tensors]]:
    """Runs `model` through `cases`.

    Args:
        model: transformed and quantised.
        lowering: dtype, spelling of attention, choice of logits.
        cases: inputs.
        plain: further runs beside the reference.
        progress: called with (layers done, all layers).

    Returns:
        The reference and the plain runs, all as `drive` names them. Weights are rounded to the
        bundle's dtype first, then to the run's own where that is narrower.
    """
    walk = _Walk(model, lowering, cases)
    runs = [walk.embed(REFERENCE_DTYPES[lowering.dtype], walk.form)]
    runs += [walk.embed(TORCH_DTYPES[run.dtype], run.form or walk.form) for run in plain]
    for layer in range(model.shape.num_layers):
        walk.layer(layer, runs)
        if progress:
            progress(layer + 1, model.shape.num_layers)
    walk.head(runs)
    return runs[0].found, [run.found for run in runs[1:]]


@torch.inference_mode()
def run_head(
    model: Model, lowering: Lowering, cases: Sequence[Case], found: Tensors, dtype: torch.dtype
) -> Tensors:
    """The logits that torch makes of a residual stream, named as in `drive`.

    Args:
        model: transformed and quantised.
        lowering: dtype of the stored weights.
        cases: inputs.
        found: of an implementation that gives the stream; padding left out.
        dtype: to compute in.
    """
    walk = _Walk(model, lowering, cases)
    run = _Run(
        dtype,
        walk.form,
        [[walk.placed(case, i, found, dtype) for i in range(len(case.steps))] for case in cases],
        {},
    )
    walk.head([run])
    return run.found


class TorchLayers:
    """The layers of a model as a bundle stores them, one at a time, run in any precision.

    Args:
        model: transformed and quantised.
        lowering: dtype of the stored weights, spelling of attention.

    Attributes:
        form: spelling of attention; what has no meaning in torch becomes the standard form.
    """

    def __init__(self, model: Model, lowering: Lowering) -> None:
        self.model = model
        self.weight_dtype = TORCH_DTYPES[lowering.dtype]
        group_query = lowering.attention == "group-query"
        self.form: OperatorForm = "standard" if group_query else lowering.attention
        self._inv_freq = [inverse_frequencies(rope) for rope in model.shape.ropes]

    def load(self, index: int) -> DecoderLayer:
        """Layer `index` in the dtype of the stored weights."""
        return load_layer(self.model, index, weight_dtype=self.weight_dtype, form=self.form)

    def step(
        self,
        module: DecoderLayer,
        index: int,
        inputs: StepInputs,
        hidden: Tensor,
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of one layer.

        Args:
            module: from `load`, in the dtype of `hidden`.
            index: of the layer.
            inputs: mask and positions.
            hidden: `[B, T, hidden]`.
            past: keys and values, each `[B, Hkv, P, D]`, or the layer's states.

        Returns:
            The stream behind the layer and what `past` has become.
        """
        shared = layer_inputs(
            self.model.shape,
            self._inv_freq,
            torch.from_numpy(inputs.attention_mask),
            torch.from_numpy(inputs.position_ids),
            dtype=hidden.dtype,
        )
        found: tuple[Tensor, tuple[Tensor, ...]]
        found = module(hidden, shared[self.model.shape.layer_kind(index)], past)
        return found


class _Walk:
    def __init__(self, model: Model, lowering: Lowering, cases: Sequence[Case]) -> None:
        self.model = model
        self.shape = model.shape
        self.lowering = lowering
        self.cases = cases
        self.layers = TorchLayers(model, lowering)
        self.weight_dtype, self.form = self.layers.weight_dtype, self.layers.form

    def embed(self, dtype: torch.dtype, form: OperatorForm) -> _Run:
        table = self._weight(EMBEDDING)
        hidden = [
            [
                embed(table[torch.from_numpy(step.input_ids)].to(dtype), self.shape)
                for step in case.steps
            ]
            for case in self.cases
        ]
        run = _Run(dtype, form, hidden, {})
        self._record_hidden(run, 0)
        return run

    def layer(self, index: int, runs: Sequence[_Run]) -> None:
        module = self.layers.load(index)
        # From wide to narrow: what is rounded for a later run the earlier ones have had.
        for run in runs:
            module.to(run.dtype)
            module.spell(run.form)
            for case, hidden in zip(self.cases, run.hidden, strict=True):
                self._run_case(module, index, case, hidden, run)
            self._record_hidden(run, index + 1)

    def _run_case(
        self, module: DecoderLayer, index: int, case: Case, hidden: list[Tensor], run: _Run
    ) -> None:
        past = module.mixer.no_past(len(hidden[0]), run.dtype)
        for i, step in enumerate(case.steps):
            hidden[i], past = self.layers.step(module, index, step, hidden[i], past)
        valid = places_of(case, packed=self.shape.has_variants)
        for part, tensor in zip(self.shape.layer_kind(index).states, past, strict=True):
            name = f"{case.name}.present.{index}.{part}"
            run.found[name] = of_tokens(name, _numpy(tensor), valid)

    def head(self, runs: Sequence[_Run]) -> None:
        norm = RMSNorm(self.shape.hidden_size, self.shape.norm_eps).to(self.weight_dtype)
        norm.weight.copy_(self._weight(FINAL_NORM))
        matrix = self._weight(EMBEDDING if self.shape.tied_embeddings else LM_HEAD)
        for run in runs:
            norm.to(run.dtype)
            rows = {
                f"{case.name}.{i}.logits": _last_or_all(hidden[i], step, self.lowering.logits)
                for case, hidden in zip(self.cases, run.hidden, strict=True)
                for i, step in enumerate(case.steps)
            }
            logits = _multiply(norm(torch.cat(list(rows.values()))), matrix)
            logits = soften(logits, self.shape)
            begin = 0
            for name, places in rows.items():
                run.found[name] = _numpy(logits[begin : begin + len(places)])
                begin += len(places)

    def placed(self, case: Case, index: int, found: Tensors, dtype: torch.dtype) -> Tensor:
        """The last residual stream of a step, `[B, T, hidden]`, zeros at padding."""
        mask = torch.from_numpy(case.steps[index].new_mask)
        hidden = torch.zeros(*mask.shape, self.shape.hidden_size, dtype=dtype)
        stream = found[f"{case.name}.{index}.hidden.{self.shape.num_layers}"]
        hidden[mask] = torch.from_numpy(stream).to(dtype)
        return hidden

    def _record_hidden(self, run: _Run, index: int) -> None:
        for case, hidden in zip(self.cases, run.hidden, strict=True):
            for i, step in enumerate(case.steps):
                run.found[f"{case.name}.{i}.hidden.{index}"] = _numpy(hidden[i])[step.new_mask]

    def _weight(self, name: str) -> Tensor:
        return rounded(name, self.model.weights.read(name), self.weight_dtype)


def _last_or_all(hidden: Tensor, step: StepInputs, logits: str) -> Tensor:
    """Residual stream of the places whose logits the graph gives and that are no padding."""
    mask = torch.from_numpy(step.new_mask)
    return hidden[mask] if logits == "all" else hidden[mask[:, -1], -1]


def _multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times the transposed head `[vocab, hidden]`, a few rows of the head at a time."""
    pieces = []
    for begin in range(0, matrix.shape[0], _HEAD_ROWS):
        part = matrix[begin : begin + _HEAD_ROWS].to(rows.dtype)
        pieces.append(rows @ part.T)
    return torch.cat(pieces, dim=-1)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().numpy()
    return array
