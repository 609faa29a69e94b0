"""Recovery training pays a loss down, goes on where it was stopped, and says what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors import safe_open
from torch import Tensor
from wrapped_weights import changed

from edgeattn.attention import GroupQueryRequest
from edgeattn.calibration.windows import split_windows
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.models.families import FINAL_NORM, parameter_names
from edgeattn.models.hub import open_model
from edgeattn.models.model import Model, load_decoder, model_of
from edgeattn.models.stream import Prediction
from edgeattn.planner.group_query import regrouped_shape
from edgeattn.transforms import descent as module
from edgeattn.transforms.descent import rate_share, step_rows
from edgeattn.transforms.recover import recover
from edgeattn.transforms.regroup import regroup, regroup_on_text

MADE_FROM = {"text": "a novel"}


@pytest.fixture(scope="module")
def original(stories260k: Path) -> Model:
    model = model_of(open_model(stories260k))
    return replace(model, shape=model.shape.within(model.shape.max_context))


@pytest.fixture(scope="module")
def windows(original: Model, shared_dir: Path) -> Tensor:
    from edgeattn.calibration.windows import token_windows

    checkpoint = shared_dir / "models" / "stories260k"
    return token_windows(
        (shared_dir / "data" / "austen" / "emma.txt").read_text("utf-8"),
        (checkpoint / "tokenizer.json").read_text("utf-8"),
        windows=24,
        length=64,
        vocab_size=original.shape.vocab_size,
    )


@pytest.fixture(scope="module")
def merged(original: Model, windows: Tensor) -> Model:
    shape = regrouped_shape(original.shape, GroupQueryRequest(kv_heads=1))
    return regroup(original, regroup_on_text(original, windows, shape)[0])


def test_the_loss_is_paid_down(
    original: Model, merged: Model, windows: Tensor, tmp_path: Path
) -> None:
    file, seen = tmp_path / "state", list[tuple[int, int]]()
    trained, report = recover(
        original,
        merged,
        windows,
        steps=12,
        state_file=file,
        made_from=MADE_FROM,
        progress=lambda *done: seen.append(done),
    )
    assert report.learned
    assert seen == [(step, 12) for step in range(1, 13)]
    assert sum(report.losses[-3:]) < 0.7 * sum(report.losses[:3])
    lost = report.perplexity_before - report.perplexity_original
    assert lost > 0
    assert report.perplexity_after - report.perplexity_original < 0.7 * lost
    held = split_windows(windows)[1]
    wanted, *judged = (Prediction(m, held) for m in (original, merged, trained))
    divergences = [found.divergence(wanted) for found in judged]
    assert [report.divergence_before, report.divergence_after] == divergences
    assert divergences[1] < 0.7 * divergences[0]
    assert (
        f"kept, as on text held out the divergence from the original fell: {divergences[0]:.4g}"
        in report.verdict
    )
    assert report.tokens == 12 * 4 * 64
    assert trained.shape == merged.shape
    with safe_open(file, "pt") as held:
        names = {name.removeprefix("weight/") for name in held.keys()}  # noqa: SIM118
    assert names == {n for n in parameter_names(merged.shape) if n.startswith("layers.")}
    for name in parameter_names(merged.shape):
        same = torch.equal(_read(trained, name), _read(merged, name).float())
        assert same != name.startswith("layers."), name


def _read(model: Model, name: str) -> Tensor:
    value = model.weights.read(name)
    assert isinstance(value, Tensor)
    return value


def test_stopped_training_goes_on_as_if_it_had_not_been(
    original: Model,
    merged: Model,
    windows: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    def run(file: Path, progress: Callable[[int, int], None] | None = None, steps: int = 5) -> None:
        recover(
            original,
            merged,
            windows,
            steps=steps,
            state_file=file,
            made_from=MADE_FROM,
            progress=progress,
        )

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop)
    with pytest.raises(UsageError, match="another model, recipe or text"):
        run(stopped, steps=6)
    done = list[int]()
    run(stopped, lambda step, _: done.append(step))
    assert done == [4, 5]
    run(whole)
    assert _tensors(stopped).keys() == _tensors(whole).keys()
    for name, value in _tensors(whole).items():
        assert torch.equal(value, _tensors(stopped)[name]), name


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def test_a_damaged_state_is_refused(
    original: Model, merged: Model, windows: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(UsageError, match="does not read") as caught:
        recover(original, merged, windows, steps=2, state_file=file, made_from=MADE_FROM)
    assert "\n" not in str(caught.value)


def test_training_that_does_no_good_is_discarded_with_the_reason(
    original: Model, windows: Tensor, tmp_path: Path
) -> None:
    """Nothing is lost, so that a wild step can only harm."""
    found, report = recover(
        original,
        original,
        windows,
        steps=2,
        state_file=tmp_path / "state",
        made_from=MADE_FROM,
        learning_rate=0.5,
    )
    assert not report.learned
    assert found is original
    assert report.perplexity_before == report.perplexity_original < report.perplexity_after
    assert report.divergence_before == 0 < report.divergence_after
    assert "discarded" in report.verdict
    assert report.verdict.endswith(
        f": 0 nats per token before, {report.divergence_after:.4g} after"
    )


def test_divergence_decides_and_not_perplexity(
    original: Model, windows: Tensor, tmp_path: Path
) -> None:
    """What learns to be as sure of itself as another reads worse, and has learned all the same."""
    sure = changed(original, lambda name, value: value * 2 if name == FINAL_NORM else value)
    file = tmp_path / "state"
    found, report = recover(sure, original, windows, steps=6, state_file=file, made_from=MADE_FROM)
    assert report.perplexity_after > report.perplexity_before
    assert report.divergence_after < report.divergence_before
    assert report.learned
    assert found is not original


def test_a_divergence_that_is_no_number_is_refused(
    original: Model, windows: Tensor, tmp_path: Path
) -> None:
    huge = changed(original, lambda n, v: v * 1e38 if n.endswith("up_proj.weight") else v)
    with pytest.raises(RuntimeInputError, match="at step 1"):
        recover(
            original,
            huge,
            windows,
            steps=2,
            state_file=tmp_path / "state",
            made_from=MADE_FROM,
        )
    assert not (tmp_path / "state").exists()


def test_the_loss_is_the_divergence_from_the_original(
    original: Model, merged: Model, windows: Tensor, tmp_path: Path
) -> None:
    """KL(original || trained), by its definition; the other way round is another number."""
    asked = {"state_file": tmp_path / "state", "made_from": MADE_FROM}
    _, report = recover(original, merged, windows, steps=1, **asked)
    train = split_windows(windows)[0]
    ids = train[step_rows(len(train), 4, 1)[0]]
    places = torch.arange(ids.shape[1]).expand_as(ids)
    wide = {"weight_dtype": torch.float32, "compute_dtype": torch.float64}
    found = []
    for decoder in (load_decoder(model, **wide) for model in (original, merged)):
        with torch.inference_mode():
            past = decoder.empty_cache(len(ids))
            logits = decoder(ids, torch.ones_like(ids), places, past).logits[:, :-1]
        found.append(logits.log_softmax(-1))
    p, q = found
    wanted = float((p.exp() * (p - q)).sum(-1).mean())
    reverse = float((q.exp() * (q - p)).sum(-1).mean())
    assert report.losses == pytest.approx((wanted,), rel=1e-3)
    assert abs(reverse - wanted) > 0.01 * wanted


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [rate_share(step, 200) for step in range(200)]
    assert shares[0] == 1 / 20
    assert max(shares) == shares[19] == 1
    assert shares[20:] == sorted(shares[20:], reverse=True)
    assert 0 < shares[-1] < 1e-3
    assert rate_share(0, 1) == 1


def test_every_window_is_seen_before_one_is_seen_again() -> None:
    rows = step_rows(10, 4, 5)
    assert rows.shape == (5, 4)
    assert sorted(rows.flatten()[:10].tolist()) == list(range(10))


def test_the_state_says_what_it_was_made_from(
    original: Model, merged: Model, windows: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "state"
    recover(original, merged, windows, steps=1, state_file=file, made_from=MADE_FROM)
    with safe_open(file, "pt") as held:
        made_from = json.loads(held.metadata()["made_from"])
    assert made_from == {**MADE_FROM, "steps": 1, "learning_rate": module.LEARNING_RATE}
