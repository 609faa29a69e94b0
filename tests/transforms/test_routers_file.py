"""Routers on disk: what is written comes back, and everything else is refused in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeattn.attention import HeadSparseRequest
from edgeattn.errors import UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.shape import ModelShape
from edgeattn.transforms.head_router import HeadRouter
from edgeattn.transforms.routers_file import asked_for, load_routers, save_routers
from edgeattn.transforms.sparsify import RoutedLayer, Routers

REQUEST = HeadSparseRequest(Fraction(3, 4))
MADE_FROM = {"checkpoint": "c0ffee", **asked_for(REQUEST), "text": "emma.txt"}


@pytest.fixture
def shape(tiny_checkpoint: Path) -> ModelShape:
    """3 layers of 4 heads, 64 channels."""
    return open_checkpoint(tiny_checkpoint).shape


@pytest.fixture
def routers() -> Routers:
    layers = {
        layer: RoutedLayer(HeadRouter(torch.randn(64, 4), torch.randn(4)), slots, 0.75 + layer / 8)
        for layer, slots in ((1, 3), (2, 2))
    }
    return Routers(layers, units=4, groups=False)


@pytest.fixture
def path(tmp_path: Path, routers: Routers) -> Path:
    save_routers(tmp_path / "routers.safetensors", routers, MADE_FROM)
    return tmp_path / "routers.safetensors"


def test_routers_survive_a_file(path: Path, shape: ModelShape, routers: Routers) -> None:
    found, made_from = load_routers(path, shape, "c0ffee", REQUEST)
    assert made_from == MADE_FROM
    assert (found.units, found.groups) == (4, False)
    assert list(found.layers) == [1, 2]
    for layer, routed in routers.layers.items():
        again = found.layers[layer]
        assert (again.slots, again.recall) == (routed.slots, routed.recall)
        assert torch.equal(again.router.weight, routed.router.weight)
        assert torch.equal(again.router.bias, routed.router.bias)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_says_what_it_is_for(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["routers"])
    assert about["version"] == 1
    assert about["made_from"] == {
        "checkpoint": "c0ffee",
        "density": "3/4",
        "unit": "heads",
        "layers": "uniform",
        "text": "emma.txt",
    }
    assert about["layers"]["2"] == {"slots": 2, "recall": 1.0}


def refused(
    path: Path,
    shape: ModelShape,
    words: str,
    request: HeadSparseRequest = REQUEST,
    checkpoint: str = "c0ffee",
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_routers(path, shape, checkpoint, request)
    assert str(path) in str(caught.value)
    assert re.fullmatch(r"expected .+, but .+: pass routers that .+", str(caught.value))


def test_a_missing_file_is_refused(tmp_path: Path, shape: ModelShape) -> None:
    refused(tmp_path / "none", shape, "there is none")
    refused(tmp_path, shape, "there is none")


def test_routers_of_another_checkpoint_are_refused(path: Path, shape: ModelShape) -> None:
    refused(path, shape, "they are of another checkpoint", checkpoint="decade")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"density": Fraction(1, 2)}, "density=1/2 .* they are of density=3/4"),
        ({"unit": "groups"}, "unit=groups .* they are of unit=heads"),
        ({"layers": "importance"}, "layers=importance .* they are of layers=uniform"),
    ],
)
def test_routers_for_another_request_are_refused(
    path: Path, shape: ModelShape, other: dict[str, Any], words: str
) -> None:
    refused(path, shape, words, replace(REQUEST, **other))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden_size": 128}, r"of \[128, 4\] in float32, but it is float32 of \[64, 4\]"),
        ({"num_heads": 8}, r"of \[64, 8\] in float32, but it is float32 of \[64, 4\]"),
        ({"num_layers": 2}, "routers of 2 layers .* in layer 2"),
    ],
)
def test_routers_of_another_shape_are_refused(
    path: Path, shape: ModelShape, other: dict[str, int], words: str
) -> None:
    """The same fingerprint: a file that was tampered with."""
    refused(path, replace(shape, **other), words)  # type: ignore[arg-type]


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "another version": (lambda about, tensors: about.update(version=2), "version 1 .* it is of 2"),
    "no version": (lambda about, tensors: about.pop("version"), "does not say"),
    "no origin": (lambda about, tensors: about.pop("made_from"), "does not say"),
    "layers by no number": (lambda about, tensors: about.update(layers={"x": {}}), "does not say"),
    "layers in a list": (lambda about, tensors: about.update(layers=[1]), "does not say"),
    "a layer without facts": (lambda about, tensors: about["layers"].update({"1": 3}), "does not"),
    "no slots": (lambda about, tensors: about["layers"]["1"].pop("slots"), "None slots"),
    "0 slots": (lambda about, tensors: about["layers"]["1"].update(slots=0), "0 slots in layer 1"),
    "5 slots": (lambda about, tensors: about["layers"]["1"].update(slots=5), "5 slots in layer 1"),
    "active": (
        lambda about, tensors: about["layers"]["1"].update(active=[0.5]),
        r"shares of \d+ heads of layer 1 .* they are \[0.5\]",
    ),
    "recall": (lambda about, tensors: about["layers"]["1"].update(recall=2), "recall .* it is 2"),
    "a router missing": (lambda about, tensors: about["layers"].pop("1"), "0 are .* 2 unknown"),
    "a bias missing": (lambda about, tensors: tensors.pop("layers.1.router_bias"), "1 are missing"),
    "half": (
        lambda about, tensors: tensors.update(
            {"layers.1.router_bias": tensors["layers.1.router_bias"].half()}
        ),
        "it is float16",
    ),
    "NaN": (lambda about, tensors: tensors["layers.2.router_weight"][3].fill_(torch.nan), "NaN"),
    "infinity": (lambda about, tensors: tensors["layers.2.router_bias"].fill_(torch.inf), "infin"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused(path: Path, shape: ModelShape, name: str) -> None:
    change, words = CHANGES[name]
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["routers"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"routers": json.dumps(about)})
    load_routers(path, shape, "c0ffee", REQUEST)
    change(about, tensors)
    save_file(tensors, path, metadata={"routers": json.dumps(about)})
    refused(path, shape, words)


@pytest.mark.parametrize("noted", [None, {}, {"routers": "{"}, {"routers": "[]"}, {"routers": "1"}])
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, shape: ModelShape, noted: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layers.1.router_bias": torch.zeros(4)}, path, metadata=noted)
    refused(path, shape, "does not say that it holds any")


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_is_refused_or_harmless(path: Path, shape: ModelShape, data: st.DataObject) -> None:
    """Bytes changed or cut off give a sentence, or routers of the right form: never a traceback."""
    content = bytearray(path.read_bytes())
    end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    places = data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4))
    for place in places:
        content[place] = data.draw(st.integers(0, 255))
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content[:end])
    try:
        found, _ = load_routers(damaged, shape, "c0ffee", REQUEST)
    except UsageError:
        refused(damaged, shape, re.escape(str(damaged)))
        return
    for routed in found.layers.values():
        assert routed.router.weight.shape == (64, 4)
        assert 1 <= routed.slots <= 4
