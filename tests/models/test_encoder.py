"""Every family equals transformers, which wrote the checkpoint and knows nothing of us."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from encoders import ENCODERS, inputs_of, save_encoder

from edgeattn.encoder_shape import EncoderShape, PatchInput, TokenInput
from edgeattn.models.encoder import Encoder, embedding_of, padding_mask
from edgeattn.models.encoder_checkpoint import is_encoder, open_encoder
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.encoder_model import encoder_of, load_encoder


def loaded(path: Path, **options: str) -> Encoder:
    checkpoint = open_encoder(path, **options)
    model = encoder_of(checkpoint.shape, checkpoint.weights)
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    return load_encoder(model, **dtypes, form=options.get("form", "standard"))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_family_equals_transformers(tmp_path: Path, name: str) -> None:
    reference, inputs = save_encoder(name, tmp_path), inputs_of(name)
    assert is_encoder(tmp_path)
    encoder = loaded(tmp_path)
    with torch.no_grad():
        expected = reference(**inputs)
        found = encoder(*inputs.values())
    if name.endswith("classifier"):
        assert encoder.shape.task == "classification"
        assert found.output.shape == (2, 5)
        torch.testing.assert_close(found.output, expected.logits, rtol=0, atol=1e-5)
        return
    assert encoder.shape.task == "hidden"
    valid = inputs.get("attention_mask", torch.ones(found.output.shape[:2])).bool()
    states = expected.last_hidden_state
    torch.testing.assert_close(found.output[valid], states[valid], rtol=0, atol=1e-5)
    assert len(found.hidden) == 4


@pytest.mark.parametrize("name", ENCODERS)
def test_the_parameters_are_those_of_the_module(tmp_path: Path, name: str) -> None:
    save_encoder(name, tmp_path)
    shape = open_encoder(tmp_path).shape
    sizes = {n: tuple(p.shape) for n, p in Encoder(shape).named_parameters()}
    assert sizes == encoder_parameters(shape)
    assert shape.num_parameters == sum(p.numel() for p in Encoder(shape).parameters())
    assert EncoderShape.from_dict(shape.to_dict()) == shape


@pytest.mark.parametrize("name", ["bert", "eurobert", "vit"])
def test_both_spellings_of_attention_agree(tmp_path: Path, name: str) -> None:
    save_encoder(name, tmp_path)
    checkpoint, inputs = open_encoder(tmp_path), inputs_of(name)
    model = encoder_of(checkpoint.shape, checkpoint.weights)
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float64}
    outputs = []
    for form in ("standard", "primitive"):
        encoder = load_encoder(model, **dtypes, form=form)
        values = [v.double() if v.is_floating_point() else v for v in inputs.values()]
        with torch.no_grad():
            outputs.append(encoder(*values).output)
    # the primitive one has its scores in fp32
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    save_encoder("eurobert", tmp_path)
    encoder = loaded(tmp_path)
    ids = torch.randint(0, 272, (1, 6))
    padded = torch.cat((ids, torch.full((1, 3), 7)), dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    with torch.no_grad():
        alone = encoder(ids, torch.ones_like(ids)).output
        found = encoder(padded, mask).output
    torch.testing.assert_close(found[:, :6], alone, rtol=0, atol=1e-5)
    assert found.isfinite().all()


def test_every_row_of_the_mask_sees_itself() -> None:
    mask = padding_mask(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert mask[1, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_an_embedding_is_the_mean_of_the_tokens_and_has_length_1() -> None:
    states = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = embedding_of(states, mask)
    torch.testing.assert_close(
        found[1], torch.nn.functional.normalize(states[1, :2].mean(0), dim=0)
    )
    first = embedding_of(states, mask, first=True)
    torch.testing.assert_close(first, torch.nn.functional.normalize(states[:, 0], dim=1))
    assert embedding_of(torch.zeros(1, 2, 8), mask[:1, :2]).isfinite().all()
    # sums of many tokens overflow fp16
    large = torch.full((1, 400, 8), 300.0, dtype=torch.float16)
    assert embedding_of(large, torch.ones(1, 400)).float().norm().item() == pytest.approx(1, 1e-3)


def test_inputs_know_their_names_and_tokens() -> None:
    assert PatchInput(32, 16, 8).tokens == 9
    assert PatchInput(32, 16, 8).names == ("pixel_values",)
    assert TokenInput(10, 20).names == ("input_ids", "attention_mask")
    assert replace(TokenInput(10, 20), token_types=2).names[-1] == "token_type_ids"
