"""The linear layer of all blocks, with and without a rotation and rounding of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.linear import Linear, linear_of
from edgeattn.models.model import Model, load_decoder, load_layer, model_of
from edgeattn.quant.activation import AS_IT_IS, LinearInput, round_to_int8
from edgeattn.quant.hadamard import hadamard_factors, transform
from edgeattn.transforms.fuse import fuse_projections

DOWN = "layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint(model_type="qwen2")))


@pytest.mark.parametrize("bias", [False, True])
def test_without_more_it_is_torchs_linear_layer(bias: bool) -> None:
    linear, x = Linear(24, 5, bias=bias), torch.randn(2, 3, 24)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), expected)
    assert (linear.bias is not None) == bias


def test_the_product_sees_the_input_as_it_is_read() -> None:
    linear, x, factors = Linear(24, 5, bias=True), torch.randn(3, 24), hadamard_factors(24)
    linear.reads = LinearInput(factors, 0.03)
    seen = round_to_int8(transform(x, factors), 0.03)
    assert torch.equal(linear(x), seen @ linear.weight.T + linear.bias)


def test_a_rotation_is_undone_by_its_inverse_in_the_weights() -> None:
    linear, x, factors = Linear(172, 5), torch.randn(3, 172), hadamard_factors(172)
    expected = linear(x)
    linear.reads = LinearInput(factors)
    assert not torch.allclose(linear(x), expected, atol=1e-2)
    linear.weight.data = transform(linear.weight.data, factors)
    torch.testing.assert_close(linear(x), expected)


def test_layers_of_a_block_are_found_by_name(model: Model) -> None:
    layer = load_layer(model, 0, weight_dtype=torch.float32)
    for name, (outputs, inputs) in model.shape.linears().items():
        linear = linear_of(layer, name)
        assert (linear.out_features, linear.in_features) == (outputs, inputs)
    with pytest.raises(AssertionError):
        linear_of(layer, "input_layernorm")


def test_reads_reach_their_layers_and_no_others(model: Model) -> None:
    read = LinearInput(scale=0.1)
    changed = replace(model, reads={DOWN: read})
    decoder = load_decoder(changed, weight_dtype=torch.float32, compute_dtype=torch.float32)
    found = {
        f"{name}.weight": part.reads
        for name, part in decoder.named_modules()
        if isinstance(part, Linear) and part.reads is not AS_IT_IS
    }
    assert found == {DOWN: read}
    for index in range(3):
        layer = load_layer(changed, index, weight_dtype=torch.float32)
        assert linear_of(layer, "mlp.down_proj").reads is (read if index == 1 else AS_IT_IS)


def test_stacked_projections_read_as_their_parts_did(model: Model) -> None:
    scales = {"q_proj": 0.1, "k_proj": 0.1, "v_proj": 0.1, "gate_proj": 0.2, "up_proj": 0.2}
    parts = {name: ("mlp" if "_" in name and name[0] in "gu" else "self_attn") for name in scales}
    reads = {
        f"layers.{i}.{parts[name]}.{name}.weight": LinearInput(scale=scale)
        for name, scale in scales.items()
        for i in range(3)
    }
    plain = replace(model, reads=reads)
    fused = fuse_projections(plain)
    assert fused.shape.fused
    layer = load_layer(fused, 1, weight_dtype=torch.float32)
    assert linear_of(layer, "self_attn.qkv_proj").reads.scale == 0.1
    assert linear_of(layer, "mlp.gate_up_proj").reads.scale == 0.2
    assert linear_of(layer, "mlp.down_proj").reads is AS_IT_IS


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.gate_proj"])
def test_parts_that_read_differently_are_not_stacked(model: Model, part: str) -> None:
    reads = {f"layers.2.{part}.weight": LinearInput(scale=0.1)}
    assert not fuse_projections(replace(model, reads=reads)).shape.fused
