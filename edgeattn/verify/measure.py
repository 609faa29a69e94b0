"""How far a run is from the reference, tensor by tensor, in the measure its scheme is judged by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeattn.verify.cases import Case
from edgeattn.verify.drive import Tensors
from edgeattn.verify.tolerance import relative_error, typical_error

_OF_STEP = re.compile(r"^(\w+)\.(\d+)\.(logits|hidden\.\d+)$")


def errors(
    found: Tensors,
    expected: Mapping[str, NDArray[np.float32]],
    cases: Sequence[Case],
    *,
    rounds: bool,
) -> dict[str, float]:
    """The error of every tensor, infinite where one is missing.

    The residual stream is only compared where an implementation gives it.

    Args:
        found: of an implementation, named as in `drive`.
        expected: of the reference.
        cases: what was run.
        rounds: whether the scheme rounds at run time. Then the steps of a case are judged together:
            "sequence.logits" stands for "sequence.0.logits" and so on.
    """
    if not rounds:
        return {
            name: _missing(name, found) or relative_error(found[name], reference)
            for name, reference in expected.items()
            if name in found or ".hidden." not in name
        }
    by_name = {case.name: case for case in cases}
    parts: dict[str, list[str]] = {}
    for name in expected:
        if name in found or ".hidden." not in name:
            match = _OF_STEP.match(name)
            parts.setdefault(f"{match[1]}.{match[3]}" if match else name, []).append(name)
    return {
        whole: max((_missing(name, found) for name in names), default=0.0)
        or _typical(names, found, expected, by_name)
        for whole, names in parts.items()
    }


def _missing(name: str, found: Tensors) -> float:
    return 0.0 if name in found else float("inf")


def _typical(
    names: Sequence[str],
    found: Tensors,
    expected: Mapping[str, NDArray[np.float32]],
    cases: Mapping[str, Case],
) -> float:
    if any(found[name].shape != expected[name].shape for name in names):
        return float("inf")
    value, reference = (
        np.concatenate([side[name] for name in names]) for side in (found, expected)
    )
    rows = np.concatenate([_rows(name, len(expected[name]), cases) for name in names])
    return typical_error(value, reference, rows)


def _rows(name: str, count: int, cases: Mapping[str, Case]) -> NDArray[np.int64]:
    """The row of the batch of each entry of a tensor."""
    match = _OF_STEP.match(name)
    case = cases[name.partition(".")[0]]
    if match is None:  # a cache holds every valid place of its case
        return np.nonzero(case.steps[-1].attention_mask)[0]
    step = case.steps[int(match[2])]
    rows = np.nonzero(step.new_mask)[0]
    return rows if len(rows) == count else np.nonzero(step.new_mask[:, -1])[0]
