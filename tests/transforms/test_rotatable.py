"""The network whose rotations are arguments, against the merged one and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from rotated_loss import loss_of
from torch import Tensor

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.families import LM_HEAD, parameter_names
from edgeattn.models.model import Model, model_of
from edgeattn.models.stream import Head, final_hidden
from edgeattn.quant.affine import quantize_symmetric
from edgeattn.quant.scheme import WeightFormat, parse_scheme
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotatable import (
    RotatableModel,
    fake_quantize,
    merge_bias,
    merge_weight,
    round_through,
)
from edgeattn.transforms.rotate import Rotations, hadamard_rotations, rotate

INT4 = parse_scheme("w4a16-spinquant-learned:group=32")
INT8 = parse_scheme("w8a8-spinquant")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2-biases": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3-heads-of-24": {"model_type": "qwen3", "hidden_size": 96, "head_dim": 24},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
}


@pytest.fixture
def model_named(random_checkpoint: Callable[..., Path]) -> Callable[[str], Model]:
    """A function from a name in `MODELS` to the model."""
    return lambda name: model_of(open_checkpoint(random_checkpoint(**MODELS[name])))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, model_named: Callable[[str], Model]) -> Model:
    return model_named(request.param)


@pytest.fixture
def llama(model_named: Callable[[str], Model]) -> Model:
    return model_named("llama")


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> Model:
    return model_of(open_checkpoint(stories260k))


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (10, 24))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def random_rotations(shape: ModelShape, *, online: bool = False) -> Rotations:
    """Not symmetric, so that a matrix and its inverse are told apart."""
    heads = tuple(orthogonal(shape.head_dim) for _ in range(shape.num_layers))
    down = hadamard_rotations(shape, online=online).down
    return Rotations(orthogonal(shape.hidden_size), heads, down)


def test_weights_are_merged_as_rotate_does(model: Model) -> None:
    rotations = random_rotations(model.shape, online=True)
    folded = rotate(model, Rotations(down=rotations.down)).weights
    rotated = rotate(model, rotations).weights
    assert rotations.residual is not None
    compared = set()
    for name in parameter_names(model.shape):
        if "_proj." not in name:
            continue
        _, layer, rest = name.split(".", 2)
        linear, _, kind = rest.rpartition(".")
        head, value = rotations.heads[int(layer)].float(), folded.read(name)
        assert isinstance(value, Tensor)
        if kind == "bias":
            found = merge_bias(linear, value, head, model.shape)
        else:
            found = merge_weight(linear, value, rotations.residual.float(), head, model.shape)
        torch.testing.assert_close(found, rotated.read(name), atol=2e-6, rtol=0)
        compared.add(linear)
    assert compared == set(model.shape.linears())


@pytest.mark.parametrize("online", [False, True], ids=["merged", "online"])
def test_without_rounding_it_is_the_rotated_model(
    model: Model, windows: Tensor, online: bool
) -> None:
    rotations = random_rotations(model.shape, online=online)
    network = RotatableModel(model, None, down=rotations.down)
    assert rotations.residual is not None
    with torch.no_grad():
        found = network.logits(rotations.residual, rotations.heads, windows)
    merged = rotate(model, rotations)
    expected = Head(merged).logits(final_hidden(merged, windows))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_losses_are_those_of_the_logits(llama: Model, windows: Tensor) -> None:
    rotations = random_rotations(llama.shape)
    assert rotations.residual is not None
    network = RotatableModel(llama, INT4)
    with torch.no_grad():
        logits = network.logits(rotations.residual, rotations.heads, windows)[:, :-1].double()
    found = logits.log_softmax(-1)
    nll = -found.gather(2, windows[:, 1:, None]).mean()
    assert loss_of(llama, INT4, rotations, windows, "cross-entropy") == pytest.approx(float(nll))
    original = Head(llama).logits(final_hidden(llama, windows))[:, :-1].double().log_softmax(-1)
    kl = (original.exp() * (original - found)).sum(-1).mean()
    assert loss_of(llama, INT4, rotations, windows) == pytest.approx(float(kl), rel=1e-3)
    assert abs(loss_of(llama, None, rotations, windows)) < 1e-6


def test_gradients_agree_with_finite_differences(stories: Model) -> None:
    network, text = RotatableModel(stories, None), torch.randint(0, 512, (1, 48))
    rotations = random_rotations(stories.shape)
    assert rotations.residual is not None
    residual = rotations.residual.requires_grad_()
    heads = [head.requires_grad_() for head in rotations.heads]
    network.loss(residual, heads, text, "cross-entropy").backward()  # type: ignore[no-untyped-call]

    def slope(along: Tensor, head: int | None) -> tuple[float, float]:
        """The derivative along a direction, by the gradient and by a central difference."""
        step, losses = 3e-3, []
        for sign in (-1, 1):
            moved = [residual.detach(), *(h.detach() for h in heads)]
            moved[0 if head is None else 1 + head] = (
                moved[0 if head is None else 1 + head] + sign * step * along
            )
            with torch.no_grad():
                losses.append(float(network.loss(moved[0], moved[1:], text, "cross-entropy")))
        gradient = residual.grad if head is None else heads[head].grad
        assert gradient is not None
        return float((gradient * along).sum()), (losses[1] - losses[0]) / (2 * step)

    for matrix, head in ((residual, None), (heads[0], 0), (heads[-1], len(heads) - 1)):
        assert matrix.grad is not None
        # Steepest ascent leaves the rotations: only there does the unrounded loss change at all.
        by_gradient, by_difference = slope(matrix.grad / matrix.grad.norm(), head)
        assert by_difference == pytest.approx(by_gradient, rel=0.02, abs=2e-3)
        noise = torch.randn_like(matrix)
        tangent = (noise - noise.T) @ matrix.detach()
        flat = slope(tangent / tangent.norm(), head)
        assert flat == pytest.approx((0, 0), abs=2e-3)


def test_a_small_head_is_rounded_in_the_rotated_basis(llama: Model, windows: Tensor) -> None:
    rotations = random_rotations(llama.shape)
    assert rotations.residual is not None
    rounded, exact = (
        RotatableModel(llama, parse_scheme(f"w4a16-spinquant-learned:group=32,head={head}"))
        for head in ("w4", "w8")
    )
    with torch.no_grad():
        found = rounded.logits(rotations.residual, rotations.heads, windows)
        hidden = exact._final_hidden(rotations.residual.float(), rotations.heads, windows)
    # Not `rotate` in fp64 again, as a weight in the middle of two steps might round otherwise.
    table = rotate(llama, Rotations()).weights.read(LM_HEAD)
    assert isinstance(table, Tensor)
    head = fake_quantize(table @ rotations.residual.float(), WeightFormat(4, 32), search=True)
    normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=llama.shape.norm_eps)
    torch.testing.assert_close(found, normed @ head.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("format", [WeightFormat(8), WeightFormat(4, 32)], ids=["int8", "int4"])
def test_weights_are_rounded_as_the_scheme_does(format: WeightFormat) -> None:
    weight = torch.randn(24, 96)
    plain = quantize_symmetric(weight, format, clip="max").dequantize()
    torch.testing.assert_close(fake_quantize(weight, format, search=False), plain)
    searched = fake_quantize(weight, format, search=True)
    best = quantize_symmetric(weight, format, clip="mse").dequantize()
    errors = [float((found - weight).square().mean()) for found in (best, searched, plain)]
    assert errors[1] <= errors[2]
    assert errors[1] <= 1.1 * errors[0]


def test_gradients_go_through_rounding_and_into_scales() -> None:
    x = torch.tensor([0.2, 1.7, -2.5], requires_grad=True)
    round_through(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]
    # scale = 14 / 7 = 2; 5.4 / 2 = 2.7 rounds to 3: a larger scale would raise it by 3 - 2.7.
    weight = torch.tensor([[14.0, 5.4]], requires_grad=True)
    found = fake_quantize(weight, WeightFormat(4), search=False)
    assert found.tolist() == [[14.0, 6.0]]
    found[0, 1].backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[0.3 / 7, 1.0]]))


def test_inputs_are_rounded_where_the_scheme_says(llama: Model, windows: Tensor) -> None:
    rotations = hadamard_rotations(llama.shape, online=True)
    weights_only = replace(INT8, activation_bits=None)
    rounded, exact = (loss_of(llama, s, rotations, windows) for s in (INT8, weights_only))
    assert rounded > 1.5 * exact
    assert rounded < 0.1
