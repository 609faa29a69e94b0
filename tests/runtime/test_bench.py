"""`edgeattn.runtime.bench`: what is timed, the statistics, and what a figure is called."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import BARE_MACHINE

from edgeattn.devices.libcuda import GpuFacts
from edgeattn.errors import EdgeattnError, RuntimeInputError, UsageError
from edgeattn.runtime import Session, generate
from edgeattn.runtime.bench import Amount, bench, phase, this_machine
from edgeattn.runtime.bench_record import BenchRecord, compare, read_record
from edgeattn.runtime.onnxruntime_backend import OnnxRuntimeEncoder

ORIN = replace(
    BARE_MACHINE,
    gpu=GpuFacts("Orin", 87, 7_989_000_000, 4_000_000_000, integrated=True),
    board="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    l4t="36.4.3",
    jetpack="jetpack6.2",
    power_mode="15W",
)
L4 = replace(BARE_MACHINE, arch="x86_64", gpu=GpuFacts("NVIDIA L4", 89, 24_000_000_000, 1))


@pytest.fixture(scope="module")
def record(tiny_bundle: Path) -> BenchRecord:
    return bench(tiny_bundle, Amount(tokens=20, new_tokens=3, repeats=2, warmup=1), threads=1)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_statistics_are_numpys(count: int) -> None:
    seconds = np.random.default_rng(count).lognormal(size=count)
    found = phase("decode", "tokens", 4, list(seconds))
    assert found.median_seconds == pytest.approx(np.median(seconds), rel=1e-12)
    assert found.p90_seconds == pytest.approx(np.percentile(seconds, 90), rel=1e-12)
    assert found.per_second == pytest.approx(4 / np.median(seconds), rel=1e-12)
    assert found.samples == count


def test_what_is_run(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and steps are those of `generate`; each pass begins without a state."""
    runs: list[tuple[list[int], int]] = []
    run = Session.run

    def noted(self: Session, ids: Any, state: Any = None, **more: Any) -> Any:
        runs.append((np.asarray(ids)[0].tolist(), 0 if state is None else state.length))
        return run(self, ids, state, **more)

    monkeypatch.setattr(Session, "run", noted)
    monkeypatch.setattr("edgeattn.runtime.bench.PREFILL_PIECE", 8)
    bench(tiny_bundle, Amount(tokens=20, new_tokens=3, repeats=2, warmup=1), threads=1)
    assert len(runs) == 3 * (3 + 3)
    one = runs[:6]
    assert runs == one * 3
    assert [(len(ids), past) for ids, past in one] == [
        (8, 0),
        (8, 8),
        (4, 16),
        (1, 20),
        (1, 21),
        (1, 22),
    ]
    monkeypatch.undo()
    prompt = one[0][0] + one[1][0] + one[2][0]
    expected = generate(Session.open(tiny_bundle, threads=1), prompt, max_new_tokens=3)
    assert [ids[0] for ids, _ in one[3:]] == list(expected.token_ids)


