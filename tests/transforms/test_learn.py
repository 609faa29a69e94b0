"""Learning of rotations: what it gains, what it never sees, and stopping and going on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from rotated_loss import loss_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from wrapped_weights import with_outlier_channels

from edgeattn.calibration.windows import split_windows, token_windows
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, model_of
from edgeattn.models.stream import Head, final_hidden
from edgeattn.quant.scheme import Scheme, parse_scheme
from edgeattn.quant.stiefel import orthogonality_error
from edgeattn.shape import ModelShape
from edgeattn.text_file import read_text
from edgeattn.transforms import learn
from edgeattn.transforms.learn import LearnReport, learn_rotations
from edgeattn.transforms.rotatable import RotatableModel, merge_weight
from edgeattn.transforms.rotate import Rotations, hadamard_rotations, rotate

INT4 = parse_scheme("w4a16-spinquant-learned:group=32")
INT4_STORIES = parse_scheme("w4a16-spinquant-learned:group=32,down_proj=w8")
INT8 = parse_scheme("w8a8-spinquant")
MADE_FROM = {"checkpoint": "c0ffee", "scheme": INT4.label}


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


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


def random_rotations(shape: ModelShape) -> Rotations:
    heads = tuple(orthogonal(shape.head_dim) for _ in range(shape.num_layers))
    return Rotations(orthogonal(shape.hidden_size), heads)


def identity(shape: ModelShape) -> Rotations:
    heads = tuple(torch.eye(shape.head_dim).double() for _ in range(shape.num_layers))
    return Rotations(torch.eye(shape.hidden_size).double(), heads)


def same(one: Rotations, other: Rotations) -> bool:
    assert one.residual is not None
    assert other.residual is not None
    pairs = zip((one.residual, *one.heads), (other.residual, *other.heads), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


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
        objective="cross-entropy",
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
    held = split_windows(novel)[1]
    again = loss_of(stories, INT4_STORIES, rotations, held, report.objective)
    assert report.loss_after == pytest.approx(again)
    json.dumps(report.to_dict())


def test_learned_rotations_merge_without_a_trace(
    stories: Model, novel: Tensor, learned: tuple[Rotations, LearnReport]
) -> None:
    """In the rotated basis: logits are the same whatever is merged."""
    rotations, report = learned
    assert rotations.orthogonality_error() == report.orthogonality_error < 1e-12
    assert rotations.residual is not None
    network, ids = RotatableModel(stories, None), novel[:2]
    with torch.no_grad():
        parametrised = network._final_hidden(rotations.residual.float(), rotations.heads, ids)
    merged = rotate(stories, rotations)
    found = final_hidden(merged, ids)
    torch.testing.assert_close(found, parametrised, atol=1e-4, rtol=0)
    others = hadamard_rotations(stories.shape, online=False)
    with torch.no_grad():
        other = network._final_hidden(others.residual.float(), others.heads, ids)  # type: ignore[union-attr]
    assert (found - other).abs().max() > 0.1
    for layer in (0, 4):
        name = f"layers.{layer}.self_attn.v_proj.weight"
        folded, value = (m.weights.read(name) for m in (rotate(stories, Rotations()), merged))
        assert isinstance(folded, Tensor)
        assert isinstance(value, Tensor)
        expected = merge_weight(
            "self_attn.v_proj",
            folded.double(),
            rotations.residual,
            rotations.heads[layer],
            stories.shape,
        )
        torch.testing.assert_close(value, expected.float(), atol=1e-5, rtol=0)
    logits = Head(merged).logits(found)
    original = Head(stories).logits(final_hidden(stories, ids))
    torch.testing.assert_close(logits, original, atol=1e-4, rtol=0)


def test_every_step_stays_orthogonal(stories: Model, novel: Tensor, tmp_path: Path) -> None:
    """The matrices as they are between steps, not only those that are returned."""
    learning, errors = Learning(stories, novel, tmp_path / "state"), []

    def measure(done: int, steps: int) -> None:
        state = load_file(tmp_path / "state")
        matrices = (state["residual"], *state["heads"])
        errors.append(max(orthogonality_error(matrix) for matrix in matrices))

    learning(scheme=INT4_STORIES, steps=3, progress=measure)
    assert len(errors) == 3
    assert max(errors) < 1e-6


@pytest.fixture
def planted(llama: Model) -> Model:
    return with_outlier_channels(llama)


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


@pytest.fixture
def always_better(monkeypatch: pytest.MonkeyPatch, learning: Learning) -> None:
    """What is learned is returned, whether it does better on random text or not."""
    starts = [hadamard_rotations(learning.model.shape, online=online) for online in (False, True)]

    def judge(network: RotatableModel, rotations: Rotations, *rest: Any) -> float:
        return 2.0 if any(same(rotations, start) for start in starts) else 1.0

    monkeypatch.setattr(learn, "_judge", judge)


@pytest.mark.usefixtures("always_better")
def test_r4_stays_as_it_was(learning: Learning) -> None:
    start = hadamard_rotations(learning.model.shape, online=True)
    found, report = learning(scheme=INT8, start=start, steps=1)
    assert report.learned
    assert not same(found, start)
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
    _, held = split_windows(windows)
    learning(windows=windows, steps=15)
    assert [len(step) for step in seen] == [2] * 15
    places = [place for step in seen for place in step]
    wanted = sorted({*range(17)} - {*held[:, 0].tolist()})
    assert sorted(places[:15]) == sorted(places[15:]) == wanted
    assert places[:15] != wanted
    assert places[:15] != places[15:]


@pytest.mark.parametrize(("count", "held"), [(2, 1), (15, 1), (16, 2), (64, 8), (500, 8)])
def test_some_windows_are_held_out(count: int, held: int) -> None:
    train, judged = split_windows(torch.arange(count)[:, None])
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


def stop_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, steps: int) -> None:
        assert steps == 4
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.usefixtures("always_better")
def test_stopped_work_goes_on_to_the_same_result(learning: Learning, tmp_path: Path) -> None:
    whole, expected = learning(state_file=tmp_path / "whole")
    assert expected.learned
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


@pytest.mark.usefixtures("always_better")
def test_work_stopped_while_writing_goes_on(
    learning: Learning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = learning(state_file=tmp_path / "whole")
    assert report.learned
    with pytest.raises(KeyboardInterrupt):
        learning(progress=stop_at(2))

    def half_written(tensors: Mapping[str, Tensor], path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeattn.calibration.work.save_file", half_written)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"none", "does not read"),
        (None, "it lacks heads and residual"),
        ({}, "how far learning came"),
        ({"about": "{"}, "how far learning came"),
        ({"about": "[]"}, "how far learning came"),
        ({"about": '{"losses": []}'}, "how far learning came"),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(
    learning: Learning, content: bytes | dict[str, str] | None, words: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learning(progress=stop_at(1))
    file = learning.state_file
    with safe_open(file, "pt") as state:
        made_from = state.metadata()["made_from"]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        save_file({"weight": torch.zeros(1)}, file)
    else:
        save_file(load_file(file), file, metadata={"made_from": made_from, **content})
    with pytest.raises(UsageError, match=words) as caught:
        learning()
    assert str(file) in str(caught.value)
    todo = ": delete the file, and the same command learns from the beginning"
    assert str(caught.value).endswith(todo)


def test_a_gpu_that_is_too_small_is_a_sentence(
    learning: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = RotatableModel.loss, []

    def full(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments)

    monkeypatch.setattr(RotatableModel, "loss", full)
    with pytest.raises(RuntimeInputError, match="CUDA_VISIBLE_DEVICES= to learn on the CPU"):
        learning()
    assert learning.state_file.exists()


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_does(stories: Model, novel: Tensor, tmp_path: Path) -> None:
    reports = {}
    for device in ("cpu", "cuda"):
        learning = Learning(stories, novel, tmp_path / device)
        rotations, reports[device] = learning(scheme=INT4_STORIES, steps=6, device=device)
        assert rotations.residual is not None
        assert rotations.residual.device.type == "cpu"
    assert reports["cuda"].losses[0] == pytest.approx(reports["cpu"].losses[0], rel=1e-3)
    # Each rounding that falls otherwise changes all that follows.
    assert reports["cuda"].losses == pytest.approx(reports["cpu"].losses, rel=0.1)
    assert reports["cuda"].loss_before == pytest.approx(reports["cpu"].loss_before, rel=1e-3)
    assert reports["cuda"].orthogonality_error < 1e-12
