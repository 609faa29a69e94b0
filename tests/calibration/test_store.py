"""Finished layers on disk: whole or not there, and never those of other work."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from edgeattn.calibration import store as module
from edgeattn.calibration.store import LayerStore, StoredLinear
from edgeattn.calibration.work import WorkFolder
from edgeattn.errors import BundleError, UsageError
from edgeattn.quant.affine import quantize_symmetric
from edgeattn.quant.scheme import WeightFormat

MADE_FROM = {"checkpoint": "abc", "scheme": "w8a8", "windows": 4, "dtype": "fp16"}
FORMATS = {
    "self_attn.q_proj": (WeightFormat(4, 32), None),
    "self_attn.o_proj": (WeightFormat(8), 0.0123456789),
    "mlp.down_proj": (WeightFormat(4), 1e-6),
}


def linears(dtype: torch.dtype = torch.float32) -> dict[str, StoredLinear]:
    return {
        name: StoredLinear(
            quantize_symmetric(torch.randn(6, 64), format, clip="mse", scale_dtype=dtype), scale
        )
        for name, (format, scale) in FORMATS.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "work", MADE_FROM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back_bit_for_bit(
    store: LayerStore, tmp_path: Path, dtype: torch.dtype
) -> None:
    written = {layer: linears(dtype) for layer in (0, 3)}
    for layer, content in written.items():
        store.write(layer, content)
    again = LayerStore(tmp_path / "work", dict(reversed(MADE_FROM.items())))
    for layer, content in written.items():
        found = again.read(layer)
        assert list(found) == list(content)
        for name, linear in content.items():
            assert torch.equal(found[name].weight.qdata, linear.weight.qdata)
            assert torch.equal(found[name].weight.scale, linear.weight.scale)
            assert found[name].weight.scale.dtype == dtype
            assert found[name].weight.format == linear.weight.format
            assert found[name].input_scale == linear.input_scale


def test_transposed_and_sliced_tensors_are_stored_as_they_look(store: LayerStore) -> None:
    whole = quantize_symmetric(torch.randn(8, 64), WeightFormat(8), clip="max")
    part = module.QuantizedTensor(whole.qdata[::2], whole.scale[::2], whole.format)
    store.write(0, {"mlp.down_proj": StoredLinear(part)})
    assert torch.equal(store.read(0)["mlp.down_proj"].weight.qdata, whole.qdata[::2])


def test_layers_are_there_when_they_are_written(store: LayerStore) -> None:
    assert not store.has(0)
    store.write(1, linears())
    assert [store.has(layer) for layer in range(3)] == [False, True, False]
    store.write(0, linears())
    assert [store.has(layer) for layer in range(3)] == [True, True, False]


def test_weights_and_formats_by_the_names_of_parameters(store: LayerStore) -> None:
    content = linears()
    store.write(2, content)
    for name, linear in content.items():
        weight = store.weight(f"layers.2.{name}.weight")
        assert weight is not None
        assert torch.equal(weight.qdata, linear.weight.qdata)
        assert store.format(f"layers.2.{name}.weight") == linear.weight.format
    scales = {name: scale for name, (_, scale) in FORMATS.items() if scale is not None}
    assert store.input_scales(2) == scales


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
        "layers.2.input_layernorm.weight",
        "layers.2.self_attn.q_norm.weight",
        "layers.2.self_attn.q_proj.bias",
        "layers.2.self_attn.k_proj.weight",  # not among those written
    ],
)
def test_other_parameters_are_not_in_it(store: LayerStore, name: str) -> None:
    store.write(2, linears())
    assert store.weight(name) is None
    assert store.format(name) is None


@pytest.mark.parametrize(
    "other",
    [
        {**MADE_FROM, "scheme": "w8a8:keep=0"},
        {**MADE_FROM, "windows": 5},
        {**MADE_FROM, "more": None},
        {"checkpoint": "abc"},
        {},
    ],
)
def test_layers_made_from_something_else_are_refused(
    store: LayerStore, tmp_path: Path, other: dict[str, Any]
) -> None:
    store.write(0, linears())
    before = snapshot(tmp_path / "work")
    with pytest.raises(UsageError, match="delete the folder") as caught:
        LayerStore(tmp_path / "work", other)
    assert str(tmp_path / "work") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path / "work") == before, "nothing is lost by a refusal"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_layer_is_refused(store: LayerStore, tmp_path: Path, left: int) -> None:
    store.write(0, linears())
    (file,) = (tmp_path / "work").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:left])
    calls = (
        lambda: store.read(0),
        lambda: store.input_scales(0),
        lambda: store.cache_scales(0),
        lambda: store.weight("layers.0.mlp.down_proj.weight"),
        lambda: store.format("layers.0.mlp.down_proj.weight"),
    )
    for call in calls:
        with pytest.raises(UsageError, match="delete the folder and start again") as caught:
            call()
        assert file.name in str(caught.value)


def test_a_foreign_file_is_refused(store: LayerStore, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "work").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "work" / "layer-0000.safetensors")
    with pytest.raises(UsageError, match="does not read"):
        store.read(0)


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file may grow beyond some bytes; the system refuses more as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(
    store: LayerStore, tmp_path: Path
) -> None:
    first = linears()
    store.write(0, first)
    before = snapshot(tmp_path / "work")
    for layer in (0, 1):
        with full_disk(500), pytest.raises(BundleError, match="the disk refused") as caught:
            store.write(layer, linears())
        assert re.fullmatch(
            r"expected to write .*layer-000\d.safetensors, but the disk refused .*: "
            "free some space or choose another folder with -o",
            str(caught.value),
        )
    with full_disk(500), pytest.raises(BundleError, match=r"the disk refused .*too large"):
        store.remembered("sensitivity", lambda: ["a"] * 1000)
    assert snapshot(tmp_path / "work") == before, "the old one is whole"
    assert not store.has(1)
    again = LayerStore(tmp_path / "work", MADE_FROM)
    second = linears()
    again.write(1, second)
    found = again.read(1)["self_attn.o_proj"].weight
    assert torch.equal(found.qdata, second["self_attn.o_proj"].weight.qdata)


def test_a_write_that_is_interrupted_leaves_nothing(
    store: LayerStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(0, linears())
    before = snapshot(tmp_path / "work")

    def interrupted(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeattn.calibration.work.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, linears())
    assert snapshot(tmp_path / "work") == before


def test_nothing_is_written_before_a_layer_is(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "work", MADE_FROM, "rotated")

    def fails() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.remembered("sensitivity", fails)
    assert list(tmp_path.iterdir()) == []


def test_several_sets_of_layers_belong_to_one_command(tmp_path: Path) -> None:
    parts = {name: LayerStore(tmp_path / "work", MADE_FROM, name) for name in ("rotated", "plain")}
    parts["rotated"].write(0, linears())
    assert not parts["plain"].has(0)
    assert sorted(snapshot(tmp_path / "work")) == ["made-from.json"]
    for part in ("", "plain", "layers"):
        with pytest.raises(UsageError, match="another model, recipe or calibration text"):
            LayerStore(tmp_path / "work", {**MADE_FROM, "windows": 5}, part)


def test_a_folder_in_which_nothing_was_finished_is_free_for_any_command(tmp_path: Path) -> None:
    """As a run leaves it that was killed."""
    WorkFolder(tmp_path / "work", {**MADE_FROM, "windows": 5}).begin()
    (tmp_path / "work" / "lock").touch()
    (tmp_path / "work" / "layer-0000.safetensors.partial").touch()
    LayerStore(tmp_path / "work", MADE_FROM).write(0, linears())
    assert LayerStore(tmp_path / "work", MADE_FROM).has(0)
    with pytest.raises(UsageError, match="another model"):
        LayerStore(tmp_path / "work", {**MADE_FROM, "windows": 5})


def test_a_result_is_made_once_and_remembered(store: LayerStore, tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return [{"linears": ["a", "b"], "increase": 0.1}, None, 3]

    expected = [{"linears": ["a", "b"], "increase": 0.1}, None, 3]
    assert store.remembered("sensitivity", make) == expected
    assert store.remembered("sensitivity", make) == expected
    assert LayerStore(tmp_path / "work", MADE_FROM).remembered("sensitivity", make) == expected
    assert len(made) == 1
    store.remembered("another", make)
    assert len(made) == 2


def test_a_result_that_failed_is_made_again(store: LayerStore) -> None:
    def fails() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.remembered("sensitivity", fails)
    assert store.remembered("sensitivity", lambda: [1]) == [1]


@pytest.mark.parametrize("scales", [(0.0123456789, 1e-6), (1 / 3, 0.5), (2**-20, 65504 / 127)])
def test_cache_scales_are_read_back_bit_for_bit(
    store: LayerStore, tmp_path: Path, scales: tuple[float, float]
) -> None:
    content = linears()
    store.write(0, content, scales)
    store.write(1, content, scales[::-1])
    again = LayerStore(tmp_path / "work", MADE_FROM)
    assert (again.cache_scales(0), again.cache_scales(1)) == (scales, scales[::-1])
    assert again.input_scales(0) == store.input_scales(0)
    assert list(again.read(0)) == list(content), "a cache is no linear layer"


def test_without_an_int8_cache_there_are_no_scales_of_one(store: LayerStore) -> None:
    store.write(0, linears())
    store.write(1, linears(), (0.1, 0.2))
    store.write(2, linears(), None)
    assert [store.cache_scales(layer) for layer in range(3)] == [None, (0.1, 0.2), None]


def test_writing_a_layer_again_replaces_its_cache_scales(store: LayerStore) -> None:
    store.write(0, linears(), (0.1, 0.2))
    store.write(0, linears(), (0.3, 0.4))
    assert store.cache_scales(0) == (0.3, 0.4)
    store.write(0, linears())
    assert store.cache_scales(0) is None


@pytest.mark.parametrize("metadata", [None, {}, {"layer": "{"}, {"layer": '{"linears": {}}'}])
def test_a_layer_that_says_nothing_of_its_cache_is_refused(
    store: LayerStore, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    """A layer of an earlier version, or of something else, is not taken for one without."""
    from safetensors.torch import save_file

    file = tmp_path / "work" / "layer-0000.safetensors"
    file.parent.mkdir()
    save_file({"x": torch.zeros(1)}, file, metadata=metadata)
    with pytest.raises(UsageError, match=r"does not read .* delete the folder") as caught:
        store.cache_scales(0)
    assert file.name in str(caught.value)
