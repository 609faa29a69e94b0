"""Rotated reads change no number an encoder gives; every wrong way to merge them is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from encoders import inputs_of, save_encoder
from torch import Tensor

from edgeattn.errors import LoweringError, ProofError
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_model import EncoderModel, encoder_of, load_encoder
from edgeattn.models.model import ModelWeights
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat
from edgeattn.transforms.rotate_encoder import (
    EncoderRotations,
    check_encoder_equivalence,
    encoder_rotations,
    rotate_encoder,
)

NAMES = ["bert", "bert-classifier", "vit", "vit-wide", "dinov2", "dinov2-classifier", "eurobert"]
# In fp64, on weights that were cast once to fp32; the outputs are about 1.
TOLERANCE = 1e-5


@pytest.fixture
def encoder_named(tmp_path: Path) -> Callable[[str], EncoderModel]:
    """A function from a name of `encoders.ENCODERS` to a random model."""

    def make(name: str) -> EncoderModel:
        save_encoder(name, tmp_path / name)
        checkpoint = open_encoder(tmp_path / name)
        return encoder_of(checkpoint.shape, checkpoint.weights)

    return make


@torch.inference_mode()
def output_of(model: EncoderModel, name: str) -> Tensor:
    values = [
        value.double() if value.is_floating_point() else value for value in inputs_of(name).values()
    ]
    encoder = load_encoder(model, weight_dtype=torch.float32, compute_dtype=torch.float64)
    return encoder(*values).output


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def asymmetric(model: EncoderModel) -> EncoderRotations:
    """With R2 that are not symmetric, so that a matrix and its inverse are told apart."""
    heads = tuple(orthogonal(model.shape.head_dim) for _ in range(model.shape.num_layers))
    return replace(encoder_rotations(model.shape, online=True), heads=heads)


@pytest.mark.parametrize("name", NAMES)
def test_no_output_changes(encoder_named: Callable[[str], EncoderModel], name: str) -> None:
    model = encoder_named(name)
    expected = output_of(model, name)
    for rotations in (asymmetric(model), encoder_rotations(model.shape, online=False)):
        found = output_of(rotate_encoder(model, rotations), name)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@dataclass(frozen=True)
class Unchanged:
    """Rotated weights, but for those of one ending, which stay the checkpoint's."""

    source: ModelWeights
    original: ModelWeights
    ending: str

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        return (self.original if name.endswith(self.ending) else self.source).read(name)


@pytest.mark.parametrize(
    "ending",
    ["v_proj.bias", "v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight"],
)
def test_what_is_not_merged_is_caught(
    encoder_named: Callable[[str], EncoderModel], ending: str
) -> None:
    model = encoder_named("bert")
    rotated = rotate_encoder(model, asymmetric(model))
    wrong = replace(rotated, weights=Unchanged(rotated.weights, model.weights, ending))
    assert (output_of(wrong, "bert") - output_of(model, "bert")).abs().max() > 100 * TOLERANCE
    ids = inputs_of("bert")["input_ids"]
    with pytest.raises(ProofError, match="states within"):
        check_encoder_equivalence(model, wrong, ids)
    result = check_encoder_equivalence(model, rotated, ids)
    assert result["state difference"] < 1e-4 * result["state rms"]


def test_what_reads_the_stream_is_rotated_by_one_object(
    encoder_named: Callable[[str], EncoderModel],
) -> None:
    model = encoder_named("eurobert")
    rotated = rotate_encoder(model, encoder_rotations(model.shape, online=False))
    readers = {name.split(".", 2)[2] for name in rotated.reads}
    assert readers == {
        *(f"self_attn.{x}_proj.weight" for x in "qkv"),
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }
    assert len({id(read.rotation) for read in rotated.reads.values()}) == 1


def test_an_odd_width_is_refused(encoder_named: Callable[[str], EncoderModel]) -> None:
    shape = replace(encoder_named("bert").shape, intermediate_size=95)
    with pytest.raises(LoweringError, match="an even width"):
        encoder_rotations(shape, online=True)
