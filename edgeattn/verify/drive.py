"""Drives an implementation through the cases and names what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeattn.verify.cases import Case, StepInputs

Tensors = dict[str, NDArray[np.float32]]


class Backend(Protocol):
    """One implementation of the decoder.

    Attributes:
        name: shown in reports ("torch", "onnxruntime").
        packed_cache: whether each row's keys lie at the front of the cache, without gaps where the
            attention mask has them.
    """

    name: str
    packed_cache: bool

    def step(self, inputs: StepInputs, past: Mapping[str, object] | None) -> Mapping[str, object]:
        """One forward pass.

        Args:
            inputs: tokens, mask and positions.
            past: what the previous step returned, None before the first.

        Returns:
            Arrays under "logits", "present.N.key" and "present.N.value" (of linear attention
            "present.N.recurrent_state" and the like) and, where the backend has them, "hidden.N".
        """
        ...

    def to_numpy(self, value: object) -> NDArray[np.float32]:
        """An array of `step` as fp32."""
        ...


def drive(
    backend: Backend, cases: Sequence[Case], progress: Callable[[int, int], None] | None = None
) -> Tensors:
    """Runs every case and collects what must agree, padding left out.

    Kept are the logits of every step, the cache after the last step of a case (it holds every
    earlier entry) and the residual stream of every step: "sequence.3.logits",
    "sequence.present.0.key", "sequence.0.hidden.1".
    """
    found: Tensors = {}
    total, done = sum(len(case.steps) for case in cases), 0
    for case in cases:
        output: Mapping[str, object] | None = None
        for index, inputs in enumerate(case.steps):
            output = backend.step(inputs, output)
            logits = backend.to_numpy(output["logits"])
            found[f"{case.name}.{index}.logits"] = _valid_logits(logits, inputs)
            for name, value in output.items():
                if name.startswith("hidden."):
                    array = backend.to_numpy(value)
                    found[f"{case.name}.{index}.{name}"] = array[inputs.new_mask]
            done += 1
            if progress:
                progress(done, total)
        assert output is not None
        valid = places_of(case, packed=backend.packed_cache)
        for name, value in output.items():
            if name.startswith("present."):
                found[f"{case.name}.{name}"] = of_tokens(name, backend.to_numpy(value), valid)
    return found


def of_tokens(
    name: str, state: NDArray[np.float32], valid: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """What of a layer's state is compared: keys and values by token, a state of one size whole.

    Args:
        name: ends in what the state is, as `LayerKind.states` says.
        state: keys or values `[B, Hkv, S, D]`, or `[B, …]`.
        valid: places of the cache that hold keys, `[B, S]`.

    Returns:
        `[tokens, Hkv, D]`, or `[B, …]` as it came.
    """
    if name.rpartition(".")[2] in ("key", "value"):
        found: NDArray[np.float32] = state.transpose(0, 2, 1, 3)[valid]
        return found
    return state


def places_of(case: Case, *, packed: bool) -> NDArray[np.bool_]:
    """Which places of the cache after a case's last step hold keys, `[B, S]`."""
    valid: NDArray[np.bool_] = case.steps[-1].attention_mask.astype(bool)
    if packed:
        valid = np.arange(valid.shape[1]) < valid.sum(axis=1, keepdims=True)
    return valid


def _valid_logits(logits: NDArray[np.float32], inputs: StepInputs) -> NDArray[np.float32]:
    """Logits of real tokens `[n, vocab]`; a last-position graph has one per row at most."""
    every_place = logits.shape[1] == inputs.input_ids.shape[1]
    valid: NDArray[np.float32] = (
        logits[inputs.new_mask] if every_place else logits[inputs.new_mask[:, -1], -1]
    )
    return valid