def test_what_is_timed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a run moves by hand: its tokens in seconds, ten times as many in the warm-up."""
    now, passes = [0.0], [0]
    run = Session.run

    def slow(self: Session, ids: Any, state: Any = None, **more: Any) -> Any:
        passes[0] += state is None
        now[0] += np.asarray(ids).size * (10 if passes[0] == 1 else passes[0])
        return run(self, ids, state, **more)

    monkeypatch.setattr(Session, "run", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    amount = Amount(tokens=20, new_tokens=3, repeats=3, warmup=1)
    prefill, decode = bench(tiny_bundle, amount, threads=1).phases
    assert (prefill.name, prefill.samples, prefill.median_seconds) == ("prefill", 3, 60.0)
    assert (decode.name, decode.samples, decode.median_seconds) == ("decode", 9, 3.0)
    assert prefill.p90_seconds == pytest.approx(np.percentile([40, 60, 80], 90))
    assert decode.p90_seconds == pytest.approx(np.percentile([2, 3, 4] * 3, 90))
    assert prefill.per_second == pytest.approx(20 / 60)
    assert decode.per_second == pytest.approx(1 / 3)


def test_record(record: BenchRecord, tiny_bundle: Path, tmp_path: Path) -> None:
    assert str(record.quantity) == "decoder, 1 x 20 + 3 new tokens"
    assert record.bundle.target == "jetson-orin-agx-64gb@jetpack6.2"
    assert record.bundle.quant == "w8-rtn"
    assert record.machine.device == "cpu"
    session = Session.open(tiny_bundle)
    state = session.run(np.zeros((1, 23), np.int64)).state
    assert record.cache_bytes == session.cache_bytes(state)
    assert record.peak_memory_bytes
    assert record.peak_memory_bytes > record.cache_bytes
    file = tmp_path / "a.json"
    record.write(file)
    assert read_record(file) == record
    speeds = json.loads(file.read_text())["speeds"]
    assert speeds["decode_tokens_per_second"] == record.phases[1].per_second
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("amount", "refusal", "word"),
    [
        (Amount(tokens=250, new_tokens=10), RuntimeInputError, "260 are asked for"),
        (Amount(repeats=0), UsageError, "--repeats of at least 1"),
        (Amount(warmup=-1), UsageError, "--warmup of at least 0"),
        (Amount(rows=2), UsageError, "one row for a decoder"),
    ],
)
def test_amounts_that_do_not_fit(
    tiny_bundle: Path, amount: Amount, refusal: type[EdgeattnError], word: str
) -> None:
    with pytest.raises(refusal, match=word):
        bench(tiny_bundle, amount)


def test_what_the_context_holds(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "context", 40)
    record = bench(tiny_bundle, Amount(repeats=1, warmup=0), threads=1)
    assert (record.quantity.tokens, record.quantity.new_tokens) == (30, 10)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name of `encoders.ENCODERS` to its bundle."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from encoders import save_encoder

    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("encoder")
        save_encoder(name, folder / "model")
        export(folder / "model", Recipe("cpu", batch=4), folder / "out", verify=False)
        return folder / "out"

    return make


@pytest.mark.parametrize(("name", "unit", "tokens"), [("bert", "texts", 12), ("vit", "images", 17)])
def test_an_encoder(
    encoders: Callable[[str], Path],
    name: str,
    unit: str,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, shapes = encoders(name), []
    run = OnnxRuntimeEncoder.run

    def noted(self: OnnxRuntimeEncoder, feeds: Any) -> Any:
        shapes.append(next(iter(feeds.values())).shape)
        return run(self, feeds)

    monkeypatch.setattr(OnnxRuntimeEncoder, "run", noted)
    asked = tokens if name == "bert" else None
    record = bench(path, Amount(tokens=asked, rows=3, repeats=4, warmup=2), threads=1)
    (one,) = record.phases
    assert (one.unit, one.count, one.samples) == (unit, 3, 4)
    assert record.quantity.tokens == tokens
    assert record.cache_bytes is None
    assert len(shapes) == 6
    assert set(shapes) == {(3, 12)} if name == "bert" else {shape[0] for shape in shapes} == {3}
    with pytest.raises(EdgeattnError, match="are asked for"):
        bench(path, Amount(tokens=1000))
    with pytest.raises(UsageError, match="an encoder"):
        bench(path, Amount(new_tokens=3))


@pytest.mark.parametrize(
    ("found", "provider", "name"),
    [
        (ORIN, "cpu", "jetson-orin-nano-8gb"),  # a board is one device
        (ORIN, "cuda", "jetson-orin-nano-8gb"),
        (L4, "cuda", "l4"),
        (L4, "cpu", "cpu"),  # the card did nothing
        (BARE_MACHINE, "cpu", "cpu"),
        (replace(L4, gpu=GpuFacts("Unheard of", 89, 1, 1)), "cuda", None),
    ],
)
def test_a_figure_is_called_what_ran_it(found: Any, provider: str, name: str | None) -> None:
    machine = this_machine(found, on_cpu=provider == "cpu")
    assert machine.device == name
    assert machine.power_mode == found.power_mode
    if name is not None:
        assert this_machine(found, on_cpu=provider == "cpu", wanted=name) == machine
    with pytest.raises(RuntimeInputError, match="to run on h100"):
        this_machine(found, on_cpu=provider == "cpu", wanted="h100")
    with pytest.raises(UsageError, match="target"):
        this_machine(found, on_cpu=provider == "cpu", wanted="h1000")


def changed(record: BenchRecord, **parts: dict[str, Any]) -> BenchRecord:
    new = {name: getattr(record, name).model_copy(update=to) for name, to in parts.items()}
    return record.model_copy(update=new)


def test_compare(record: BenchRecord) -> None:
    faster = tuple(
        one.model_copy(update={"median_seconds": one.median_seconds / 4}) for one in record.phases
    )
    found = compare(record, record.model_copy(update={"phases": faster}))
    ratios = {one.figure: one.ratio for one in found.ratios}
    assert ratios["prefill median"] == ratios["decode median"] == pytest.approx(0.25)
    assert ratios["prefill speed"] == ratios["decode speed"] == pytest.approx(4)
    assert ratios["prefill p90"] == ratios["decode p90"] == ratios["peak memory"] == 1
    assert found.differences == ()


def test_compare_says_what_differs(record: BenchRecord) -> None:
    other = changed(record, machine={"device": "l4"}, bundle={"quant": "none"})
    assert compare(record, other).differences == (
        "machine: device is cpu in A, l4 in B",
        "bundle: quant is w8-rtn in A, none in B",
    )


@pytest.mark.parametrize("field", ["tokens", "new_tokens", "rows"])
def test_compare_refuses_another_quantity(record: BenchRecord, field: str) -> None:
    with pytest.raises(RuntimeInputError, match="two records of the same quantity"):
        compare(record, changed(record, quantity={field: 7}))
