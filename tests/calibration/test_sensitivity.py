"""What quantising a linear layer alone costs, against whole runs of a model with just that done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from wrapped_weights import changed

from edgeattn.calibration import sensitivity as module
from edgeattn.calibration.sensitivity import Trial, choose_kept, measure_sensitivity
from edgeattn.calibration.walk import STAGES
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.families import FINAL_NORM
from edgeattn.models.linear import Linear
from edgeattn.models.model import Model, load_decoder, model_of
from edgeattn.models.stream import batches
from edgeattn.quant.activation import LinearInput
from edgeattn.quant.affine import quantize_symmetric
from edgeattn.quant.observer import Observer
from edgeattn.quant.scheme import Scheme, parse_scheme
from edgeattn.transforms.rotate import hadamard_rotations, rotate

PLANTED = "layers.1.mlp.down_proj.weight"
SCHEMES = [
    "w4a16-gptq:group=32,keep=0.1",
    "w4a16-gptq:group=32,down_proj=w8,keep=0.1",
    "w8a8:range=max",
]


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    """As sure of what comes next as a trained model."""
    model = model_of(open_checkpoint(tiny_checkpoint))
    return changed(model, lambda name, value: value * 6 if name == FINAL_NORM else value)


@pytest.fixture
def windows(llama: Model) -> Tensor:
    """What the model itself would say, so that every change of it raises the loss.

    More than loss and bounds are measured on.
    """
    decoder = load_decoder(llama, weight_dtype=torch.float32, compute_dtype=torch.float32)
    ids = torch.randint(0, 272, (module._BOUND_WINDOWS + 3, 1))
    while ids.shape[1] < 24:
        ids = torch.cat((ids, logits(decoder, ids)[:, -1].softmax(-1).multinomial(1)), dim=1)
    return ids


@torch.inference_mode()
def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    rows, length = ids.shape
    positions = torch.arange(length).expand(rows, -1)
    found: Tensor = decoder(ids, torch.ones_like(ids), positions, decoder.empty_cache(rows)).logits
    return found


def with_outliers(model: Model, *, of: str, size: float = 300) -> Model:
    """The same function, but one down projection has outliers in its inputs or its weights.

    One channel in 32 of what lies between up and down projection is `size` times larger or smaller.
    """
    factor = torch.ones(128)
    factor[::32] = size if of == "inputs" else 1 / size
    up = PLANTED.replace("down", "up")

    def change(name: str, value: Tensor) -> Tensor:
        if name == up:
            return value * factor.unsqueeze(1)
        return value / factor if name == PLANTED else value

    return changed(model, change)


def units(scheme: Scheme) -> list[tuple[str, ...]]:
    """What is tried together, within a block."""
    if scheme.activation_bits is not None:
        return list(STAGES)
    return [(name,) for names in STAGES for name in names]


def brute_force(model: Model, scheme: Scheme, windows: Tensor) -> dict[tuple[str, ...], float]:
    """The increase of the loss by trial, each by a run of the whole decoder."""
    base = loss(model, windows)
    scales = input_scales(model, scheme, windows[: module._BOUND_WINDOWS])
    found = {}
    for index in range(model.shape.num_layers):
        for unit in units(scheme):
            names = tuple(f"layers.{index}.{name}.weight" for name in unit)
            tried = alone_quantized(model, scheme, names, scales)
            found[names] = loss(tried, windows) - base
    return found


def alone_quantized(
    model: Model, scheme: Scheme, names: tuple[str, ...], scales: dict[str, float]
) -> Model:
    def change(name: str, value: Tensor) -> Tensor:
        format = scheme.format_of(name)
        if name not in names or format is None:
            return value
        return quantize_symmetric(value, format, clip=scheme.clip).dequantize()

    reads = dict(model.reads)
    if scheme.activation_bits is not None:
        for name in names:
            before = reads.get(name, LinearInput())
            reads[name] = replace(before, scale=scales[name])
    return replace(changed(model, change), reads=reads)


def loss(model: Model, windows: Tensor) -> float:
    """Mean cross-entropy of the next token on the last windows."""
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    ids = windows[-module._LOSS_WINDOWS :]
    found = logits(decoder, ids)[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(found, ids[:, 1:].flatten()))


def input_scales(model: Model, scheme: Scheme, windows: Tensor) -> dict[str, float]:
    """Of what each linear layer's product sees, by the name of its weight."""
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    found: dict[str, float] = {}

    def keep(name: str, linear: Linear) -> Callable[..., None]:
        def hook(part: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen = linear.reads(arguments[0])
            if scheme.range == "max":
                found[name] = float(seen.abs().max()) / 127
            else:
                observer = Observer()
                for rows in batches(seen):  # the bins depend on what is seen first
                    observer.add(rows)
                found[name] = observer.scale(scheme.range)

        return hook

    for name, part in decoder.named_modules():
        if isinstance(part, Linear):
            part.register_forward_pre_hook(keep(f"{name}.weight", part))
    logits(decoder, windows)
    return found


@pytest.mark.parametrize("quant", [*SCHEMES, "w8a8", "w8a8-spinquant", "w8a8-spinquant:range=max"])
def test_trials_are_whole_runs_with_one_thing_quantised(
    llama: Model, windows: Tensor, quant: str
) -> None:
    scheme, model = parse_scheme(quant), llama
    if scheme.rotation != "none":
        model = rotate(llama, hadamard_rotations(llama.shape, online=scheme.online))
    expected = brute_force(model, scheme, windows)
    trials = measure_sensitivity(model, scheme, windows)
    found = {trial.linears: trial.increase for trial in trials}
    assert found.keys() == expected.keys()
    # A number near a boundary may fall on its other side: a small part of what is measured.
    allowed = 1e-5 if scheme.activation_bits is None else 0.1 * max(map(abs, expected.values()))
    for linears, increase in expected.items():
        assert found[linears] == pytest.approx(increase, abs=allowed), linears
    assert [t.increase for t in trials] == sorted(found.values(), reverse=True)


@pytest.mark.parametrize(("quant", "of"), [(SCHEMES[0], "weights"), ("w8a8", "inputs")])
def test_the_planted_layer_is_the_first(llama: Model, windows: Tensor, quant: str, of: str) -> None:
    planted, scheme = with_outliers(llama, of=of), parse_scheme(quant)
    assert loss(planted, windows) == pytest.approx(loss(llama, windows), abs=1e-4)
    first, second, *_ = measure_sensitivity(planted, scheme, windows)
    assert first.linears == (PLANTED,)
    assert first.increase > 2 * second.increase
    assert choose_kept([first, second], scheme, 21) >= {PLANTED}
    without = measure_sensitivity(llama, scheme, windows)
    here = next(trial for trial in without if trial.linears == (PLANTED,))
    assert first.increase > 3 * abs(here.increase)


def test_rotation_takes_the_outliers_away(llama: Model, windows: Tensor) -> None:
    planted, scheme = with_outliers(llama, of="inputs", size=40), parse_scheme("w8a8-spinquant")
    trials = {}
    for online in (False, True):
        model = rotate(planted, hadamard_rotations(llama.shape, online=online))
        found = measure_sensitivity(model, scheme, windows)
        trials[online] = next(trial.increase for trial in found if trial.linears == (PLANTED,))
    assert abs(trials[True]) < 0.5 * trials[False]


@pytest.mark.parametrize("quant", SCHEMES)
def test_a_second_measurement_gives_the_same(llama: Model, windows: Tensor, quant: str) -> None:
    """Every trial leaves its layer as it was."""
    scheme = parse_scheme(quant)
    assert measure_sensitivity(llama, scheme, windows) == measure_sensitivity(
        llama, scheme, windows
    )


def test_inputs_that_stay_as_they_are_are_not_observed(
    llama: Model, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> None:
        pytest.fail("inputs were observed")

    monkeypatch.setattr(module, "Observer", never)
    assert len(measure_sensitivity(llama, parse_scheme("w4a16-gptq:group=32"), windows)) == 21


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_windows_are_enough(llama: Model, rows: int) -> None:
    windows = torch.randint(0, 272, (rows, 10))
    assert len(measure_sensitivity(llama, parse_scheme("w8a8"), windows)) == 12


def test_progress_counts_layers(llama: Model, windows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    measure_sensitivity(
        llama, parse_scheme("w8a8"), windows, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_trial_is_json_ready() -> None:
    trial = Trial(("a", "b"), 0.25)
    values = json.loads(json.dumps(trial.to_dict()))
    assert values == {"linears": ["a", "b"], "increase": 0.25}


ABCDE = [
    Trial(("a", "b", "c"), 0.5),
    Trial(("d",), 0.4),
    Trial(("e", "f"), 0.3),
    Trial(("g",), 0.0),
    Trial(("h",), -0.1),
]


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0, ""),
        (0.05, ""),
        (0.1, "d"),
        (0.25, "d"),
        (0.3, "abc"),
        (0.4, "abcd"),
        (0.59, "abcd"),
        (0.6, "abcdef"),
        (1, "abcdef"),
    ],
)
def test_the_most_harmful_that_fit_into_the_share_are_kept(share: float, kept: str) -> None:
    assert choose_kept(ABCDE, sharing(share), 10) == frozenset(kept)


trials = st.lists(
    st.builds(
        Trial,
        st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True).map(tuple),
        st.floats(-1, 1),
    ),
    max_size=8,
)


def sharing(share: float) -> Scheme:
    return replace(parse_scheme("w4a16-gptq"), keep=share)


def test_what_is_int8_already_does_not_use_up_the_share() -> None:
    names = [
        f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.down_proj", "mlp.up_proj")
    ]
    trials = [Trial((name,), 1.0 - 0.1 * i) for i, name in enumerate(names)]
    weights = parse_scheme("w4a16-gptq:down_proj=w8,keep=20%")
    assert choose_kept(trials, weights, 10) == {names[1], names[3]}
    assert choose_kept(trials, parse_scheme("w8a8:keep=20%"), 10) == set(names[:2])


@given(trials, st.floats(0, 1), st.integers(0, 50))
def test_the_share_is_never_exceeded_nor_spent_on_the_harmless(
    trials: list[Trial], share: float, linears: int
) -> None:
    trials.sort(key=lambda trial: -trial.increase)
    kept = choose_kept(trials, sharing(share), linears)
    assert len(kept) <= share * linears
    harmful = {name for trial in trials if trial.increase > 0 for name in trial.linears}
    assert kept <= harmful
