"""LION layers of encoders equal a double loop in fp64, for every variant and family."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from encoders import inputs_of, save_encoder
from numpy.typing import NDArray

from edgeattn.attention import LionRequest, LionVariant
from edgeattn.encoder_shape import EncoderShape
from edgeattn.models.encoder import Encoder, EncoderAttention
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_families import encoder_parameters

Array = NDArray[np.float64]
VARIANTS: tuple[LionVariant, ...] = ("lit", "d", "s")


def encoder_with(name: str, variant: LionVariant, path: Path) -> Encoder:
    """A random encoder of a family, its decays strong and weak."""
    save_encoder(name, path)
    shape = open_encoder(path).shape.with_attention(LionRequest(variant).layer)
    torch.manual_seed(2)
    encoder = Encoder(shape).eval()
    for parameter in encoder.parameters():
        parameter.data = torch.randn_like(parameter) * (
            1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        )
    return encoder


def sigmoid(x: Array | float) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def features(x: Array, variant: LionVariant) -> Array:
    if variant == "lit":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    shifted = x * sigmoid(x) + 0.5
    return np.asarray(shifted / math.sqrt(float((shifted**2).sum())))


def rotated(x: Array, place: int, theta: float) -> Array:
    half = len(x) // 2
    angles = place / theta ** (np.arange(half) / half)
    a, b = x[:half], x[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin))


def by_hand(
    attention: EncoderAttention, shape: EncoderShape, variant: LionVariant, x: Array
) -> Array:
    """The attention of one text `[T, hidden]` without padding: one score, one decay at a time."""
    weights = {n: p.detach().double().numpy() for n, p in attention.named_parameters()}

    def project(name: str) -> Array:
        bias = weights.get(f"{name}.bias", 0.0)
        return np.asarray(x @ weights[f"{name}.weight"].T + bias)

    length, width, shared = len(x), shape.head_dim, shape.num_heads // shape.num_kv_heads
    q, k, v = (project(f"{n}_proj").reshape(length, -1, width) for n in "qkv")
    rope = shape.layer_kind(0).rope
    if rope is not None:
        for heads in (q, k):
            for i, head in itertools.product(range(length), range(heads.shape[1])):
                heads[i, head] = rotated(heads[i, head], i, rope.theta)
    y = np.zeros((length, shape.num_heads, width))
    for head in range(shape.num_heads):
        if variant == "lit":
            decay = np.ones(length)
        elif variant == "d":
            decay = np.full(length, sigmoid(weights["decay"][head]))
        else:
            decay = 1 - sigmoid(project("gate_proj")[:, head])
        for i in range(length):
            total, divisor = np.zeros(width), 0.0
            for j in range(length):
                # LION's own code: the gates from j to before i, or from behind i to j.
                mask = decay[j:i].prod() if j < i else decay[i + 1 : j + 1].prod()
                score = features(q[i, head], variant) @ features(k[j, head // shared], variant)
                total = total + mask * score * v[j, head // shared]
                divisor += mask * score
            y[i, head] = total / (divisor + 1e-6 * math.sqrt(width))
    return np.asarray(
        y.reshape(length, -1) @ weights["o_proj.weight"].T + weights.get("o_proj.bias", 0.0)
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "eurobert", "vit"])
def test_each_layer_equals_a_double_loop(tmp_path: Path, name: str, variant: LionVariant) -> None:
    encoder, inputs = encoder_with(name, variant, tmp_path), inputs_of(name)
    seen = list[tuple[EncoderAttention, torch.Tensor, torch.Tensor]]()
    for block in encoder.blocks():
        block.self_attn.register_forward_hook(
            lambda module, given, found: seen.append((module, given[0], found))
        )
    with torch.no_grad():
        encoder(*inputs.values())
    assert len(seen) == 3
    valid = inputs.get("attention_mask", torch.ones(2, 17)).sum(1).int().tolist()
    for (module, given, found), row in itertools.product(seen, range(2)):
        count = valid[row]  # a text as if its padding were not there
        expected = by_hand(module, encoder.shape, variant, given[row, :count].double().numpy())
        np.testing.assert_allclose(found[row, :count], expected, rtol=0, atol=2e-5)
    assert not torch.allclose(seen[0][2][0], seen[0][1][0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "eurobert"])
def test_padding_changes_nothing(tmp_path: Path, name: str, variant: LionVariant) -> None:
    encoder = encoder_with(name, variant, tmp_path)
    ids = torch.randint(0, 272, (1, 6))
    padded, mask = torch.nn.functional.pad(ids, (0, 3), value=7), torch.ones(1, 9)
    mask[:, 6:] = 0
    types = torch.zeros(1, 9, dtype=torch.int64)
    for training in (False, True):  # the operator, and what is trained
        encoder.train(training)
        with torch.no_grad():
            alone = encoder(ids, torch.ones(1, 6), types[:, :6]).output
            found = encoder(padded, mask, types).output
            ignored = encoder(padded, torch.ones(1, 9), types).output
        torch.testing.assert_close(found[:, :6], alone, rtol=0, atol=1e-5)
        assert found.isfinite().all()
        assert not torch.allclose(ignored[:, :6], alone, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_equals_the_operator(tmp_path: Path, variant: LionVariant) -> None:
    encoder, inputs = encoder_with("eurobert", variant, tmp_path), inputs_of("eurobert")
    with torch.no_grad():
        expected = encoder(*inputs.values()).output
    found = encoder.train()(*inputs.values()).output
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=0, atol=1e-4)
    found[valid].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "gate_proj" in name or "decay" in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameters_are_those_of_the_module(tmp_path: Path, variant: LionVariant) -> None:
    shape = encoder_with("eurobert", variant, tmp_path).shape
    sizes = {n: tuple(p.shape) for n, p in Encoder(shape).named_parameters()}
    assert sizes == encoder_parameters(shape)
    assert shape.num_parameters == sum(math.prod(size) for size in sizes.values())
    assert EncoderShape.from_dict(shape.to_dict()) == shape
    softmax = replace(shape.layer_cycle[0], attention=None)
    mixed = replace(shape, layer_cycle=(*shape.layer_cycle, softmax))
    sizes = {n: tuple(p.shape) for n, p in Encoder(mixed).named_parameters()}
    assert sizes == encoder_parameters(mixed)
    assert mixed.num_parameters == sum(math.prod(size) for size in sizes.values())
