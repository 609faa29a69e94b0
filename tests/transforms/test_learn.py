"""Learned rotations: the loss they are learned by, stopping and going on, and their file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.calibration.windows import read_text, token_windows
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.families import FINAL_NORM, parameter_names
from edgeattn.models.model import Model, ModelWeights, model_of
from edgeattn.models.stream import Head, final_hidden
from edgeattn.quant.affine import quantize_symmetric
from edgeattn.quant.scheme import Scheme, WeightFormat, parse_scheme
from edgeattn.quant.stiefel import orthogonality_error
from edgeattn.shape import ModelShape
from edgeattn.transforms import learn
from edgeattn.transforms.learn import LearnReport, learn_rotations
from edgeattn.transforms.rotatable import (
    Objective,
    RotatableModel,
    fake_quantize,
    merge_bias,
    merge_weight,
    round_through,
)
from edgeattn.transforms.rotate import Rotations, hadamard_rotations, rotate
from edgeattn.transforms.rotations_file import load_rotations, save_rotations

INT4 = parse_scheme("w4a16-spinquant-learned:group=32")
INT4_STORIES = parse_scheme("w4a16-spinquant-learned:group=32,down_proj=w8")
INT8 = parse_scheme("w8a8-spinquant")
MADE_FROM = {"checkpoint": "c0ffee", "scheme": INT4.label}
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


@pytest.fixture
def llama(model_named: Callable[[str], Model]) -> Model:
    return model_named("llama")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, model_named: Callable[[str], Model]) -> Model:
    return model_named(request.param)


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> Model:
    return model_of(open_checkpoint(stories260k))


@pytest.fixture(scope="module")
def novel(stories260k: Path, shared_dir: Path) -> Tensor:
    text = read_text(shared_dir / "data" / "austen" / "emma.txt")
    tokenizer = open_checkpoint(stories260k).text["tokenizer.json"]
    return token_windows(text, tokenizer, windows=48, length=128, vocab_size=512)


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (10, 24))


@dataclass(frozen=True)
class Learning:
    """A call of `learn_rotations` with a state file of its own; arguments may be changed."""

    model: Model
    windows: Tensor
    state_file: Path

    def __call__(self, **changed: Any) -> tuple[Rotations, LearnReport]:
        arguments: dict[str, Any] = {
            "steps": 4,
            "state_file": self.state_file,
            "made_from": MADE_FROM,
            "objective": "kl",
            **changed,
        }
        scheme = arguments.pop("scheme", INT4)
        start = arguments.pop("start", hadamard_rotations(self.model.shape, online=scheme.online))
        windows = arguments.pop("windows", self.windows)
        return learn_rotations(self.model, scheme, windows, start, **arguments)


@pytest.fixture
def learning(llama: Model, windows: Tensor, tmp_path: Path) -> Learning:
    return Learning(llama, windows, tmp_path / "state.safetensors")


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def random_rotations(shape: ModelShape, *, online: bool = False) -> Rotations:
    """Not symmetric, so that a matrix and its inverse are told apart."""
    heads = tuple(orthogonal(shape.head_dim) for _ in range(shape.num_layers))
    down = hadamard_rotations(shape, online=online).down
    return Rotations(orthogonal(shape.hidden_size), heads, down)


def identity(shape: ModelShape) -> Rotations:
    heads = tuple(torch.eye(shape.head_dim).double() for _ in range(shape.num_layers))
    return Rotations(torch.eye(shape.hidden_size).double(), heads)


def same(one: Rotations, other: Rotations) -> bool:
    assert one.residual is not None
    assert other.residual is not None
    pairs = zip((one.residual, *one.heads), (other.residual, *other.heads), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def loss_of(
    model: Model,
    scheme: Scheme | None,
    rotations: Rotations,
    windows: Tensor,
    objective: Objective = "kl",
) -> float:
    network = RotatableModel(model, scheme, down=rotations.down)
    assert rotations.residual is not None
    with torch.no_grad():
        return float(network.loss(rotations.residual, rotations.heads, windows, objective))


# The network as a function of its rotations.


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


def test_gradients_agree_with_finite_differences(stories: Model, novel: Tensor) -> None:
    network, text = RotatableModel(stories, None), novel[:1, :48]
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
    assert 1.5 * exact < rounded < 0.1


# Learning.


@pytest.fixture(scope="module")
def learned(
    stories: Model, novel: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Rotations, LearnReport]:
    return learn_rotations(
        stories,
        INT4_STORIES,
        novel,
        hadamard_rotations(stories.shape, online=False),
        steps=12,
        state_file=tmp_path_factory.mktemp("learned") / "state",
        made_from=MADE_FROM,
    )


def test_the_loss_falls_on_text_that_was_not_learned(
    stories: Model, novel: Tensor, learned: tuple[Rotations, LearnReport]
) -> None:
    rotations, report = learned
    assert report.learned
    assert len(report.losses) == report.steps == 12
    assert report.seconds_per_step > 0
    assert report.loss_after < report.loss_before - 0.03
    held = learn._split(novel)[1]
    again = loss_of(stories, INT4_STORIES, rotations, held, report.objective)
    assert report.loss_after == pytest.approx(again)
    json.dumps(report.to_dict())


def test_learned_rotations_merge_without_a_trace(
    stories: Model, novel: Tensor, learned: tuple[Rotations, LearnReport]
) -> None:
    rotations, report = learned
    assert rotations.orthogonality_error() == report.orthogonality_error < 1e-12
    assert rotations.residual is not None
    with torch.no_grad():
        network = RotatableModel(stories, None)
        parametrised = network.logits(rotations.residual, rotations.heads, novel[:2])
    merged = rotate(stories, rotations)
    found = Head(merged).logits(final_hidden(merged, novel[:2]))
    torch.testing.assert_close(found, parametrised, atol=1e-4, rtol=0)
    original = Head(stories).logits(final_hidden(stories, novel[:2]))
    torch.testing.assert_close(found, original, atol=1e-4, rtol=0)


@dataclass(frozen=True)
class _Planted:
    """Weights with a few channels of the residual stream much larger than the others."""

    source: ModelWeights

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor:
        value = self.source.read(name)
        assert isinstance(value, Tensor)
        if name.endswith("layernorm.weight") and name != FINAL_NORM:
            value = value.clone()
            value[[3, 20, 41]] *= 12
        return value


@pytest.fixture
def planted(llama: Model) -> Model:
    return replace(llama, weights=_Planted(llama.weights))


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4 weights", "int8 inputs"])
def test_hadamard_matrices_rotate_outliers_away(
    planted: Model, windows: Tensor, scheme: Scheme
) -> None:
    none = loss_of(planted, scheme, identity(planted.shape), windows)
    rotations = hadamard_rotations(planted.shape, online=scheme.online)
    assert loss_of(planted, scheme, rotations, windows) < 0.6 * none


def test_learning_finds_out_how_to_rotate_outliers_away(planted: Model, tmp_path: Path) -> None:
    windows = torch.randint(0, 272, (24, 24))
    learning = Learning(planted, windows, tmp_path / "state")
    _, report = learning(start=identity(planted.shape), steps=30)
    assert report.learned
    assert report.loss_after < 0.6 * report.loss_before
    assert sum(report.losses[-5:]) < 0.6 * sum(report.losses[:5])


def test_r4_stays_as_it_was(learning: Learning) -> None:
    start = hadamard_rotations(learning.model.shape, online=True)
    found, _ = learning(scheme=INT8, start=start, steps=1)
    assert found.down is start.down


def test_the_start_is_returned_where_learning_did_no_better(
    learning: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "_judge", lambda *_: 1.5)
    start = random_rotations(learning.model.shape)
    found, report = learning(start=start)
    assert found is start
    assert not report.learned
    assert report.loss_before == report.loss_after == 1.5
    assert report.orthogonality_error == start.orthogonality_error()


def test_held_out_windows_are_never_learned(
    learning: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    loss = RotatableModel.loss

    def watched(self: RotatableModel, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(arguments[2][:, 0].tolist())
        return loss(self, *arguments)

    monkeypatch.setattr(RotatableModel, "loss", watched)
    monkeypatch.setattr(learn, "_TOKENS", 48)
    windows = torch.arange(17)[:, None].expand(17, 24)  # every token of a window is its number
    _, held = learn._split(windows)
    learning(windows=windows, steps=15)
    assert [len(step) for step in seen] == [2] * 15
    places = [place for step in seen for place in step]
    wanted = sorted({*range(17)} - {*held[:, 0].tolist()})
    assert sorted(places[:15]) == sorted(places[15:]) == wanted
    assert places[:15] != wanted
    assert places[:15] != places[15:]


@pytest.mark.parametrize(("count", "held"), [(2, 1), (15, 1), (16, 2), (64, 8), (500, 8)])
def test_some_windows_are_held_out(count: int, held: int) -> None:
    train, judged = learn._split(torch.arange(count)[:, None])
    assert len(judged) == held
    assert sorted([*train[:, 0].tolist(), *judged[:, 0].tolist()]) == list(range(count))


@pytest.mark.parametrize(("count", "words"), [(0, "there is none"), (1, "there is 1")])
def test_too_few_windows_are_refused(learning: Learning, count: int, words: str) -> None:
    with pytest.raises(UsageError, match=f"at least 2 windows .*, but {words}: "):
        learning(windows=learning.windows[:count])
    assert not learning.state_file.exists()


def test_a_loss_that_is_not_finite_is_refused(
    learning: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = RotatableModel.loss
    monkeypatch.setattr(RotatableModel, "loss", lambda *arguments: loss(*arguments) * torch.nan)
    with pytest.raises(RuntimeInputError, match="finite gradients"):
        learning()


# Stopping and going on.


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, steps: int) -> None:
        assert steps == 4
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_stopped_work_goes_on_to_the_same_result(learning: Learning, tmp_path: Path) -> None:
    whole, expected = learning(state_file=tmp_path / "whole")
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            learning(progress=stop_at(step))
    counted: list[tuple[int, int]] = []
    found, report = learning(progress=lambda *done: counted.append(done))
    assert counted == [(4, 4)]
    assert same(found, whole)
    assert replace(report, seconds_per_step=0) == replace(expected, seconds_per_step=0)
    finished, again = learning(progress=stop_at(4))  # nothing is left to do
    assert same(finished, whole)
    assert again == report
    assert {file.name for file in tmp_path.iterdir()} == {"whole", learning.state_file.name}


def test_work_stopped_while_writing_goes_on(
    learning: Learning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = learning(state_file=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learning(progress=stop_at(2))

    def half_written(tensors: Mapping[str, Tensor], path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeattn.transforms.rotations_file.save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            learning()
    found, _ = learning()
    assert same(found, whole)


@pytest.mark.parametrize(
    "changed",
    [
        {"made_from": {**MADE_FROM, "scheme": "another"}},
        {"steps": 5},
        {"objective": "cross-entropy"},
    ],
    ids=["recipe", "steps", "objective"],
)
def test_work_of_another_recipe_is_refused(learning: Learning, changed: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        learning(progress=stop_at(1))
    before = learning.state_file.read_bytes()
    with pytest.raises(UsageError, match="a resumed run with another recipe"):
        learning(**changed)
    assert learning.state_file.read_bytes() == before


def test_a_damaged_state_is_refused(learning: Learning) -> None:
    learning.state_file.write_bytes(b"none")
    with pytest.raises(UsageError, match=re.escape(str(learning.state_file))):
        learning()


# Rotations on disk.


@pytest.fixture
def rotations(llama: Model) -> Rotations:
    return random_rotations(llama.shape)


def test_rotations_survive_a_file(tmp_path: Path, llama: Model, rotations: Rotations) -> None:
    path, shape = tmp_path / "rotations.safetensors", llama.shape
    save_rotations(path, rotations, MADE_FROM)
    found = load_rotations(path, shape)
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


def test_r4_is_not_stored(tmp_path: Path, llama: Model) -> None:
    online = hadamard_rotations(llama.shape, online=True)
    save_rotations(tmp_path / "file", online, {})
    assert load_rotations(tmp_path / "file", llama.shape).down is None


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


def test_a_missing_file_is_refused(tmp_path: Path, llama: Model) -> None:
    refused(tmp_path / "none", llama.shape, "there is none")
    refused(tmp_path, llama.shape, "there is none")


@pytest.mark.parametrize("content", [b"", b"none", b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(tmp_path: Path, llama: Model, content: bytes) -> None:
    path = tmp_path / "rotations"
    path.write_bytes(content)
    refused(path, llama.shape, "a safetensors file .* does not read")


@pytest.mark.parametrize("name", ["residual", "heads"])
def test_a_file_without_rotations_is_refused(
    llama: Model, stored: tuple[Path, dict[str, Tensor]], name: str
) -> None:
    path, tensors = stored
    save_file({"weight" if key == name else key: value for key, value in tensors.items()}, path)
    refused(path, llama.shape, "it holds .*weight")


@pytest.mark.parametrize(
    "other", [{"hidden_size": 128}, {"head_dim": 32}, {"num_layers": 4}, {"num_layers": 2}], ids=str
)
def test_rotations_of_another_model_are_refused(
    llama: Model, stored: tuple[Path, dict[str, Tensor]], other: dict[str, int]
) -> None:
    path, tensors = stored
    save_file(tensors, path)
    refused(path, replace(llama.shape, **other), "rotations of this model .* they are of ")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "heads"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(3e-6, "orthogonal matrices .* off by 3e-06"), (torch.nan, "NaN"), (torch.inf, "NaN or inf")],
)
def test_matrices_that_do_not_rotate_are_refused(
    llama: Model, stored: tuple[Path, dict[str, Tensor]], name: str, damage: float, words: str
) -> None:
    path, tensors = stored
    tensors[name] *= 1 + damage / 2
    save_file(tensors, path)
    refused(path, llama.shape, words)


def test_rounding_to_fp32_is_no_damage(
    llama: Model, stored: tuple[Path, dict[str, Tensor]]
) -> None:
    path, tensors = stored
    save_file({name: value.float() for name, value in tensors.items()}, path)
    found = load_rotations(path, llama.shape)
    assert found.residual is not None
    assert orthogonality_error(found.residual) < 1e-6
