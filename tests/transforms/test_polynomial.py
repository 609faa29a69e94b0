"""Polynomial attention in a model: chosen heads, their tables, and the file between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("hypothesis")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.attention import FftRope, FftRopeRequest
from edgeattn.calibration.far_sums import FIRST_ROW, FarField
from edgeattn.calibration.walk import LayerWalk
from edgeattn.calibration.work import WorkFolder
from edgeattn.errors import LoweringError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import Model, load_layer, model_of
from edgeattn.models.stream import Head as LmHead
from edgeattn.models.stream import embed_windows, final_hidden, window_inputs
from edgeattn.ops.fft_rope_attention import reference
from edgeattn.planner.polynomial_heads import (
    KIND,
    SCHEMA_VERSION,
    Layer,
    PolynomialHeads,
    check_fits,
    read_polynomial_heads,
)
from edgeattn.transforms.polynomial import (
    calibrate_polynomials,
    measure_layer,
    with_polynomials,
)

LENGTH = 250
REQUEST = FftRopeRequest(window=16, tolerance=0.3)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="module")
def windows(model: Model) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (4, LENGTH))


def heads_of(layers: list[Layer], request: FftRopeRequest = REQUEST) -> PolynomialHeads:
    return PolynomialHeads(
        kind=KIND,
        schema_version=SCHEMA_VERSION,
        edgeattn="0",
        model="tiny",
        checkpoint="abc",
        text="text.txt",
        text_sha256="0",
        length=LENGTH,
        fitted_windows=2,
        held_out_windows=2,
        sink=request.sink,
        window=request.window,
        degree=request.degree,
        tolerance=request.tolerance,
        layers=tuple(layers),
    )


@pytest.fixture(scope="module")
def calibrated(
    model: Model, windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> PolynomialHeads:
    work = WorkFolder(tmp_path_factory.mktemp("work"), {})
    return heads_of(calibrate_polynomials(model, windows, REQUEST, work))


@torch.inference_mode()
def heads_at(model: Model, windows: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer in the original model."""
    hidden, shared = embed_windows(model, windows), window_inputs(model.shape, LENGTH)
    for index in range(layer + 1):
        kind = shared[model.shape.layer_kind(index)]
        block = load_layer(model, index, weight_dtype=torch.float32)
        walk = LayerWalk(block, hidden, kind, model.shape)
        q, k, v = (torch.cat(parts) for parts in zip(*walk.heads(), strict=True))
        walk.run()
    return q, k, v


@torch.inference_mode()
def test_recorded_errors_are_the_operators(model: Model, windows: Tensor) -> None:
    q, k, v = heads_at(model, windows, 1)
    far = FarField(REQUEST.sink, REQUEST.window)
    layer = measure_layer(q, k, v, far, replace(REQUEST, tolerance=0.999), every=1)
    assert layer.degree is not None
    assert layer.passed == 4
    whole = with_polynomials(model, heads_of([layer] * 3))
    tables = whole.tables[1]
    held_out = (x[1::2] for x in (q, k, v))
    arguments = [
        *held_out,
        tables["coefficients"],
        tables["key_mean"],
        torch.zeros(1, 1),
        torch.full((4,), 1e4),  # far enough for every row
    ]
    count = torch.full((2,), LENGTH, dtype=torch.int32)
    options = {"degree": layer.degree, "sink": 4, "window": 16}
    # Even degrees alone are fitted: positive everywhere, in fp32 nearly so.
    found, exact = (
        reference(*arguments, torch.full((4,), backend, dtype=torch.int32), count, **options)[0]
        for backend in (1, 0)
    )
    square = (found - exact)[:, :, FIRST_ROW:].double().square().sum((2, 3))
    errors = (square / exact[:, :, FIRST_ROW:].double().square().sum((2, 3))).sqrt().amax(0)
    for head, about in enumerate(layer.heads):
        assert about.polynomial is not None
        assert about.polynomial.error == pytest.approx(float(errors[head]), rel=1e-3)


