"""`edgeattn plan`: what it prints and draws, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.2 1B without its weights: a plan needs none."""
    return write(tmp_path_factory.mktemp("checkpoint") / "llama", {})


def write(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_1B | config))
    return path


@pytest.fixture
def plan(edgeattn: Callable[..., Any], llama: Path) -> Callable[..., Any]:
    """Runs the verb on it, for an L4 and its whole context."""

    def run(*options: object, model: object = llama, target: str = "l4") -> Any:
        return edgeattn("plan", model, "--target", target, *options)

    return run


@pytest.fixture
def planned(plan: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The JSON object of the same."""

    def run(*options: object, **place: object) -> dict[str, Any]:
        done = plan(*options, "--json", **place)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


def sentence(done: Any, exit_code: int) -> str:
    assert done.exit_code == exit_code, done.output
    line: str = done.stderr.strip().splitlines()[-1]
    assert line.startswith("edgeattn: expected ")
    return line


def test_what_it_prints(plan: Callable[..., Any]) -> None:
    done = plan("--quant", "w4-rtn", "--context", 131072)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].endswith("w4-rtn, fp16, 1 row of 131,072 tokens; predicted, nothing measured")
    own = next(line for line in lines if line.rstrip().endswith("this model"))
    assert own.split()[:2] == ["32/8", "1.24"]
    best = next(line for line in lines if line.rstrip().endswith("*"))
    assert best.split()[0] == "8/1"
    assert "8/1 at loss 2.6, nearest to 2.615" in done.stdout
    assert "…" not in done.stdout, "cut off"
    assert max(len(line.rstrip()) for line in lines if "train anew" in line) <= 80


def test_figures_are_whole_in_a_narrow_terminal(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    said = plan().output
    assert "train anew" in said
    assert "…" not in said


def test_every_candidate_is_ranked(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned("--context", 32768)
    costs = [candidate["cost"] for candidate in found["candidates"]]
    assert costs == sorted(costs)
    assert len(costs) == 21
    own = found["own"]
    assert (own["heads"], own["kv_heads"], own["change"]) == (32, 8, "none")
    assert own["relative_cost"] == 1
    assert own["equal_cost_parameters"] == pytest.approx(own["step"]["parameters"], abs=1)
    changes = {(c["heads"], c["kv_heads"]): c["change"] for c in found["candidates"]}
    assert changes[32, 4] == "merge KV"
    assert changes[32, 32] == "repeat KV"
    assert changes[16, 8] == "train anew"
    speeds = {(c["heads"], c["kv_heads"]): c["prediction"] for c in found["candidates"]}
    assert speeds[32, 1]["tokens_per_s"] > speeds[32, 8]["tokens_per_s"]
    # 2.47 GB of weights and 32 KiB per token, at 300 GB/s
    moved = 2 * 1.2358e9 + 32768 * 32768
    assert speeds[32, 8]["tokens_per_s"] == pytest.approx(300e9 / moved, rel=1e-3)
    assert own["paper"]["values"] == pytest.approx(1.2358e9 + 32768 * 16384, rel=1e-4)


def test_rows_and_precision_count(planned: Callable[..., dict[str, Any]]) -> None:
    one, several = planned("--context", 8192), planned("--context", 8192, "--batch", 8)
    assert several["own"]["step"]["cache_bytes"] == 8 * one["own"]["step"]["cache_bytes"]
    shares = [run["gains"]["head_sparsity"][0]["cache_share"] for run in (one, several)]
    assert shares[0] < shares[1]
    assert not one["gains"]["head_sparsity"][0]["worth_it"]
    assert several["gains"]["head_sparsity"][0]["worth_it"]


def test_not_worth_it_is_said(plan: Callable[..., Any]) -> None:
    done = plan("--context", 1024)
    assert done.stdout.count("not worth its loss") == 4


def test_a_context_beyond_the_checkpoints(
    planned: Callable[..., dict[str, Any]], plan: Callable[..., Any], tmp_path: Path
) -> None:
    short = write(tmp_path / "short", {"max_position_embeddings": 2048})
    done = plan("--context", 16384, model=short)
    assert done.exit_code == 0, done.output
    assert "was trained for 2,048 tokens: this is what it would cost" in done.stdout
    assert planned(model=short)["context"] == 2048
    whole, own = planned("--context", 16384), planned("--context", 16384, model=short)
    assert whole["own"]["step"] == own["own"]["step"]


def test_the_table_is_read_by_size_or_loss(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned("--context", 65536)
    assert (found["reference_parameters"], found["loss"]) == (1.2e9, 2.615)
    assert found["published"]["heads"] == [16, 2]
    assert planned("--context", 65536, "--loss", 2.9)["published"]["heads"] == [8, 1]
    assert planned("--context", 65536, "--loss", 2)["published"]["heads"] is None
    assert planned("--context", 4096)["published"] is None


def test_a_table_for_other_heads_marks_none(
    plan: Callable[..., Any], planned: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    wide = write(tmp_path / "wide", {"head_dim": 128})
    done = plan("--context", 131072, model=wide)
    assert "for heads 64 wide (this model's: 128)" in done.stdout
    assert "*" not in done.stdout
    small = write(tmp_path / "small", {"num_hidden_layers": 4})
    found = planned("--context", 131072, model=small)
    assert (found["reference_parameters"], found["published"]["heads"]) == (None, None)
    assert "no loss is published for a model of this size" in plan(model=small).stdout


def test_a_target_without_figures(plan: Callable[..., Any]) -> None:
    done = plan("--context", 1024, target="cpu")
    assert done.exit_code == 0, done.output
    assert "no figures of cpu: measure there, with edgeattn run" in done.stdout
    assert "tokens/s, bound" not in done.stdout


def test_int8_products_have_their_own_rate(plan: Callable[..., Any]) -> None:
    figures = "102 GB/s, 16.5 TFLOP/s in fp16, 33 TOP/s in int8, in power mode MAXN_SUPER"
    asked = ("--context", 4096, "--quant")
    assert figures in plan(*asked, "w8a8", target="orin-nano").stdout
    assert "int8" not in plan(*asked, "w8-rtn", target="orin-nano").stdout


def test_a_target_without_a_peak_rate(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned("--context", 1024, target="dgx-spark")["own"]["prediction"]
    assert (found["bound"], found["prompt_s"]) == ("memory alone", None)


def test_what_does_not_fit_has_no_speed(
    plan: Callable[..., Any], planned: Callable[..., dict[str, Any]]
) -> None:
    asked: tuple[object, ...] = ("--context", 131072, "--batch", 8)
    found = planned(*asked, target="orin-nano")
    assert (found["own"]["fits"], found["own"]["prediction"]) == (False, None)
    fitting = [c for c in found["candidates"] if c["fits"]]
    assert fitting
    assert all(c["step"]["memory_bytes"] <= 8e9 and c["prediction"] for c in fitting)
    text = plan(*asked, target="orin-nano").stdout
    assert "DO NOT FIT in 8 GB" in text
    assert "too large" in text
    assert "in power mode MAXN_SUPER" in text


def test_groups_that_divide_no_width_are_left_out(
    planned: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    narrow = write(tmp_path / "narrow", {"head_dim": 32})
    found = planned("--quant", "w4-rtn", model=narrow)
    assert min(candidate["heads"] for candidate in found["candidates"]) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batch", 0), "a positive batch"),
        (("--context", -1), "a positive context"),
        (("--context", 10**400), "at most 1,073,741,824"),
        (("--batch", 2**30 + 1), "at most 1,073,741,824"),
        (("--quant", "w5"), "a known quantisation scheme"),
        (("--dtype", "fp8"), "a known dtype"),
        (("--loss", "nan"), "a loss that is a number"),
    ],
)
def test_refusals_of_usage(
    plan: Callable[..., Any], options: tuple[object, ...], told: str
) -> None:
    assert told in sentence(plan(*options), 2)


def test_refusals(plan: Callable[..., Any], tmp_path: Path) -> None:
    assert "did you mean" in sentence(plan(target="l44"), 2)
    assert "int4" in sentence(plan("--quant", "w4-rtn", target="t4"), 1)
    sentence(plan(model=tmp_path / "nothing"), 1)
    refused = plan("--batch", 0, "--json")
    assert json.loads(refused.stdout)["exit_code"] == 2


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot(plan: Callable[..., Any], tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"cost{suffix}"
    done = plan("--context", 32768, "--plot", file)
    assert done.exit_code == 0, done.output
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert "there is one" in sentence(plan("--plot", file), 1)
    assert file.read_bytes() == content
    assert plan("--plot", file, "--force", "--json").exit_code == 0


def test_what_is_drawn(llama: Path) -> None:
    from edgeattn.pipeline.cost_plot import drawn_candidates, drawn_contexts
    from edgeattn.pipeline.plan import plan_model
    from edgeattn.recipe import Recipe

    found = plan_model(llama, Recipe("l4", context=65536))
    heads = [tuple(candidate.heads) for candidate in drawn_candidates(found)]
    assert heads == [(32, 8), (16, 2), (32, 1), (32, 2), (32, 4)], "the table's is second"
    unknown = plan_model(llama, Recipe("l4", context=65536), loss=9)
    assert [tuple(c.heads) for c in drawn_candidates(unknown)][:2] == [(32, 8), (16, 1)]
    contexts = drawn_contexts(found)
    assert (contexts[0], contexts[-1]) == (1024, 131072)
    assert contexts == sorted(set(contexts))
    assert drawn_contexts(plan_model(llama, Recipe("l4", context=1)))[0] == 1
    assert drawn_contexts(plan_model(llama, Recipe("l4", context=100_000)))[-1] >= 200_000


def test_a_plot_without_matplotlib(
    plan: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    told = sentence(plan("--plot", tmp_path / "cost.png"), 1)
    assert "pip install 'edgeattn[report]'" in told
    assert list(tmp_path.iterdir()) == []


def test_a_plot_of_no_known_kind(plan: Callable[..., Any], tmp_path: Path) -> None:
    assert ".png or .svg" in sentence(plan("--plot", tmp_path / "cost.gif"), 2)
    assert "a folder for" in sentence(plan("--plot", tmp_path / "no" / "cost.png"), 1)


def test_it_needs_no_torch(llama: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = None\n"
        "from edgeattn.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "plan", str(llama), "--target", "l4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
