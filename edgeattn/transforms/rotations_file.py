"""Rotations on disk: one safetensors file, so that what took long to learn serves again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.errors import UsageError
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotate import Rotations

RESIDUAL, HEADS = "residual", "heads"
# Largest |R Rᵀ - I| of a file; learned rotations are projected to rounding in fp64.
_LARGEST_ERROR = 1e-6


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


def load_rotations(path: Path, shape: ModelShape) -> Rotations:
    """Reads what `save_rotations` wrote.

    Args:
        path: the file.
        shape: of the model that shall be rotated.

    Raises:
        UsageError: no such file, not one of rotations, or of another model; or a matrix that is not
            orthogonal.
    """
    tensors, _ = read_tensors(path)
    if not {RESIDUAL, HEADS} <= tensors.keys():
        raise _refusal(
            f"rotations in {path}", f"it holds {', '.join(sorted(tensors)) or 'nothing'}"
        )
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
    return rotations


def stacked(rotations: Rotations) -> dict[str, Tensor]:
    """R1 and R2 by their names in a file."""
    assert rotations.residual is not None
    assert rotations.heads
    return {RESIDUAL: rotations.residual.contiguous(), HEADS: torch.stack(rotations.heads)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    save_file(dict(tensors), partial, metadata=dict(metadata))
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UsageError: there is none, or it does not read.
    """
    if not path.is_file():
        raise _refusal(f"a file {path}", "there is none")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _refusal(f"a safetensors file at {path}", f"it does not read ({error})") from error


def _refusal(expected: str, came: str) -> UsageError:
    return UsageError(
        expected=expected,
        came=came,
        todo="pass a file of rotations that were learned for the model",
    )