def test_heads_within_the_tolerance_are_chosen(calibrated: PolynomialHeads) -> None:
    assert calibrated.passed > 0
    for layer in calibrated.layers:
        needed = []
        for head in layer.heads:
            serving = [
                c.degree
                for c in head.candidates
                if c.degree <= 2
                and c.fitted == (c.degree % 2 == 0)
                and c.error <= REQUEST.tolerance
                and c.fallback <= 0.05
            ]
            assert (head.chosen is not None) == bool(serving)
            needed += [min(serving)] if serving else []
            if head.polynomial:
                assert head.polynomial.degree == max(d for d in serving if d <= layer.degree)
        assert layer.degree == max(needed, default=None)


def test_odd_taylor_falls_back_nearly_everywhere(calibrated: PolynomialHeads) -> None:
    odd = [
        c for layer in calibrated.layers for h in layer.heads for c in h.candidates if c.degree % 2
    ]
    assert odd
    assert all(not c.fitted and c.score_bound <= 1.6 for c in odd)
    assert min(c.fallback for c in odd) > 0.05


def test_fitted_is_no_worse_than_taylor_on_the_whole(calibrated: PolynomialHeads) -> None:
    heads = [h for layer in calibrated.layers for h in layer.heads]
    for degree in (0, 2, 4):
        fitted, taylor = (
            sum(h.error(degree, fitted=one) or 0.0 for h in heads) for one in (True, False)
        )
        assert fitted <= taylor


@torch.inference_mode()
def test_model_with_polynomials_is_near_the_original(
    model: Model, windows: Tensor, calibrated: PolynomialHeads
) -> None:
    changed = with_polynomials(model, calibrated)
    degrees = [layer.degree for layer in calibrated.layers]
    for index, degree in enumerate(degrees):
        wanted = None if degree is None else FftRope(degree, 4, 16)
        assert changed.shape.layer_kind(index).attention == wanted
    assert set(changed.tables) == {i for i, degree in enumerate(degrees) if degree is not None}
    logits = [LmHead(m).logits(final_hidden(m, windows)) for m in (model, changed)]
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.3


@torch.inference_mode()
def test_exact_heads_change_nothing(
    model: Model, windows: Tensor, calibrated: PolynomialHeads
) -> None:
    layers = []
    for layer in calibrated.layers:
        exact = [head.model_copy(update={"chosen": None}) for head in layer.heads]
        layers.append(layer.model_copy(update={"heads": tuple(exact)}))
    none = with_polynomials(model, heads_of(layers))
    assert not none.tables
    assert not none.shape.has_variants
    assert torch.equal(final_hidden(none, windows), final_hidden(model, windows))


def test_a_lower_degree_has_zeros_behind(model: Model, calibrated: PolynomialHeads) -> None:
    layer = calibrated.layers[1]
    places = {(c.degree, c.fitted): i for i, c in enumerate(layer.heads[0].candidates)}
    chosen = [places[0, True], places[2, True], None, places[2, True]]
    heads = [h.model_copy(update={"chosen": c}) for h, c in zip(layer.heads, chosen, strict=True)]
    mixed = layer.model_copy(update={"heads": tuple(heads)})
    tables = with_polynomials(model, heads_of([mixed] * 3)).tables[0]
    assert tables["backend"].tolist() == [1, 1, 0, 1]
    assert tables["coefficients"][0, 1:].tolist() == [0, 0]
    assert (
        tables["coefficients"][0, 0] == layer.heads[0].candidates[places[0, True]].coefficients[0]
    )
    assert tables["coefficients"][1].tolist() == list(
        layer.heads[1].candidates[places[2, True]].coefficients
    )
    assert torch.equal(tables["key_mean"][0], tables["key_mean"][1])
    assert tables["key_mean"][2].tolist() == list(layer.key_mean[1])


def test_work_goes_on_where_it_was(
    model: Model, windows: Tensor, calibrated: PolynomialHeads, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    work = WorkFolder(tmp_path / "work", {"of": "this"})
    with pytest.raises(KeyboardInterrupt):
        calibrate_polynomials(model, windows, REQUEST, work, progress=stop)
    files = sorted(work.path.glob("layer-*"))
    assert [file.name for file in files] == ["layer-0000.json", "layer-0001.json"]
    before = [file.stat().st_mtime_ns for file in files]
    layers = calibrate_polynomials(model, windows, REQUEST, work)
    assert heads_of(layers) == calibrated
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].write_text("{")
    with pytest.raises(UsageError, match=r"layer-0000\.json does not read"):
        calibrate_polynomials(model, windows, REQUEST, work)


