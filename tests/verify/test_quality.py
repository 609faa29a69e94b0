"""Quality of exported graphs against transformers, the runtime's perplexity, and by hand."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
import torch

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import BundleError, CheckpointError, ProofError, RuntimeInputError, UsageError
from edgeattn.models import stream
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import model_of
from edgeattn.planner.lowering import Lowering
from edgeattn.runtime import Session, perplexity
from edgeattn.verify import quality as module
from edgeattn.verify.quality import (
    Quality,
    check_budget,
    eval_windows,
    measure_quality,
    parse_budget,
)

TEXT = "A bridge is proven by the load it carries, and a model by the tokens it predicts. " * 60
# Windows that do not fill the batches of the walk.
SIZES = {"windows": 5, "length": 40, "skip_characters": 100}


def windows_of(checkpoint: Path, text: str = TEXT, **sizes: int) -> np.ndarray:
    tokenizer = open_checkpoint(checkpoint).text["tokenizer.json"]
    return eval_windows(text, tokenizer, **{**SIZES, **sizes})


def measured(checkpoint: Path, bundle: Path, windows: Any = None, **options: Any) -> Quality:
    opened = Bundle.open(bundle, check_hashes=False)
    return measure_quality(
        model_of(open_checkpoint(checkpoint)),
        opened.model_file,
        Lowering.from_dict(opened.manifest.lowering),
        windows_of(checkpoint) if windows is None else windows,
        **options,
    )


def transformers_logits(checkpoint: Path, windows: np.ndarray) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = hf(torch.from_numpy(windows)).logits
    return logits


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("config", "kv_cache"),
    [
        ({}, "shared-buffer"),
        ({"model_type": "mistral", "sliding_window": 7, "tie_word_embeddings": False}, "concat"),
    ],
)
def test_an_exact_export_loses_nothing_and_the_reference_is_what_transformers_finds(
    random_checkpoint: Callable[..., Path],
    export_tiny: Callable[..., Path],
    config: dict[str, Any],
    kv_cache: str,
) -> None:
    checkpoint = random_checkpoint(**config)
    bundle = export_tiny(model=checkpoint, verify=False)
    assert Bundle.open(bundle).manifest.lowering["kv_cache"] == kv_cache
    windows = windows_of(checkpoint)
    found = measured(checkpoint, bundle, windows)
    logits = transformers_logits(checkpoint, windows)[:, :-1].flatten(0, 1).double()
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(windows[:, 1:]).flatten())
    assert found.reference_perplexity == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert abs(found.increase) < 1e-5
    assert found.kl < 1e-9
    assert found.top1_agreement == 1
    assert (found.windows, found.length, found.tokens) == (5, 40, 195)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_lossy_graph_beside_transformers_and_plain_onnxruntime(
    tiny_checkpoint: Path, export_tiny: Callable[..., Path]
) -> None:
    """Every figure from two implementations that know nothing of ours, in fp64."""
    bundle = export_tiny("cpu", "w4-rtn:group=32", verify=False)
    windows = windows_of(tiny_checkpoint)
    found = measured(tiny_checkpoint, bundle, torch.from_numpy(windows))
    session = Session.open(bundle, exact=True)
    graph = np.concatenate([session.run(row[None]).logits[:, :-1] for row in windows])
    p = log_softmax64(transformers_logits(tiny_checkpoint, windows)[:, :-1].numpy())
    q = log_softmax64(graph)
    targets = windows[:, 1:, None]
    nll = {name: -np.take_along_axis(log, targets, -1).mean() for name, log in (("p", p), ("q", q))}
    assert found.perplexity == pytest.approx(math.exp(nll["q"]), rel=1e-9)
    assert found.reference_perplexity == pytest.approx(math.exp(nll["p"]), rel=1e-5)
    assert found.increase == pytest.approx(math.exp(nll["q"] - nll["p"]) - 1, rel=1e-3)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert found.kl > 1e-4
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean() < 1


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_figures_of_a_window_by_hand(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: type
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    rng = np.random.default_rng(1)
    expected = (20 * rng.standard_normal((29, 97)) + 300).astype(np.float32)
    found = (expected + rng.standard_normal(expected.shape)).astype(dtype)
    ids = rng.integers(0, 97, 30)
    sums = module._compare(torch.from_numpy(expected), found, ids)
    p, q = log_softmax64(expected), log_softmax64(found)
    places = np.arange(29)
    assert sums.reference_nll == pytest.approx(-p[places, ids[1:]].sum(), rel=1e-12)
    assert sums.nll == pytest.approx(-q[places, ids[1:]].sum(), rel=1e-12)
    assert sums.kl == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-10)
    assert sums.agreeing == (expected.argmax(1) == found.argmax(1)).sum()


def test_figures_are_those_of_eval(
    stories260k: Path, shared_dir: Path, export_tiny: Callable[..., Path]
) -> None:
    bundle = export_tiny("cpu", "w8-rtn", model=stories260k, verify=False)
    novel = (shared_dir / "data" / "austen" / "emma.txt").read_text("utf-8")
    wanted = perplexity(Session.open(bundle, exact=True), novel, windows=2)
    tokenizer = open_checkpoint(stories260k).text["tokenizer.json"]
    found = measured(stories260k, bundle, eval_windows(novel, tokenizer, windows=2))
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-9)
    assert (found.windows, found.length, found.tokens) == (2, 512, wanted.tokens)
    assert abs(found.increase) < 0.01
    assert 0.95 < found.top1_agreement < 1


@pytest.mark.parametrize(("dtype", "kl"), [("fp16", 1e-5), ("bf16", 1e-4)])
def test_narrow_graphs(
    tiny_checkpoint: Path, export_tiny: Callable[..., Path], dtype: str, kl: float
) -> None:
    """fp16 logits are read as they are; bf16 ones come from the widened graph."""
    found = measured(
        tiny_checkpoint, export_tiny("jetson-orin@jetpack7.2", dtype=dtype, verify=False)
    )
    assert 0 < found.kl < kl
    assert found.top1_agreement > 0.98


@pytest.fixture
def exact(tiny_checkpoint: Path, export_tiny: Callable[..., Path]) -> Path:
    """A bundle of the tiny checkpoint in fp32, as the first test above has it."""
    return export_tiny(model=tiny_checkpoint, verify=False)


def spoiled(bundle: Path, copy: Path, name: str, value: float) -> Path:
    """A copy of the bundle in which the first number of a weight is another."""
    shutil.copytree(bundle, copy)
    graph = onnx.load(copy / "model.onnx", load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(copy / "model.onnx.data", np.float32, "r+", int(place["offset"]), (1,))
    data[0] = value
    data.flush()
    return copy


def test_a_wrong_weight_is_seen(tiny_checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    wrong = spoiled(exact, tmp_path / "wrong", "layers.1.mlp.down_proj.weight", 10.0)
    found = measured(tiny_checkpoint, wrong)
    assert found.kl > 1e-3
    assert found.top1_agreement < 1
    assert found.reference_perplexity == measured(tiny_checkpoint, exact).reference_perplexity


def test_a_graph_that_gives_nan_is_refused(
    tiny_checkpoint: Path, exact: Path, tmp_path: Path
) -> None:
    wrong = spoiled(exact, tmp_path / "nan", "norm.weight", math.nan)
    with pytest.raises(ProofError, match="finite logits from the exported graph"):
        measured(tiny_checkpoint, wrong)


def test_windows_are_independent_of_the_batch(
    tiny_checkpoint: Path, exact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(tiny_checkpoint, exact)
    monkeypatch.setattr(stream, "BATCH", 1)
    done: list[tuple[int, int]] = []
    single = measured(tiny_checkpoint, exact, progress=lambda *counted: done.append(counted))
    assert single.reference_perplexity == pytest.approx(whole.reference_perplexity, rel=1e-6)
    assert done == [(i, 8) for i in range(1, 9)]  # 3 layers, 5 windows


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (np.zeros(5, int), r"shape is \[5\]"),
        (np.zeros((2, 1), int), "windows of 2 to 256 tokens"),
        (np.zeros((1, 257), int), r"shape is \[1, 257\]"),
        (np.zeros((0, 9), int), r"shape is \[0, 9\]"),
        (np.full((1, 9), 272), "from 0 to 271, but there is 272"),
        (np.full((1, 9), -1), "there is -1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, exact: Path, windows: np.ndarray, words: str
) -> None:
    with pytest.raises(RuntimeInputError, match=words):
        measured(tiny_checkpoint, exact, windows)


def test_the_context_asked_for_is_the_limit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from edgeattn.devices.registry import parse_target
    from edgeattn.planner.lowering import plan_lowering
    from edgeattn.recipe import Recipe

    lowering = plan_lowering(Recipe("cpu", context=16), parse_target("cpu"))
    model = model_of(open_checkpoint(tiny_checkpoint))
    with pytest.raises(RuntimeInputError, match="windows of 2 to 16 tokens"):
        measure_quality(model, tmp_path, lowering, np.zeros((1, 17), int))
    with pytest.raises(BundleError, match="those of the last position only"):
        measure_quality(model, tmp_path, replace(lowering, logits="last"), np.zeros((1, 9), int))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"windows": 0}, "number of windows of at least 1"),
        ({"length": 1}, "length of a window of at least 2"),
        ({"skip_characters": -1}, "at least 0"),
    ],
)
def test_numbers_that_are_too_small_are_refused(
    tiny_checkpoint: Path, changed: dict[str, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        windows_of(tiny_checkpoint, **changed)


def test_texts_that_cannot_be_cut_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(RuntimeInputError, match="has 20 tokens there, enough for 0 windows"):
        windows_of(tiny_checkpoint, "x" * 120)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json in the checkpoint"):
        eval_windows(TEXT, None)


LOST = Quality(12.0, 10.0, 0.2, 0.03, 0.9, 12, 512, 6132)


@pytest.mark.parametrize("allowed", [0.2, 0.5])
def test_a_budget_that_is_kept(allowed: float) -> None:
    check_budget(LOST, allowed)
    check_budget(replace(LOST, increase=-0.01), 0.0)


def test_a_budget_that_is_exceeded() -> None:
    with pytest.raises(ProofError) as refused:
        check_budget(LOST, 0.1)
    assert str(refused.value) == (
        "expected a perplexity at most 10 % above the checkpoint's, but it rose by 20 %, "
        "from 10.000 to 12.000: choose a scheme that loses less, or allow more"
    )
    assert refused.value.details == LOST.to_dict()


@pytest.mark.parametrize(
    ("text", "share"),
    [("10%", 0.1), ("0.1", 0.1), ("0", 0.0), ("0%", 0.0), (" 2.5 % ", 0.025), ("250%", 2.5)],
)
def test_budgets_are_read(text: str, share: float) -> None:
    assert parse_budget(text) == share


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-1%", "'-1%' is negative"),
        ("-0.1", "'-0.1' is negative"),
        ("", "'' is no number"),
        ("%", "'%' is no number"),
        ("ten", "'ten' is no number"),
        ("nan", "'nan' is no number"),
        ("inf", "'inf' is no number"),
        ("10%%", "'10%%' is no number"),
        ("10", "10 would be 1000%: write 10% if you mean that"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_budget(text)


def test_a_budget_is_read_without_torch() -> None:
    program = (
        "from edgeattn.verify.quality import parse_budget; parse_budget('1%')\n"
        "import sys; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
