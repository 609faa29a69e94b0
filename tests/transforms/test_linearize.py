"""LION-isation brings an encoder nearer to its original, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from encoders import save_encoder
from safetensors import safe_open
from torch import Tensor

from edgeattn.attention import LionRequest
from edgeattn.errors import UsageError
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.encoder_model import EncoderModel, encoder_of, load_encoder
from edgeattn.transforms import descent
from edgeattn.transforms import linearize as module
from edgeattn.transforms.linearize import (
    LinearizeReport,
    Material,
    agreement,
    linearize,
    with_lion,
)

MADE_FROM = {"text": "a novel"}


def random_encoder(name: str, path: Path) -> EncoderModel:
    save_encoder(name, path / name)
    checkpoint = open_encoder(path / name)
    return encoder_of(checkpoint.shape, checkpoint.weights)


def material_of(model: EncoderModel) -> Material:
    torch.manual_seed(3)
    if hasattr(model.shape.input, "patch"):
        return Material(torch.randn(24, 3, 32, 32))
    return Material(torch.randint(4, 272, (24, 32)), (1,), (2, 3))


def run(
    model: EncoderModel, variant: Any, file: Path, steps: int = 40, **options: Any
) -> tuple[EncoderModel, LinearizeReport]:
    return linearize(
        model,
        LionRequest(variant),
        material_of(model),
        steps=steps,
        state_file=file,
        made_from=MADE_FROM,
        learning_rate=3e-3,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "variant"),
    [("bert", "d"), ("eurobert", "s"), ("vit-classifier", "lit"), ("bert-classifier", "s")],
)
def test_it_comes_nearer_to_the_original(tmp_path: Path, name: str, variant: str) -> None:
    model, seen = random_encoder(name, tmp_path), list[tuple[int, int]]()
    trained, report = run(
        model, variant, tmp_path / "state", progress=lambda *done: seen.append(done)
    )
    assert seen == [(step, 40) for step in range(1, 41)]
    assert report.after.cosine > report.before.cosine
    assert report.after.error < 0.98 * report.before.error
    assert len(report.before.layers) == 3
    assert sum(report.losses[16:20]) < sum(report.losses[:4])
    assert (report.after.same_class is None) == (not name.endswith("classifier"))
    assert set(encoder_parameters(trained.shape)) >= set(encoder_parameters(model.shape))
    for parameter in encoder_parameters(trained.shape):
        start = with_lion(model, LionRequest(variant)).weights.read(parameter)  # type: ignore[arg-type]
        found = trained.weights.read(parameter)
        assert isinstance(start, Tensor) and isinstance(found, Tensor)  # noqa: PT018
        changed = not torch.equal(start.float(), found)
        assert changed == parameter.startswith("layers."), parameter


def test_the_layers_learn_alone_first(tmp_path: Path) -> None:
    """With one step of two the loss is of layers, which no layer before them disturbs."""
    model = random_encoder("bert", tmp_path)
    student = load_encoder(
        with_lion(model, LionRequest("d")), weight_dtype=torch.float32, compute_dtype=torch.float32
    )
    teacher = load_encoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    inputs = material_of(model).inputs(material_of(model).rows[:2], 4, model.shape.input)
    with torch.no_grad():
        expected = teacher(*inputs)
        alone = module._layer_losses(student, expected, inputs)
        for parameter in student.layers[0].parameters():
            parameter.mul_(2)
        found = module._layer_losses(student, expected, inputs)
    assert found[0] != alone[0]
    assert found[1:] == alone[1:]


def test_texts_are_framed_and_cut() -> None:
    material = Material(torch.arange(16).view(1, 16), (100,), (101, 102))
    read = type("Read", (), {"names": ("input_ids", "attention_mask")})()
    ids, mask = material.inputs(material.rows, 4, read)
    assert ids.shape == mask.shape == (4, 7)
    assert ids[1].tolist() == [100, 4, 5, 6, 7, 101, 102]
    assert mask.all()


def test_an_encoder_agrees_with_itself_and_not_with_another(tmp_path: Path) -> None:
    model = random_encoder("vit-classifier", tmp_path)
    other = with_lion(model, LionRequest("lit"))
    itself = agreement(model, model, material_of(model))
    assert itself.error == 0
    assert itself.layers == (0, 0, 0)
    assert itself.same_class == 1
    assert itself.cosine == pytest.approx(1)
    assert agreement(model, other, material_of(model)).error > 0.05


def test_decays_reach_near_and_far(tmp_path: Path) -> None:
    for variant in ("d", "s"):
        model = with_lion(random_encoder("bert", tmp_path), LionRequest(variant))  # type: ignore[arg-type]
        encoder = load_encoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
        attention = next(encoder.blocks()).self_attn
        decay = attention._log_decay(torch.randn(1, 2, 64)).exp()
        assert decay[0, :, 0].tolist() == pytest.approx([1 - 1 / 8, 1 - 1 / 512], abs=1e-6)


def test_stopped_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_SAVE_SECONDS", 0.0)
    model = random_encoder("eurobert", tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        run(model, "s", stopped, 6, progress=stop)
    with pytest.raises(UsageError, match="another model, recipe or text"):
        run(model, "s", stopped, 7)
    done = list[int]()
    _, first = run(model, "s", stopped, 6, progress=lambda step, _: done.append(step))
    _, second = run(model, "s", whole, 6)
    assert done == [4, 5, 6]
    assert first.losses == second.losses
    assert first.after == second.after
    for name, value in _tensors(whole).items():
        assert torch.equal(value, _tensors(stopped)[name]), name


def _tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