def test_sliding_windows_stay(
    random_checkpoint: Callable[..., Path], windows: Tensor, tmp_path: Path
) -> None:
    path = random_checkpoint(model_type="mistral", sliding_window=100)
    found = calibrate_polynomials(
        model_of(open_checkpoint(path)), windows, REQUEST, WorkFolder(tmp_path, {})
    )
    assert all(layer.skipped and layer.degree is None for layer in found)
    assert heads_of(found).passing(2, fitted=True) == 0


def test_refusals(
    model: Model, windows: Tensor, calibrated: PolynomialHeads, tmp_path: Path
) -> None:
    work = WorkFolder(tmp_path, {})
    with pytest.raises(UsageError, match="at least 2 windows"):
        calibrate_polynomials(model, windows[:1], REQUEST, work)
    capped = replace(model, shape=replace(model.shape, attention_softcap=50.0))
    with pytest.raises(LoweringError, match="without a cap"):
        calibrate_polynomials(capped, windows, REQUEST, work)
    with pytest.raises(LoweringError, match="softmax attention"):
        calibrate_polynomials(with_polynomials(model, calibrated), windows, REQUEST, work)


@pytest.fixture(scope="module")
def file(calibrated: PolynomialHeads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "heads.json"
    path.write_text(calibrated.model_dump_json(indent=1))
    return path


def test_file_gives_the_same_tables(model: Model, calibrated: PolynomialHeads, file: Path) -> None:
    read = read_polynomial_heads(file)
    assert read == calibrated
    check_fits(read, model.shape, "abc")
    ours, theirs = (with_polynomials(model, heads).tables for heads in (calibrated, read))
    for layer, tables in ours.items():
        for name, tensor in tables.items():
            assert torch.equal(tensor, theirs[layer][name])


def test_heads_of_another_model_are_refused(model: Model, calibrated: PolynomialHeads) -> None:
    with pytest.raises(UsageError, match="of another one, tiny"):
        check_fits(calibrated, model.shape, "def")
    with pytest.raises(UsageError, match="heads of 4 layers, but there are 3"):
        check_fits(calibrated, replace(model.shape, num_layers=4), "abc")
    with pytest.raises(UsageError, match="8 heads, 2 of keys, 16 wide, in layer 0"):
        check_fits(calibrated, replace(model.shape, num_heads=8), "abc")


@pytest.mark.parametrize(
    "changed", [{"coefficients": (1.0, 5.0, 1.0)}, {"score_bound": 1e300}], ids=str
)
def test_polynomials_that_no_kernel_takes_are_refused(
    model: Model, calibrated: PolynomialHeads, changed: dict[str, Any]
) -> None:
    layer = calibrated.layers[0]
    places = {(c.degree, c.fitted): i for i, c in enumerate(layer.heads[0].candidates)}
    first = layer.heads[0].candidates[places[2, True]].model_copy(update=changed)
    head = layer.heads[0].model_copy(update={"candidates": (first,), "chosen": 0})
    other = layer.model_copy(update={"heads": (head, *layer.heads[1:])})
    with pytest.raises(UsageError, match="positive polynomials in layer 1"):
        with_polynomials(model, heads_of([layer, other, layer]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file"),
        (b"\xff\xfe", "the file"),
        (b"[]", "the file"),
        (b'{"kind": "other"}', "kind"),
        (None, "there is none"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_polynomial_heads(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_a_changed_file_is_refused_or_has_tables(
    data: st.DataObject, value: Any, file: Path, model: Model, tmp_path: Path
) -> None:
    content = json.loads(file.read_text())
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        place[key] = value
    else:
        del place[key]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    try:
        heads = read_polynomial_heads(path)
        check_fits(heads, model.shape, "abc")
        changed = with_polynomials(model, heads)
    except UsageError:
        return
    for tables in changed.tables.values():
        assert all(table.isfinite().all() for table in tables.values())
