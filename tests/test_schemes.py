"""Every scheme from checkpoint to proven bundle, on a trained model that was never quantised."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.build import check_build
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import check_profile, input_shapes
from edgeattn.errors import EdgeattnError, ProofError, RuntimeInputError, UsageError
from edgeattn.pipeline import export, plan_export
from edgeattn.planner.estimate import graph_bytes
from edgeattn.planner.lowering import Lowering
from edgeattn.quant.scheme import SCHEMES
from edgeattn.recipe import Recipe
from edgeattn.runtime import Session
from edgeattn.runtime.perplexity import perplexity
from edgeattn.text_file import read_text
from edgeattn.verify.report import report_html

# The down projections have 172 inputs, which no group divides.
FOUR_BITS = ":group=32,down_proj=w8"
SMALL_HEAD = "w4a16-spinquant:head=w4"
CALIBRATED = {
    "w4a16-gptq": FOUR_BITS,
    "w4a16-spinquant": FOUR_BITS,
    "w8a8": "",
    "w8a8-spinquant": "",
    SMALL_HEAD: FOUR_BITS,
    "w4a16-gptq:kv=int8": FOUR_BITS,
    "w4a16-spinquant:kv=int8": FOUR_BITS,
    "w8a8-spinquant:kv=int8": "",
    "w4a16-gptq:keep=10%": FOUR_BITS,
    "w4a16-spinquant-learned:steps=2": FOUR_BITS,
}
# Each scheme for the CPU; for TensorRT those whose graphs have no nodes that the others' have not.
BUILT = ("w4a16-gptq", "w4a16-spinquant", "w8a8", "w8a8-spinquant:kv=int8")
PAIRS = [
    *((scheme, "cpu") for scheme in CALIBRATED),
    *(
        pytest.param(scheme, "jetson-orin", marks=() if scheme in BUILT else pytest.mark.slow)
        for scheme in CALIBRATED
    ),
]
WINDOWS = 8

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture(scope="module")
def texts(shared_dir: Path) -> dict[str, str]:
    folder = shared_dir / "data" / "austen"
    if not folder.is_dir():
        pytest.skip("no novels in shared/data")
    names = {"calibration": "emma.txt", "eval_text": "pride_and_prejudice.txt"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.fixture(scope="module")
def exported(
    stories260k: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """A function from scheme and target to a proven bundle, made once."""
    made: dict[tuple[str, str], Bundle] = {}

    def make(scheme: str, target: str) -> Bundle:
        if (scheme, target) not in made:
            path = tmp_path_factory.mktemp("scheme") / "bundle"
            # TensorRT takes groups of 64 and 128.
            options = CALIBRATED[scheme].replace("32", "32" if target == "cpu" else "64")
            quant = scheme + (options.replace(":", ",") if ":" in scheme else options)
            recipe = Recipe(target, quant=quant, calibration_windows=WINDOWS, **texts)
            export(stories260k, recipe, path)
            made[scheme, target] = Bundle.open(path)
        return made[scheme, target]

    return make


@pytest.mark.parametrize(("scheme", "target"), PAIRS)
def test_every_calibrated_scheme_is_proven_and_builds(
    exported: Callable[[str, str], Bundle], scheme: str, target: str
) -> None:
    bundle = exported(scheme, target)
    assert bundle.manifest.verification.status == "passed"
    if target != "cpu" and TENSORRT_RTX.is_available():
        assert bundle.manifest.verification.tensorrt == "built"
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality["increase"] < (0.02 if "w8" in scheme else 0.07)
    assert 0 <= quality["kl"] < 0.3


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("sm", [75, 80, 89, 120])
@pytest.mark.parametrize("scheme", ["w8a8-spinquant:kv=int8", "w4a16-spinquant:kv=int8"])
def test_other_gpus_take_integers_too(
    exported: Callable[[str, str], Bundle], scheme: str, sm: int
) -> None:
    if sm == 75 and scheme.startswith("w4"):
        pytest.skip("SM75 has no int4 kernels")
    bundle = exported(scheme, "jetson-orin")
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    profiles = input_shapes(bundle.model_file, check_profile(256, lowering.batch))
    report = check_build(bundle.model_file, sm=sm, profiles=profiles, timeout_s=300)
    assert report.status == "built", report.reason


@pytest.mark.skipif(not TENSORRT_RTX.is_available(), reason="TensorRT-RTX is not installed")
def test_an_engine_holds_the_bits_that_were_asked_for(
    random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a model large enough that its weights are most of the engine."""
    model, sizes = random_checkpoint(hidden_size=512, intermediate_size=2048, head_dim=64), []
    for quant in ("w4-rtn", "w8-rtn", "none"):
        report = export(model, Recipe("jetson-orin", quant=quant), tmp_path / quant, verify=False)
        bundle = Bundle.open(report.path)
        profiles = input_shapes(bundle.model_file, check_profile(256, 1))
        built = check_build(bundle.model_file, sm=86, profiles=profiles, timeout_s=300)
        assert built.engine_bytes is not None, built.reason
        sizes.append(built.engine_bytes)
    assert sizes[0] < 0.7 * sizes[1] < 0.7 * 0.7 * sizes[2]


