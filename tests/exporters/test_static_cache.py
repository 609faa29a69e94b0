"""Graphs with a static cache: their boundary, their capacity, and int8 in the slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx

from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.registry import parse_target
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.hadamard import hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache
from edgeattn.quant.scheme import Scheme
from edgeattn.recipe import Recipe
from edgeattn.runtime.in_place import StaticCacheRunner, free_capacity
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.verify.cases import build_cases
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.ort_backend import OrtBackend

CAPACITY = 48
WINDOW = {"model_type": "mistral", "sliding_window": 4}


@pytest.fixture(scope="module", params=["llama", "window"])
def bundle(
    request: pytest.FixtureRequest,
    export_tiny: Callable[..., Path],
    random_checkpoint: Callable[..., Path],
) -> Bundle:
    model = random_checkpoint(**(WINDOW if request.param == "window" else {}))
    return Bundle.open(export_tiny("cpu", model=model, kv_cache="static", context=CAPACITY))


def test_the_boundary(bundle: Bundle) -> None:
    graph = onnx.load(bundle.model_file, load_external_data=False).graph
    sizes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert list(sizes)[:4] == ["input_ids", "attention_mask", "position_ids", "write_indices"]
    assert sizes["input_ids"] == sizes["position_ids"] == ["batch_size", "sequence_length"]
    assert sizes["attention_mask"] == ["batch_size", CAPACITY]
    assert sizes["write_indices"] == ["batch_size"]
    slots = ["batch_size", bundle.shape.num_kv_heads, CAPACITY, bundle.shape.head_dim]
    caches = [name for name in sizes if name.startswith(("past_key_values.", "present."))]
    assert len(caches) == 4 * bundle.shape.num_layers
    assert all(sizes[name] == slots for name in caches)


def test_every_cache_is_written_once(bundle: Bundle) -> None:
    graph = onnx.load(bundle.model_file, load_external_data=False).graph
    writes = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert len(writes) == 2 * bundle.shape.num_layers
    for node in writes:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given == {"axis": 2, "mode": b"linear"}
        past, _, begin = node.input
        assert node.output[0] == past.replace("past_key_values", "present")
        assert begin == "write_indices"


def test_no_file_for_a_runtime_that_cannot_run_it(bundle: Bundle) -> None:
    assert "genai_config.json" not in bundle.manifest.files


@pytest.mark.parametrize("capacity", [9, 20, CAPACITY])
def test_the_capacity_is_a_number_at_the_boundary_alone(bundle: Bundle, capacity: int) -> None:
    """The file as it is, and with buffers of another capacity, give the same numbers."""

    class Fixed(StaticCacheRunner):
        def _capacity_for(self, places: int) -> int:
            return capacity

    freed = onnx.load(bundle.model_file, load_external_data=False)
    free_capacity(freed)
    whole = open_onnxruntime(bundle.model_file, exact=True)
    resized = open_onnxruntime(freed.SerializeToString(), weights_dir=bundle.path, exact=True)
    ids = np.random.default_rng(0).integers(0, 272, (2, 9), dtype=np.int64)
    found = []
    for runner in (StaticCacheRunner(whole, CAPACITY), Fixed(resized, CAPACITY)):
        cache = None
        for begin, end in ((0, 6), (6, 7), (7, 9)):
            outputs, cache = runner.run(ids[:, begin:end], cache)
        assert cache is not None
        found.append({"logits": outputs["logits"].copy(), **cache.tensors()})
    assert cache.buffer.capacity == capacity
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=2e-5)


@pytest.mark.parametrize("rotated", [True, False])
def test_int8_in_the_slots(tiny_checkpoint: Path, tmp_path: Path, rotated: bool) -> None:
    """As in a cache that grows, but for what a last bit turns into a whole step."""
    plain = model_of(open_checkpoint(tiny_checkpoint))
    factors = hadamard_factors(plain.shape.head_dim) if rotated else None
    layers = range(plain.shape.num_layers)
    model = replace(plain, caches={i: Int8Cache(0.02, 0.02, factors) for i in layers})
    static, growing = (run_int8(model, kind, tmp_path / kind) for kind in ("static", "growing"))
    assert static.keys() == growing.keys()
    for name, value in growing.items():
        difference = np.abs(static[name] - value)
        if ".present." in name:
            assert difference.max() <= 1
            assert (difference != 0).mean() < 2e-3, name
            assert np.abs(value).max() > 20, "the range is used"
        else:
            assert difference.max() < 0.02 * np.abs(value).max(), name


def run_int8(model: Model, kind: str, folder: Path) -> Tensors:
    folder.mkdir()
    lowering = int8_lowering(model, kind)
    export_graph(model, lowering, folder / "model.onnx", folder / "model.onnx.data")
    backend = OrtBackend(folder / "model.onnx", lowering)
    return drive(backend, build_cases(model.shape.vocab_size, 64))


def int8_lowering(model: Model, kind: str) -> Lowering:
    """Weights stay in floating point, so that caches alone are rounded."""
    recipe = Recipe("cpu", quant="w8a8:kv=int8", kv_cache=kind, context=64)
    planned = plan_lowering(recipe, parse_target("cpu"))
    alone = replace(planned, scheme=Scheme("none", kv_bits=8))
    return fit_lowering(alone, model.shape, parse_target("cpu"))
