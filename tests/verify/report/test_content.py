"""What the page says: the figures of report.json, in words, tables and pictures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest


def test_it_shows_the_figures_of_report_json(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    text = " ".join(render(content).all("body")[0][1].split())
    for figure in (
        "12,345",  # nodes
        "1,234,567",
        "1.23 MB",
        "31% of the checkpoint",
        "640 bytes",
        "+4.72 %",
        "12.345",
        "11.789",
        "91.7 %",
        "0.0314",
        "47.2 % of the budget is used",
        "0.00123",
        "0.00402",
        "✓ ok",
        "4.2 s",
    ):
        assert figure in text, figure


def test_every_head_has_its_cell(content: dict[str, Any], render: Callable[..., Any]) -> None:
    page = render(content)
    rows = content["transforms"]["polynomial heads"]["layers"]
    cells = [
        text for attributes, text in page.all("td") if re.match(r"h\d", attributes.get("class", ""))
    ]
    heads = sum(len(row["degree"]) for row in rows)
    assert len(cells) == 3 * heads, "error, bound and mass"
    expected = [
        f"{'exact' if degree is None else f'degree {degree}'} {100 * error:.3g} %"
        for row in rows
        for degree, error in zip(row["degree"], row["error"], strict=True)
    ]
    assert cells[:heads] == expected
    assert cells[heads].endswith("3.25")
    assert cells[-1].endswith("88.7 %")


def test_shades_grow_with_the_number(content: dict[str, Any], render: Callable[..., Any]) -> None:
    page = render(content)
    cells = page.all("td")
    shades = {
        float(text.removesuffix(" %").split()[-1]): int(found[1])
        for attributes, text in cells
        if (found := re.match(r"h(\d)", attributes.get("class", "")))
    }
    errors = [100 * e for e in content["transforms"]["polynomial heads"]["layers"][0]["error"]]
    found = [shades[float(f"{error:.3g}")] for error in sorted(errors)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_layers_that_are_alike_share_a_row(
    sparse: dict[str, Any], render: Callable[..., Any]
) -> None:
    table = next(text for _, text in render(sparse).all("table") if "Layers" in text)
    assert "1–2" in table
    assert "softmax in 6 of 9 heads while decoding" in table
    assert "down_proj: int8, per channel" in table
    assert "router finds 74.6% of the strongest" in table


def test_what_fell_back_is_told_with_its_reason(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    content["transforms"]["rotation"] = {
        "R4": "Hadamard of 172 in 43 blocks, as no full one is known"
    }
    content["transforms"]["kept at higher precision"] = {
        "linears": "1",
        "layers.3.mlp.down_proj.weight": "",
    }
    content["transforms"]["polynomial heads"]["layers"][4] |= {
        "skipped": "it sees a window alone",
        "degree": [],
    }
    content["verification"]["tensorrt"] = {
        "status": "not checked",
        "reason": "there is none here",
    } | {
        "parser_errors": [],
        "engine_bytes": None,
    }
    text = render(content).all("body")[0][1]
    for part in (
        "R4: Hadamard of 172 in 43 blocks no full one is known",
        "Kept at higher precision: layers.3.mlp.down_proj",
        "Layer 4 without polynomials it sees a window alone",
        "ragged decoding: the context is too short",
        "2.71 % of the rows",
        "TensorRT: not checked there is none here",
        "174 of 261 heads stay exact",
    ):
        assert part in text, part


def test_nothing_fell_back(content: dict[str, Any], render: Callable[..., Any]) -> None:
    content["transforms"], content["quality"] = {}, None
    content["verification"]["left_out"] = []
    page = render(content)
    assert "Nothing: every layer is as it was asked for." in page.all("body")[0][1]
    assert "Quality" not in [text for _, text in page.all("h2")]


def test_curves_are_the_reports_points(content: dict[str, Any], render: Callable[..., Any]) -> None:
    page = render(content)
    titles = [text for _, text in page.all("title")]
    for point in content["costs"][1]["points"]:
        memory = point["memory_bytes"] / 1e6
        assert f"the model in fp16: {memory:,.4g} at {point['context']:,} tokens" in titles
    assert "never measured" in page.all("figure")[1][1]
    (first, _), (second, _) = page.all("polyline")[:2]
    lines = [
        [tuple(map(float, p.split(","))) for p in line["points"].split()]
        for line in (first, second)
    ]
    for (x, y), (other_x, other_y) in zip(*lines, strict=True):
        assert x == other_x
        base = 198.0  # zero: the model that is twice as large stands twice as high
        assert base - other_y == pytest.approx(2 * (base - y), abs=0.2)


def test_a_curve_that_is_the_same_is_drawn_once(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    content["costs"][1]["points"] = copy.deepcopy(content["costs"][0]["points"])
    assert len(render(content).all("polyline")) == 2, "one in each picture"


def test_an_encoder_has_time_or_operations_by_length(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    lengths = ((128, 2_000_000_000, 0.001), (256, 5_000_000_000, 0.0025))
    points = [dict(zip(("context", "operations", "seconds"), row, strict=True)) for row in lengths]
    content["costs"] = [{"label": "this bundle", "points": points}]
    (table,) = (text.split() for _, text in render(content).all("table") if "[ms]" in text)
    assert table[-4:] == ["128", "1", "256", "2.5"]
    for point in points:
        point["seconds"] = None
    (table,) = (text.split() for _, text in render(content).all("table") if "[10⁹]" in text)
    assert table[-4:] == ["128", "2", "256", "5"]


def test_density_shows_measured_points_alone(
    sparse: dict[str, Any], render: Callable[..., Any]
) -> None:
    texts = [{"text": "other.txt", "dense": 21.5, "sparse": 25.75}]
    sparse["transforms"]["head sparsity"]["texts"] = texts
    page = render(sparse)
    titles = [text for _, text in page.all("title")]
    density = f"{(9 + 6 + 6) / 27:.1%}"
    assert f"this bundle, evaluation text: {12.345:.4g} at {density}" in titles
    assert "the checkpoint, fp32, evaluation text: 11.79 at 100.0%" in titles
    assert f"calibration, with routers, other.txt: 25.75 at {density}" in titles
    figure = next(text for _, text in page.all("figure") if "active heads" in text)
    assert "Nothing is drawn between them" in figure
    sparse["quality"] = None
    del sparse["transforms"]["head sparsity"]["texts"]
    assert "active heads [%" not in render(sparse).all("body")[0][1], "there is nothing to draw"


@pytest.mark.parametrize(("used", "word"), [(0.05, "50 %"), (-0.02, "0 %")])
def test_the_budget(
    content: dict[str, Any], used: float, word: str, render: Callable[..., Any]
) -> None:
    content["quality"]["increase"] = used
    assert f"{word} of the budget is used" in render(content).all("body")[0][1]


def test_a_failure_is_told(content: dict[str, Any], render: Callable[..., Any]) -> None:
    content["verification"]["passed"] = False
    row = content["verification"]["agreements"][0]["comparisons"][0]
    row |= {"error": "inf", "passed": False}
    text = render(content).all("body")[0][1]
    assert "Not proven" in text
    assert "✗ FAILED" in text
    assert "Proven:" not in text


def test_regrouped_heads_layer_by_layer(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    groups = [[0, 1], [2]]
    content["transforms"] = {
        "regrouped heads": {
            "layer 0": "for the command line",
            "layers": [{"layer": 0, "groups": groups, "key_loss": 0.3456, "value_loss": 0.5}],
        }
    }
    page = render(content)
    done = next(text for _, text in page.all("table") if "Layers" in text)
    assert "KV heads averaged: 0 + 1, 2" in done
    (lost,) = (text.split() for a, text in page.all("table") if a.get("class") == "heat")
    assert lost[-8:] == ["layer", "keys", "values", "0", "34.6", "%", "50", "%"]
    content["transforms"]["regrouped heads"]["layers"][0]["groups"] = [[0], [0], [1], [1]]
    page = render(content)
    assert "copies of KV heads 0, 0, 1, 1" in page.all("body")[0][1]
    assert not [a for a, _ in page.all("table") if a.get("class") == "heat"]


def test_training_is_a_curve_of_means(content: dict[str, Any], render: Callable[..., Any]) -> None:
    losses = [4.0, 2.0] * 6 + [1.0] * 13
    content["transforms"] = {"recovery training": {"steps": 25, "losses": losses}}
    page = render(content)
    (table,) = (text.split() for _, text in page.all("table") if "Divergence" in text)
    numbers = [float(word) for word in table[-18:]]
    assert numbers[::2] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert numbers[1::2] == [3.333, 2.667, 3.333, 2.667, 1, 1, 1, 1, 1]
    assert "mean of 3 steps" in page.all("body")[0][1]
    assert "4, 2, 4" not in page.all("body")[0][1]


def test_an_encoder_is_said_to_have_no_cache(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    asked = {"kv_cache": "growing", "logits": "all", "calibration_windows": 64}
    content["recipe"] |= asked
    content["lowering"]["kv_cache"] = "concat"
    names = {text for _, text in render(content).all("th")}
    assert names >= {"kv_cache", "kv cache", "logits"}
    assert "calibration_windows" not in names
    content["shape"]["kind"] = "encoder"
    names = {text for _, text in render(content).all("th")}
    assert not names & {"kv_cache", "kv cache", "logits"}


def test_the_command_is_one_that_the_command_line_takes(
    content: dict[str, Any], render: Callable[..., Any]
) -> None:
    content["model"] = "a model; rm -rf"
    ((_, found),) = page_commands = render(content).all("pre")
    assert len(page_commands) == 1
    assert found == (
        "edgeattn export 'a model; rm -rf' --target jetson-orin --quant w4-rtn "
        "--attention fft-rope --eval-text 'a novel.txt' --max-ppl-increase 10% -o out"
    )
