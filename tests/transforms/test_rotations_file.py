"""Rotations on disk: what is written comes back, and everything else is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.errors import UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.quant.stiefel import orthogonality_error
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotate import Rotations, hadamard_rotations
from edgeattn.transforms.rotations_file import load_rotations, save_rotations

MADE_FROM = {"checkpoint": "c0ffee", "scheme": "w4a16-spinquant-learned"}


@pytest.fixture
def shape(random_checkpoint: Callable[..., Path]) -> ModelShape:
    return open_checkpoint(random_checkpoint()).shape


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


@pytest.fixture
def rotations(shape: ModelShape) -> Rotations:
    heads = tuple(orthogonal(shape.head_dim) for _ in range(shape.num_layers))
    return Rotations(orthogonal(shape.hidden_size), heads)


def same(one: Rotations, other: Rotations) -> bool:
    assert one.residual is not None
    assert other.residual is not None
    pairs = zip((one.residual, *one.heads), (other.residual, *other.heads), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_rotations_survive_a_file(tmp_path: Path, shape: ModelShape, rotations: Rotations) -> None:
    path = tmp_path / "rotations.safetensors"
    save_rotations(path, rotations, MADE_FROM)
    found, noted = load_rotations(path, shape)
    assert noted == MADE_FROM
    assert same(found, rotations)
    assert found.residual is not None
    assert found.residual.dtype == torch.float64
    with safe_open(path, "pt") as file:
        about = file.metadata()
        assert file.get_tensor("heads").shape == (shape.num_layers, shape.head_dim, shape.head_dim)
    assert about["hidden_size"] == str(shape.hidden_size)
    assert about["head_dim"] == str(shape.head_dim)
    assert about["num_layers"] == str(shape.num_layers)
    assert json.loads(about["made_from"]) == MADE_FROM
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_r4_is_not_stored(tmp_path: Path, shape: ModelShape) -> None:
    online = hadamard_rotations(shape, online=True)
    save_rotations(tmp_path / "file", online, {})
    assert load_rotations(tmp_path / "file", shape)[0].down is None


@pytest.fixture
def stored(tmp_path: Path, rotations: Rotations) -> tuple[Path, dict[str, Tensor]]:
    assert rotations.residual is not None
    tensors = {"residual": rotations.residual.contiguous(), "heads": torch.stack(rotations.heads)}
    return tmp_path / "rotations.safetensors", tensors


def refused(path: Path, shape: ModelShape, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_rotations(path, shape)
    assert str(path) in str(caught.value)
    assert re.fullmatch(r"expected .+, but .+: pass a file of rotations .+", str(caught.value))


def test_a_missing_file_is_refused(tmp_path: Path, shape: ModelShape) -> None:
    refused(tmp_path / "none", shape, "there is none")
    refused(tmp_path, shape, "there is none")


@pytest.mark.parametrize("content", [b"", b"none", b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(
    tmp_path: Path, shape: ModelShape, content: bytes
) -> None:
    path = tmp_path / "rotations"
    path.write_bytes(content)
    refused(path, shape, "a safetensors file .* does not read")


@pytest.mark.parametrize("name", ["residual", "heads"])
def test_a_file_without_rotations_is_refused(
    shape: ModelShape, stored: tuple[Path, dict[str, Tensor]], name: str
) -> None:
    path, tensors = stored
    save_file({"weight" if key == name else key: value for key, value in tensors.items()}, path)
    refused(path, shape, f"it lacks {name} and holds 1 other tensors")


def test_a_whole_model_is_refused_without_being_read(
    tmp_path: Path, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passed by mistake; its names alone would fill a page."""
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{i}.weight": torch.zeros(2) for i in range(272)}, path)
    with monkeypatch.context() as patch:
        patch.setattr("edgeattn.transforms.rotations_file.safe_open", NamesOnly)
        refused(path, shape, "it lacks heads and residual and holds 272 other tensors")


class NamesOnly:
    """An open file whose tensors may not be read."""

    def __init__(self, path: Path, framework: str) -> None:
        with safe_open(path, framework) as file:
            self._names = list(file.keys())

    def keys(self) -> list[str]:
        return self._names

    def __enter__(self) -> NamesOnly:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("noted", [None, {}, {"made_from": "{"}, {"made_from": "[]"}])
def test_a_file_that_does_not_say_where_it_is_from(
    shape: ModelShape, stored: tuple[Path, dict[str, Tensor]], noted: dict[str, str] | None
) -> None:
    path, tensors = stored
    save_file(tensors, path, metadata=noted)
    assert load_rotations(path, shape)[1] == {}


@pytest.mark.parametrize(
    "other", [{"hidden_size": 128}, {"head_dim": 32}, {"num_layers": 4}, {"num_layers": 2}], ids=str
)
def test_rotations_of_another_model_are_refused(
    shape: ModelShape, stored: tuple[Path, dict[str, Tensor]], other: dict[str, int]
) -> None:
    path, tensors = stored
    save_file(tensors, path)
    refused(path, replace(shape, **other), "rotations of this model .* they are of ")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "heads"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(3e-6, "orthogonal matrices .* off by 3e-06"), (torch.nan, "NaN"), (torch.inf, "NaN or inf")],
)
def test_matrices_that_do_not_rotate_are_refused(
    shape: ModelShape, stored: tuple[Path, dict[str, Tensor]], name: str, damage: float, words: str
) -> None:
    path, tensors = stored
    tensors[name] *= 1 + damage / 2
    save_file(tensors, path)
    refused(path, shape, words)


def test_rounding_to_fp32_is_no_damage(
    shape: ModelShape, stored: tuple[Path, dict[str, Tensor]]
) -> None:
    path, tensors = stored
    save_file({name: value.float() for name, value in tensors.items()}, path)
    found, _ = load_rotations(path, shape)
    assert found.residual is not None
    assert orthogonality_error(found.residual) < 1e-6