def test_refitting_brings_the_graph_closer_to_the_checkpoint(
    stories260k: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    found = {}
    for refit in ("on", "off"):
        quant = f"w4a16-gptq{FOUR_BITS},refit={refit}"
        recipe = Recipe("cpu", quant=quant, calibration_windows=WINDOWS, **texts)
        report = export(stories260k, recipe, tmp_path / refit, verify=False)
        assert report.quality is not None
        found[refit] = report.quality.kl
    assert found["on"] < 0.85 * found["off"]


@pytest.mark.parametrize(("scheme", "target"), PAIRS)
def test_the_graph_is_as_large_as_estimated(
    exported: Callable[[str, str], Bundle], scheme: str, target: str
) -> None:
    bundle = exported(scheme, target)
    expected = graph_bytes(bundle.shape, Lowering.from_dict(bundle.manifest.lowering))
    assert expected == pytest.approx(bundle.manifest.files["model.onnx"].bytes, rel=0.2)


def test_all_calibrated_schemes_are_here() -> None:
    calibrated = {name for name, scheme in SCHEMES.items() if scheme.needs_calibration}
    assert calibrated == {name.partition(":")[0] for name in CALIBRATED}


def test_the_report_tells_what_was_done(exported: Callable[[str, str], Bundle]) -> None:
    notes = exported("w8a8-spinquant", "cpu").json("report.json")["transforms"]
    assert notes["rotation"]["logit_difference"] < 1e-3 * notes["rotation"]["logit_rms"]
    assert notes["rotation"]["orthogonality_error"] < 1e-12
    assert notes["rotation"]["kind"] == "randomised Hadamard"
    assert notes["rotation"]["R1, of the residual stream"] == "Hadamard of 64, full"
    assert notes["rotation"]["R2, of each head's values"] == "Hadamard of 8, full"
    in_blocks = "Hadamard of 172 in 43 blocks, as no full one is known"
    assert notes["rotation"]["R4, at run time before down_proj"] == in_blocks
    assert notes["calibration"]["windows"] == WINDOWS
    assert len(notes["sensitivity (nats)"]) == 5 * 4, "every trial"
    assert in_blocks in page(exported("w8a8-spinquant", "cpu"))
    report = exported("w8a8-spinquant", "cpu").json("report.json")
    kept = {name for name in report["transforms"]["kept at higher precision"] if name != "linears"}
    for record in report["layers"]:
        assert set(record["weights"].values()) == {"int8, per channel"}
        for linear in record["weights"]:
            name = f"layers.{record['layer']}.{linear}.weight"
            assert (linear in record["int8_inputs"]) == (name not in kept)
    cache = exported("w8a8-spinquant:kv=int8", "cpu").json("report.json")["transforms"][
        "int8 cache"
    ]
    assert cache["R3, at run time, of queries and keys"] == "Hadamard of 8, full"
    plain = exported("w4a16-gptq:kv=int8", "cpu").json("report.json")["transforms"]["int8 cache"]
    assert plain["R3, at run time, of queries and keys"] == "none"


def page(bundle: Bundle) -> str:
    """The report as a browser would show its text."""
    return html.unescape((bundle.path / "report" / "index.html").read_text("utf-8"))


@pytest.mark.parametrize(("rows", "shown"), [(40, 40), (41, 20)])
def test_a_long_table_is_cut_short_on_the_page_alone(
    exported: Callable[[str, str], Bundle], rows: int, shown: int
) -> None:
    content = exported("w4a16-gptq", "cpu").json("report.json")
    content["transforms"]["sensitivity (nats)"] = {f"trial-{i}.": 0.5 for i in range(rows)}
    found = report_html(content)
    assert [f"trial-{i}." in found for i in range(rows)] == [i < shown for i in range(rows)]
    assert (f"The first 20 of {rows}; report.json has them all." in found) == (shown < rows)


def test_a_session_carries_an_int8_cache(exported: Callable[[str, str], Bundle]) -> None:
    session = Session.open(exported("w4a16-gptq:kv=int8", "cpu"), exact=True)
    ids = session.text.encode("Once upon a time there was a little girl named Lily.")
    whole = session.run([ids])
    begun = session.run([ids[:5]])
    rest = session.run([ids[5:]], begun.state)
    np.testing.assert_allclose(rest.logits[0], whole.logits[0, 5:], atol=0.02)
    again = session.run([ids[5:6]], begun.state)
    np.testing.assert_allclose(again.logits[0], whole.logits[0, 5:6], atol=0.02)


def test_a_small_head_is_smaller(exported: Callable[[str, str], Bundle]) -> None:
    sizes = [
        exported(scheme, "cpu").manifest.files["model.onnx.data"].bytes
        for scheme in (SMALL_HEAD, "w4a16-spinquant")
    ]
    assert sizes[0] < sizes[1] - 512 * 64 // 3


def test_the_embedding_cannot_be_a_small_head(
    stories260k: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    quant = f"w4a16-spinquant{FOUR_BITS},head=w4,rotation=none"
    with pytest.raises(EdgeattnError, match="a matrix of its own"):
        export(stories260k, recipe_of(texts, quant=quant), tmp_path / "bundle")
    assert left_behind(tmp_path) == []


def test_auto_keeps_what_reads_the_text_better(
    stories260k: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    quant = f"w4a16-spinquant{FOUR_BITS},rotation=auto"
    recipe = Recipe(
        "cpu", quant=quant, calibration=texts["calibration"], calibration_windows=WINDOWS
    )
    report = export(stories260k, recipe, tmp_path / "bundle", verify=False)
    found = report.transforms["rotation=auto"]
    least = min(found["perplexity rotated"], found["perplexity not rotated"])
    assert found[f"perplexity {found['chosen']}"] == least
    assert ("rotation" in report.transforms) == (found["chosen"] == "rotated")


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def recipe_of(texts: dict[str, str], **fields: Any) -> Recipe:
    values = {"quant": f"w4a16-gptq{FOUR_BITS}", "calibration": texts["calibration"]}
    return Recipe("cpu", **{"calibration_windows": 2, **values, **fields})


def test_a_budget_that_is_missed_leaves_no_bundle(
    stories260k: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    asked = {"quant": f"w4a16-gptq{FOUR_BITS},refit=off", "eval_text": texts["eval_text"]}
    recipe = recipe_of(texts, **asked, max_ppl_increase="0%")
    with pytest.raises(ProofError, match="perplexity") as caught:
        export(stories260k, recipe, tmp_path / "bundle", verify=False)
    assert caught.value.details["increase"] > 0
    assert "bundle" not in left_behind(tmp_path)
    kept = recipe_of(texts, **asked, max_ppl_increase="50%")
    report = export(stories260k, kept, tmp_path / "bundle", verify=False)
    assert report.quality is not None
    assert report.quality.increase == pytest.approx(caught.value.details["increase"])
    assert left_behind(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"calibration": None}, UsageError, "pass --calibration FILE"),
        ({"calibration_windows": 10**6}, EdgeattnError, "windows"),
        ({"max_ppl_increase": "10%"}, UsageError, "--eval-text"),
        ({"max_ppl_increase": "much"}, UsageError, "10%"),
        ({"quant": "w4a16-gptq:group=32"}, EdgeattnError, "down_proj=w8"),
        ({"rotations": "learned.safetensors"}, UsageError, "a scheme that rotates"),
    ],
)
def test_refusals_come_in_a_sentence_and_leave_nothing(
    stories260k: Path,
    texts: dict[str, str],
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[EdgeattnError],
    part: str,
) -> None:
    with pytest.raises(error, match=part):
        export(stories260k, recipe_of(texts, **fields), tmp_path / "bundle")
    assert left_behind(tmp_path) == []


def test_a_dry_run_asks_for_the_text_too(stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--calibration"):
        plan_export(stories260k, Recipe("cpu", quant="w8a8"), tmp_path / "bundle")


def test_stopped_work_goes_on_and_refuses_another_recipe(
    stories260k: Path,
    texts: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeattn.calibration.store import LayerStore

    write = LayerStore.write

    def stop_after_two(self: LayerStore, layer: int, *rest: Any) -> None:
        write(self, layer, *rest)
        if layer == 1:
            raise KeyboardInterrupt

    whole = export(stories260k, recipe_of(texts), tmp_path / "whole", verify=False)
    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "write", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            export(stories260k, recipe_of(texts), tmp_path / "bundle", verify=False)
    assert left_behind(tmp_path) == [".bundle.layers", "whole"]
    with pytest.raises(UsageError, match="another model, recipe or calibration text"):
        export(stories260k, recipe_of(texts, calibration_windows=3), tmp_path / "bundle")
    written: list[int] = []
    monkeypatch.setattr(
        LayerStore, "write", lambda *arguments: (written.append(arguments[1]), write(*arguments))
    )
    resumed = export(stories260k, recipe_of(texts), tmp_path / "bundle", verify=False)
    assert written == [2, 3, 4]
    assert resumed.graph.weight_sha256 == whole.graph.weight_sha256
    assert left_behind(tmp_path) == ["bundle", "whole"]


def test_a_text_of_other_bytes_is_refused(stories260k: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("Déjà vu, größer als".encode("latin-1") * 1000)
    with pytest.raises((UsageError, RuntimeInputError), match="UTF-8"):
        export(
            stories260k, recipe_of({"calibration": str(text)}), tmp_path / "bundle", verify=False
        )


def test_quality_is_that_of_the_exported_graph(
    exported: Callable[[str, str], Bundle], texts: dict[str, str]
) -> None:
    bundle = exported("w4a16-spinquant", "cpu")
    stored = json.loads((bundle.path / "manifest.json").read_text())["quality"]
    assert math.isclose(
        stored["increase"], stored["perplexity"] / stored["reference_perplexity"] - 1
    )
    text, sizes = read_text(Path(texts["eval_text"])), (stored["windows"], stored["length"])
    found = perplexity(Session.open(bundle, exact=True), text, windows=sizes[0], length=sizes[1])
    assert stored["perplexity"] == pytest.approx(found.perplexity, rel=1e-4)
    assert f">{stored['perplexity']:.5g}</td>" in page(bundle)
    assert "Quality" in page(bundle)
