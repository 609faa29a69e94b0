"""A decoder over several devices computes the same, and every tensor is where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch

from edgeattn.errors import MissingDependencyError
from edgeattn.models.decoder import Decoder
from edgeattn.models.hub import open_model
from edgeattn.models.model import load_decoder, model_of
from edgeattn.transforms import spread as module
from edgeattn.transforms.spread import spread, training_devices

CPU, META = torch.device("cpu"), torch.device("meta")
GPUS = [torch.device("cuda", i) for i in range(3)]


def _loaded(stories260k: Path) -> Decoder:
    fp32 = torch.float32
    return load_decoder(model_of(open_model(stories260k)), weight_dtype=fp32, compute_dtype=fp32)


def _logits(decoder: Decoder, device: torch.device) -> torch.Tensor:
    ids = torch.arange(1, 13, device=device).view(2, 6)
    places = torch.arange(6, device=device).expand(2, -1)
    found: torch.Tensor = decoder(ids, torch.ones_like(ids), places, decoder.empty_cache(2)).logits
    return found


def test_the_same_logits_and_gradients(stories260k: Path) -> None:
    """One device stands for all, as this machine may have no GPU."""
    plain, parts = _loaded(stories260k), spread(_loaded(stories260k), [CPU, CPU, CPU])
    for decoder in (plain, parts):
        decoder.layers.requires_grad_()
        _logits(decoder, CPU).square().mean().backward()
    assert torch.equal(_logits(plain, CPU), _logits(parts, CPU))
    trained = dict(parts.named_parameters())
    for name, parameter in plain.named_parameters():
        gradients = parameter.grad, trained[name].grad
        assert (gradients[0] is None) == (not name.startswith("layers."))
        assert gradients[0] is None or torch.equal(*gradients), name


def test_every_tensor_is_where_it_is_read(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: torch refuses to compute across it and the CPU, too."""
    to = torch.Tensor.to

    def from_meta(tensor: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        """Zeros where the CPU wants numbers, which the meta device has none of."""
        source = torch.zeros_like(tensor, device="cpu") if CPU in where else tensor
        return to(tensor if tensor.device == CPU else source, *where, **options)

    monkeypatch.setattr(torch.Tensor, "to", from_meta)
    shape = model_of(open_model(stories260k)).shape
    decoder = spread(Decoder(shape), [CPU, META, CPU])
    blocks = [{p.device for p in block.parameters()} for block in decoder.layers]
    assert blocks == [{CPU}, {CPU}, {META}, {META}, {CPU}]
    assert {p.device for n, p in decoder.named_parameters() if "layers." not in n} == {CPU}
    assert _logits(decoder, CPU).device == CPU


def test_one_device_needs_no_hooks(stories260k: Path) -> None:
    decoder = spread(_loaded(stories260k), [CPU])
    assert not hasattr(decoder, "_hf_hook")


def test_the_devices_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert training_devices() == [CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert training_devices() == GPUS
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"3 GPUs, .*CUDA_VISIBLE_DEVICES=0"):
        training_devices()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert training_devices() == GPUS[:1]
