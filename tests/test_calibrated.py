"""Work on a calibration text: what is chosen, what is refused when, stopping and going on."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from torch import Tensor
from wrapped_weights import changed as changed_weights
from wrapped_weights import with_outlier_channels

from edgeattn.bundle.bundle import Bundle
from edgeattn.bundle.graph import read_graph
from edgeattn.calibration.sensitivity import Trial, choose_kept
from edgeattn.calibration.windows import token_windows
from edgeattn.devices.registry import parse_target
from edgeattn.errors import (
    BundleError,
    CheckpointError,
    EdgeattnError,
    LoweringError,
    RuntimeInputError,
    UsageError,
)
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.families import LM_HEAD
from edgeattn.models.model import Model, model_of
from edgeattn.pipeline import export, plan_export
from edgeattn.pipeline.calibrated import CalibratedQuantizer
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.transform import transform
from edgeattn.pipeline.work import open_work, work_folder
from edgeattn.planner.lowering import plan_lowering
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import parse_scheme
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape
from edgeattn.text_file import read_text
from edgeattn.transforms.learn import LearnReport
from edgeattn.transforms.quantize import quantize
from edgeattn.transforms.rotate import Rotations, hadamard_rotations

# The down projections of stories260k have 172 inputs, which no group divides.
FOUR_BITS = "group=32,down_proj=w8"
LEARNED = f"w4a16-spinquant-learned:steps=10,refit=off,{FOUR_BITS}"
SPINQUANT, GPTQ = f"w4a16-spinquant:{FOUR_BITS}", f"w4a16-gptq:{FOUR_BITS}"

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def novel(shared_dir: Path) -> Path:
    path = shared_dir / "data" / "austen" / "emma.txt"
    if not path.is_file():
        pytest.skip("no novels in shared/data")
    return path


@pytest.fixture
def recipe(novel: Path) -> Callable[..., Recipe]:
    """A function from a scheme to a recipe on few windows."""
    return lambda quant, **fields: Recipe(
        "cpu", quant=quant, **{"calibration": str(novel), "calibration_windows": 4, **fields}
    )


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(bundle: Path) -> str:
    return Bundle.open(bundle).manifest.files["model.onnx.data"].sha256


def notes_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = Bundle.open(bundle).json("report.json")["transforms"]
    return found


@pytest.fixture(scope="module")
def learned(
    stories260k: Path, novel: Path, tmp_path_factory: pytest.TempPathFactory, shared_traces: None
) -> Path:
    """A bundle whose rotations were learned in one go."""
    path = tmp_path_factory.mktemp("learned") / "bundle"
    asked = Recipe("cpu", quant=LEARNED, calibration=str(novel), calibration_windows=4)
    export(stories260k, asked, path, verify=False)
    return path


def test_learned_rotations_serve_again(
    stories260k: Path, recipe: Callable[..., Recipe], learned: Path, tmp_path: Path
) -> None:
    rotations = str(learned / "rotations.safetensors")
    asked = recipe(f"{SPINQUANT},refit=off", rotations=rotations)
    export(stories260k, asked, tmp_path / "bundle", verify=False)
    assert weights_of(tmp_path / "bundle") == weights_of(learned)
    found = notes_of(tmp_path / "bundle")["rotation"]
    assert found["kind"] == "rotations.safetensors"
    assert "learned on" not in found
    assert not (tmp_path / "bundle" / "rotations.safetensors").exists()
    assert notes_of(learned)["rotation"]["kind"] == "learned"
    assert notes_of(learned)["learned rotations"]["chosen"] == "learned"


def test_stopped_learning_goes_on(
    stories260k: Path, recipe: Callable[..., Recipe], learned: Path, tmp_path: Path
) -> None:
    counted: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "learning rotations" and done == 1:
            raise KeyboardInterrupt

    def count(stage: str, done: int, total: int) -> None:
        if stage == "learning rotations" and done:
            counted.append(done)

    with pytest.raises(KeyboardInterrupt) as caught:
        export(stories260k, recipe(LEARNED), tmp_path / "bundle", verify=False, progress=stop)
    assert left_behind(tmp_path) == [".bundle.layers"]
    (note,) = caught.value.__notes__
    assert str(tmp_path / ".bundle.layers") in note
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        export(stories260k, recipe(SPINQUANT), tmp_path / "bundle", verify=False)
    export(stories260k, recipe(LEARNED), tmp_path / "bundle", verify=False, progress=count)
    assert counted == [*range(2, 11)]
    assert weights_of(tmp_path / "bundle") == weights_of(learned)
    assert left_behind(tmp_path) == ["bundle"]


def test_rotations_of_another_checkpoint_are_noted(
    stories260k: Path, recipe: Callable[..., Recipe], learned: Path, tmp_path: Path
) -> None:
    model = copied(stories260k, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, model / "model.safetensors")
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(learned / "rotations.safetensors"), silent)
    for file, words in (
        (learned / "rotations.safetensors", "another checkpoint than this one"),
        (silent, "the file does not say what"),
    ):
        asked, lowering = recipe(SPINQUANT, rotations=str(file)), lowering_of(SPINQUANT)
        found = transform(open_checkpoint(model), asked, lowering, tmp_path / words, Clock(None))
        assert found.notes["rotation"]["learned on"] == words


def lowering_of(quant: str) -> Any:
    return plan_lowering(Recipe("cpu", quant=quant), parse_target("cpu"))


def copied(model: Path, path: Path) -> Path:
    return Path(shutil.copytree(model, path))


@pytest.mark.parametrize("quant", ["none", "w8-rtn", f"w4-rtn:{FOUR_BITS}", "w8a8"])
def test_rotations_without_use_are_refused_before_anything_else(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path, quant: str
) -> None:
    asked = recipe(quant, rotations="learned.safetensors")
    for run in (export, plan_export):
        with pytest.raises(UsageError, match=f"a scheme that rotates.* scheme {quant} does not"):
            run(stories260k, asked, tmp_path / "bundle")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("field", ["calibration", "eval_text"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it cannot be read"),
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        ("Déjà vu".encode("latin-1"), "UTF-8 in .* byte 1 does not fit"),
    ],
    ids=["missing", "empty", "blank", "latin-1"],
)
def test_texts_are_read_before_the_model(
    recipe: Callable[..., Recipe], tmp_path: Path, field: str, content: bytes | None, words: str
) -> None:
    """So that nothing is downloaded for a text that is none."""
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    asked = recipe(GPTQ, **{field: str(text)})
    before = left_behind(tmp_path)
    for run in (export, plan_export):
        with pytest.raises(RuntimeInputError, match=words):
            run(tmp_path / "no model is here", asked, tmp_path / "bundle")
    assert left_behind(tmp_path) == before


def test_an_evaluation_text_too_short_is_refused_before_calibration(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 100)
    stages: list[str] = []
    with pytest.raises(RuntimeInputError, match=r"12 windows .*: pass a longer text$"):
        export(
            stories260k,
            recipe(GPTQ, eval_text=str(text)),
            tmp_path / "bundle",
            progress=lambda stage, *_: stages.append(stage),
        )
    assert set(stages) == {"reading the checkpoint"}
    assert left_behind(tmp_path) == ["text.txt"]


def test_a_calibration_text_too_short_says_how_many_windows_it_has(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. " * 100)
    with pytest.raises(RuntimeInputError, match=r"or --calibration-windows 2$"):
        export(stories260k, recipe(GPTQ, calibration=str(text)), tmp_path / "bundle")
    assert left_behind(tmp_path) == ["text.txt"]


def test_windows_are_no_longer_than_the_context(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    asked = recipe("w8a8:keep=0,refit=off", context=96)
    report = export(stories260k, asked, tmp_path / "bundle", verify=False)
    assert report.transforms["calibration"]["length"] == 96


@pytest.mark.parametrize("rows", [{"context": 96}, {"dtype": "fp16"}, {"calibration_windows": 3}])
def test_what_is_resumed_is_of_the_same_command(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path, rows: dict[str, Any]
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantising layer by layer" and done == 1:
            raise KeyboardInterrupt

    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(stories260k, recipe(GPTQ), output, verify=False, progress=stop)
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        export(stories260k, replace(recipe(GPTQ), target="cpu", **rows), output, verify=False)
    assert left_behind(tmp_path) == [".bundle.layers"]


def test_work_of_another_release_is_not_gone_on_with(
    stories260k: Path,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, lowering = recipe("w8a8:keep=0,refit=off"), lowering_of("w8a8:keep=0,refit=off")
    transform(open_checkpoint(stories260k), asked, lowering, tmp_path / "work", Clock(None))
    monkeypatch.setattr("edgeattn.pipeline.transform.__version__", "0.0.1")
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        transform(open_checkpoint(stories260k), asked, lowering, tmp_path / "work", Clock(None))


def test_a_scheme_without_calibration_leaves_the_work_of_others_alone(
    stories260k: Path, tmp_path: Path
) -> None:
    work = work_folder(tmp_path / "bundle")
    work.mkdir()
    (work / "made-from.json").write_text("{}")
    (work / "layer-0000.safetensors").write_text("hours of work")
    (work / "rotations.safetensors").write_text("learned")
    export(stories260k, Recipe("cpu", quant="w8-rtn"), tmp_path / "bundle", verify=False)
    assert sorted(file.name for file in work.iterdir()) == [
        "layer-0000.safetensors",
        "made-from.json",
        "rotations.safetensors",
    ]
    assert not (tmp_path / "bundle" / "rotations.safetensors").exists()


def test_two_runs_do_not_share_a_work_folder(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with open_work(output, needed=True) as work:
        with (
            pytest.raises(BundleError, match=r"another run .* choose another folder with -o"),
            open_work(output, needed=True),
        ):
            pass
        assert work.is_dir()
        with open_work(tmp_path / "other", needed=True), open_work(output, needed=False):
            pass
    assert left_behind(tmp_path) == []
    work.mkdir()
    with (work / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    with open_work(output, needed=True):  # of a run that is dead
        pass
    assert left_behind(tmp_path) == []


def test_the_command_line_says_where_finished_layers_wait(
    stories260k: Path,
    novel: Path,
    edgeattn: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    options = ("--target", "cpu", "--calibration", novel, "--calibration-windows", 2)
    command = ("export", stories260k, *options, "-o", tmp_path / "bundle", "--no-verify")
    with monkeypatch.context() as patch:
        patch.setattr("edgeattn.exporters.export.export_graph", fails)
        done = edgeattn(*command, "--quant", GPTQ)
    assert done.exit_code == 130
    waiting = f"what was finished waits in {tmp_path / '.bundle.layers'}: the same command goes on"
    assert waiting in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("edgeattn: interrupted; ")
    done = edgeattn(*command, "--quant", "w8a8")
    assert done.exit_code == 2
    assert "expected the unfinished work in" in done.stderr
    assert edgeattn(*command, "--quant", GPTQ).exit_code == 0


@pytest.mark.parametrize(
    ("types", "warned"),
    [
        ({"Q4_1": 200, "F32": 61}, "Q4_1"),
        ({"Q6_K": 1, "IQ3_S": 9, "F16": 1}, "IQ3_S, Q6_K"),
        ({"Q8_0": 200, "F32": 61}, None),
        ({"F16": 100}, None),
        (None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("quant", ["w4-rtn:group=32,down_proj=w8", "w8-rtn", "w8a8:keep=0"])
def test_an_earlier_quantisation_is_warned_of(
    stories260k: Path,
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    quant: str,
    types: dict[str, int] | None,
    warned: str | None,
) -> None:
    checkpoint = open_checkpoint(stories260k)
    identity = {**checkpoint.identity, **({} if types is None else {"tensor_types": types})}
    checkpoint = replace(checkpoint, identity=identity)
    asked = recipe(quant, calibration_windows=1)
    notes = transform(checkpoint, asked, lowering_of(quant), tmp_path / "work", Clock(None)).notes
    assert ("warning" in notes) == (warned is not None)
    if warned is not None:
        assert f"quantised before ({warned})" in notes["warning"]


def test_without_quantised_weights_nothing_is_warned_of(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(stories260k)
    checkpoint = replace(checkpoint, identity={**checkpoint.identity, "tensor_types": {"Q4_1": 1}})
    found = transform(checkpoint, recipe("none"), lowering_of("none"), tmp_path, Clock(None))
    assert found.notes == {}


def test_kept_linears_are_those_chosen_and_are_int8_in_the_graph(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    quant = f"w4a16-gptq:keep=10%,{FOUR_BITS}"
    report = export(stories260k, recipe(quant), tmp_path / "bundle", verify=False)
    notes = report.transforms
    trials = [
        Trial(tuple(names.split(", ")), increase)
        for names, increase in notes["sensitivity (nats)"].items()
    ]
    expected = choose_kept(trials, parse_scheme(quant), 5 * 7)
    assert set(notes["kept at higher precision"]) == {"linears", *expected}
    assert notes["kept at higher precision"]["linears"] == "3 of 35"
    graph = read_graph(Bundle.open(tmp_path / "bundle")).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for layer in range(5):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            weight = f"layers.{layer}.{name}.weight"
            kind = TensorProto.INT8 if weight in expected else TensorProto.INT4
            assert kinds[weight] == kind, weight
    # Spelled for GroupQueryAttention, where projections of one format are stacked.
    checkpoint, lowering = open_checkpoint(stories260k), lowering_of(quant)
    transformed = transform(checkpoint, recipe(quant), lowering, tmp_path / "work", Clock(None))
    assert transformed.notes["projections"].startswith("not stacked")
    assert not transformed.model.shape.fused


def test_a_bad_weight_leaves_nothing_and_a_repaired_one_is_no_other_work(
    stories260k: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model, output = copied(stories260k, tmp_path / "model"), tmp_path / "bundle"
    file = model / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        export(model, recipe(GPTQ), output, verify=False)
    assert left_behind(tmp_path) == ["model"]
    file.write_bytes(whole)
    export(model, recipe(GPTQ), output, verify=False)
    assert left_behind(tmp_path) == ["bundle", "model"]


@pytest.mark.parametrize("quant", ["w8a8-spinquant", "w8a8-spinquant:rotation=auto"])
def test_an_odd_width_that_would_be_rotated_is_refused(
    random_checkpoint: Callable[..., Path],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    quant: str,
) -> None:
    model = random_checkpoint(intermediate_size=127)
    for run in (export, plan_export):
        with pytest.raises(LoweringError, match=r"an even intermediate size, .* it is 127"):
            run(model, recipe(quant), tmp_path / "bundle")
    assert left_behind(tmp_path) == []
    plan_export(model, recipe("w8a8-spinquant:online=off"), tmp_path / "bundle")


@pytest.fixture
def stories(stories260k: Path) -> Model:
    return model_of(open_checkpoint(stories260k))


@pytest.fixture
def windows(stories260k: Path, novel: Path) -> Tensor:
    tokenizer = open_checkpoint(stories260k).text["tokenizer.json"]
    return token_windows(read_text(novel), tokenizer, windows=12, length=128, vocab_size=512)


def on_a_grid_of_4_bits(model: Model) -> Model:
    """Weights that an earlier quantisation left: rounding them again without rotation is exact."""
    plain = quantize(model, parse_scheme(f"w4-rtn:{FOUR_BITS}"), scale_dtype=torch.float32)

    def dequantised(name: str, value: Tensor) -> Tensor:
        found = plain.weights.read(name) if name != LM_HEAD else value
        return found.dequantize() if isinstance(found, QuantizedTensor) else found

    return changed_weights(model, dequantised)


@pytest.mark.parametrize(
    ("make", "chosen"),
    [
        (lambda model: with_outlier_channels(model, of="weights"), "rotated"),
        (on_a_grid_of_4_bits, "not rotated"),
    ],
    ids=["outlier channels", "4-bit before"],
)
def test_auto_rotates_where_that_helps(
    stories: Model,
    windows: Tensor,
    tmp_path: Path,
    make: Callable[[Model], Model],
    chosen: str,
) -> None:
    model = make(stories)

    def quantized(rotation: str) -> tuple[Model, dict[str, Any]]:
        scheme = parse_scheme(f"{SPINQUANT},refit=off,rotation={rotation}")
        work = tmp_path / rotation
        made_from = {"checkpoint": "c0ffee"}
        quantizer = CalibratedQuantizer(
            scheme, torch.float32, windows, work, made_from, Clock(None)
        )
        return quantizer.run(model, None)

    found, notes = quantized("auto")
    figures = notes["rotation=auto"]
    assert figures["chosen"] == chosen
    others = {"rotated", "not rotated"} - {chosen}
    assert figures[f"perplexity {chosen}"] < min(figures[f"perplexity {o}"] for o in others)
    expected, _ = quantized("hadamard" if chosen == "rotated" else "none")
    for layer, name in ((0, "self_attn.q_proj"), (4, "mlp.up_proj"), (4, "mlp.down_proj")):
        weight = f"layers.{layer}.{name}.weight"
        one, other = found.weights.read(weight), expected.weights.read(weight)
        assert isinstance(one, QuantizedTensor)
        assert isinstance(other, QuantizedTensor)
        assert torch.equal(one.qdata, other.qdata)
        assert torch.equal(one.scale, other.scale)
    assert (found.shape, found.reads) == (expected.shape, expected.reads)


def test_the_better_rotations_are_taken_whether_learned_or_not(
    stories: Model, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hadamard, none = hadamard_rotations(stories.shape, online=False), unrotated(stories.shape)

    def quantized(
        start: Rotations, found: Rotations, work: str, *, learned: bool = True
    ) -> tuple[Model, dict[str, Any]]:
        learning = LearnReport("kl", 1, (1.0,), 1.0, 0.5, learned, 0.0, 0.0)
        monkeypatch.setattr(
            "edgeattn.transforms.learn.learn_rotations", lambda *_, **__: (found, learning)
        )
        monkeypatch.setattr(
            "edgeattn.pipeline.calibrated.hadamard_rotations", lambda *_, **__: start
        )
        made_from = {"checkpoint": "c0ffee"}
        quantizer = CalibratedQuantizer(
            parse_scheme(LEARNED), torch.float32, windows, tmp_path / work, made_from, Clock(None)
        )
        model, notes = quantizer.run(stories, None)
        chosen = notes["learned rotations"]["chosen"]
        # Rotations that lost are not kept for others; what learning them cost is told all the same.
        assert (tmp_path / work / "rotations.safetensors").exists() == (chosen == "learned")
        assert ("learning" in notes) == (chosen != "learned")
        return model, notes["learned rotations"]

    one, figures = quantized(hadamard, none, "one")
    other, swapped = quantized(none, hadamard, "other")
    worse = "Hadamard" if figures["chosen"] == "learned" else "learned"
    assert figures[f"perplexity {figures['chosen']}"] < figures[f"perplexity {worse}"]
    assert swapped["chosen"] == worse
    _, unlearned = quantized(hadamard, hadamard, "unlearned", learned=False)
    assert unlearned == {"chosen": "Hadamard", "learned": "no better where it was learned"}
    for name in ("layers.0.self_attn.q_proj.weight", "layers.4.mlp.down_proj.weight"):
        weight, same = one.weights.read(name), other.weights.read(name)
        assert isinstance(weight, QuantizedTensor)
        assert isinstance(same, QuantizedTensor)
        assert torch.equal(weight.qdata, same.qdata)


def unrotated(shape: ModelShape) -> Rotations:
    eye = torch.eye(shape.head_dim, dtype=torch.float64)
    return Rotations(torch.eye(shape.hidden_size, dtype=torch.float64), (eye,) * shape.num_layers)


def test_a_work_folder_of_another_command_stops_learning_before_it_starts(
    stories: Model, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **keywords: object) -> None:
        pytest.fail("learning began")

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "made-from.json").write_text(json.dumps({"checkpoint": "another"}))
    (tmp_path / "work" / "sensitivity.json").write_text("[]")
    monkeypatch.setattr("edgeattn.transforms.learn.learn_rotations", never)
    made_from = {"checkpoint": "c0ffee"}
    quantizer = CalibratedQuantizer(
        parse_scheme(LEARNED), torch.float32, windows, tmp_path / "work", made_from, Clock(None)
    )
    with pytest.raises(EdgeattnError, match="another model, recipe or calibration text"):
        quantizer.run(stories, None)
