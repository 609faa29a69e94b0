"""Rotations on disk: one safetensors file, so that what took long to learn serves again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgeattn.calibration.work import write_tensors
from edgeattn.errors import UsageError
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotate import Rotations

RESIDUAL, HEADS = "residual", "heads"
# Largest |R Rᵀ - I| of a file; learned rotations are projected to rounding in fp64.
_LARGEST_ERROR = 1e-6
_ADVICE = "pass a file of rotations that were learned for the model"


def save_rotations(path: Path, rotations: Rotations, made_from: Mapping[str, Any]) -> None:
    """Writes R1 `[d, d]` and R2 `[layers, Dh, Dh]`, fp64; R4 follows from the shape alone.

    Args:
        path: appears whole or not at all.
        rotations: with R1 and R2.
        made_from: JSON-ready values to note, the checkpoint's fingerprint among them.
    """
    tensors = stacked(rotations)
    layers, head_dim, _ = tensors[HEADS].shape
    metadata = {
        "hidden_size": str(len(tensors[RESIDUAL])),
        "head_dim": str(head_dim),
        "num_layers": str(layers),
        "made_from": json.dumps(made_from, sort_keys=True),
    }
    write_tensors(path, tensors, metadata)


def load_rotations(path: Path, shape: ModelShape) -> tuple[Rotations, dict[str, Any]]:
    """Reads what `save_rotations` wrote.

    Args:
        path: the file.
        shape: of the model that shall be rotated.

    Returns:
        The rotations, and what is noted of how they were made; nothing in a file without.

    Raises:
        UsageError: no such file, not one of rotations, or of another model; or a matrix that is not
            orthogonal.
    """
    tensors, metadata = read_tensors(path, todo=_ADVICE)
    residual, heads = tensors[RESIDUAL].double(), tensors[HEADS].double()
    wanted = [shape.hidden_size] * 2, [shape.num_layers, shape.head_dim, shape.head_dim]
    found = list(residual.shape), list(heads.shape)
    if found != wanted:
        raise _refusal(
            f"rotations of this model in {path}, R1 of {wanted[0]} and R2 of {wanted[1]}",
            f"they are of {found[0]} and {found[1]}",
        )
    if not all(tensor.isfinite().all() for tensor in (residual, heads)):
        raise _refusal(f"rotations in {path}", "they hold NaN or infinity")
    rotations = Rotations(residual, tuple(heads))
    error = rotations.orthogonality_error()
    if not error <= _LARGEST_ERROR:
        raise _refusal(f"orthogonal matrices in {path}", f"their products are off by {error:.2g}")
    return rotations, _made_from(metadata)


def _made_from(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        noted = json.loads(metadata.get("made_from", "{}"))
    except ValueError:
        return {}
    return noted if isinstance(noted, dict) else {}


def stacked(rotations: Rotations) -> dict[str, Tensor]:
    """R1 and R2 by their names in a file."""
    assert rotations.residual is not None
    assert rotations.heads
    return {RESIDUAL: rotations.residual.contiguous(), HEADS: torch.stack(rotations.heads)}


def read_tensors(path: Path, *, todo: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """R1 and R2 by their names, and the metadata of a safetensors file.

    Args:
        path: the file.
        todo: what a refusal advises.

    Raises:
        UsageError: there is none, it does not read, or holds something else.
    """
    if not path.is_file():
        raise _refusal(f"a file {path}", "there is none", todo)
    try:
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            # By their names alone: a whole model passed by mistake is not read.
            if missing := {RESIDUAL, HEADS} - held:
                others = len(held - {RESIDUAL, HEADS})
                came = f"it lacks {' and '.join(sorted(missing))} and holds {others} other tensors"
                raise _refusal(f"rotations in {path}", came, todo)
            tensors = {name: file.get_tensor(name) for name in (RESIDUAL, HEADS)}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        came = f"it does not read ({error})"
        raise _refusal(f"a safetensors file at {path}", came, todo) from error


def _refusal(expected: str, came: str, todo: str = _ADVICE) -> UsageError:
    return UsageError(expected=expected, came=came, todo=todo)
