"""Heat maps of layers and heads: tables whose cells have a colour and, always, their number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Shades of the style sheet, from nothing to most.
SHADES = 7
_WEIGHT = re.compile(r"layers\.(\d+)\.(?:\w+\.)?(\w+)\.weight")


class Cell(NamedTuple):
    """A head of a layer.

    Attributes:
        text: its number.
        shade: from 0 to `SHADES` - 1; None where nothing was measured.
        mark: a word above the number, or none.
    """

    text: str
    shade: int | None
    mark: str = ""


class HeatMap(NamedTuple):
    """One number of each head, or each linear layer.

    Attributes:
        title: what is shown.
        about: how to read it.
        columns: their names.
        rows: names of layers, and their cells.
        low: where the scale of shades begins.
        high: where it ends; what lies beyond has the strongest shade.
    """

    title: str
    about: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    low: str
    high: str


def heat_maps(report: Mapping[str, Any]) -> list[HeatMap]:
    """All that the report has numbers for."""
    notes = report["transforms"]
    found = _regrouped(notes.get("regrouped heads", {}))
    found += _polynomials(notes.get("polynomial heads", {}))
    found += _activity(notes.get("head sparsity", {}))
    return found + _sensitivity(notes.get("sensitivity (nats)", {}))


def _regrouped(notes: Mapping[str, Any]) -> list[HeatMap]:
    rows = notes.get("layers", ())
    if not any(len(group) > 1 for row in rows for group in row["groups"]):
        return []
    losses = [(row["layer"], [row["key_loss"], row["value_loss"]], ["", ""]) for row in rows]
    found = _by_head(
        "What averages of KV heads lose",
        "Share of the energy of a layer's keys, and of its values, that averages of the aligned "
        "heads do not have, on the calibration text and before any training.",
        losses,
        _SHARES,
        _percent,
    )
    return [found._replace(columns=["keys", "values"])]


def _polynomials(notes: Mapping[str, Any]) -> list[HeatMap]:
    rows = [row for row in notes.get("layers", ()) if row["degree"]]
    if not rows:
        return []
    marks = [["exact" if d is None else f"degree {d}" for d in row["degree"]] for row in rows]
    return [
        _by_head(
            "Error and back end of each head",
            "Relative error of a head's output with the polynomial in every row, on the worst "
            f"window that it was not fitted to; {_percent(notes['tolerance'])} are allowed. Heads "
            "marked “exact” keep exact attention: the number is what the best polynomial would "
            "have cost. Where it is allowed, too many rows would have been beyond the bound.",
            [(row["layer"], row["error"], mark) for row, mark in zip(rows, marks, strict=True)],
            _Scale(0.001, 1.0, is_log=True),
            _percent,
        ),
        _by_head(
            "Score bound of each head",
            "Up to this distance of a score from its row's centre the polynomial is used; a row "
            "that may lie beyond is computed exactly.",
            [
                (row["layer"], row["score_bound"], mark)
                for row, mark in zip(rows, marks, strict=True)
            ],
            _Scale(*_ends(rows, "score_bound"), is_log=True),
            lambda value: f"{value:.3g}",
        ),
        _by_head(
            "Softmax weight of the keys that stay exact",
            "First keys and nearest ones together, on the mean over rows: what is left is weighed "
            "by the polynomial.",
            [(row["layer"], row["near_mass"], mark) for row, mark in zip(rows, marks, strict=True)],
            _SHARES,
            _percent,
        ),
    ]


def _activity(notes: Mapping[str, Any]) -> list[HeatMap]:
    rows = [row for row in notes.get("layers", ()) if row["active"]]
    if not rows:
        return []
    return [
        _by_head(
            "How often each head is active",
            "Share of the tokens of held-out windows for which the router chose the head while "
            "decoding. Layers that are not here keep all heads.",
            [(row["layer"], row["active"], [""] * len(row["active"])) for row in rows],
            _SHARES,
            _percent,
        )
    ]


def _sensitivity(notes: Mapping[str, float]) -> list[HeatMap]:
    """Layers by linear layers; nothing where a trial is of another kind."""
    cells: dict[int, dict[str, float]] = {}
    for trial, increase in notes.items():
        for name in trial.split(", "):
            match = _WEIGHT.fullmatch(name)
            if match is None:
                return []
            cells.setdefault(int(match[1]), {})[match[2]] = increase
    if not cells:
        return []
    columns = list(dict.fromkeys(name for layer in sorted(cells) for name in cells[layer]))
    most = max(notes.values())
    rows = []
    for layer in sorted(cells):
        found = [cells[layer].get(name) for name in columns]
        rows.append((f"{layer}", [_increase(value, most) for value in found]))
    return [
        HeatMap(
            "Sensitivity of each linear layer",
            "By how many thousandths of a nat the loss rises when it alone is quantised, or the "
            "linear layers that share its input. A loss that falls is chance, and has no shade.",
            columns,
            rows,
            "0",
            f"{1000 * max(0.0, most):.3g}",
        )
    ]


def _increase(value: float | None, most: float) -> Cell:
    if value is None:
        return Cell("–", None)
    text = f"{1000 * value:.3g}".replace("-", "−")
    return Cell(text, _Scale(0.0, max(0.0, most)).shade(value))


def _by_head(
    title: str,
    about: str,
    layers: Sequence[tuple[int, Sequence[float], Sequence[str]]],
    scale: _Scale,
    text: Callable[[float], str],
) -> HeatMap:
    rows = [
        (
            f"{layer}",
            [Cell(text(v), scale.shade(v), mark) for v, mark in zip(values, marks, strict=True)],
        )
        for layer, values, marks in layers
    ]
    columns = [f"{head}" for head in range(max(len(values) for _, values, _ in layers))]
    return HeatMap(title, about, columns, rows, text(scale.low), text(scale.high))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _ends(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The least positive number and the greatest of all heads."""
    numbers = [value for row in rows for value in row[name] if value > 0]
    return (min(numbers), max(numbers)) if numbers else (1.0, 1.0)


class _Scale(NamedTuple):
    """Numbers from `low` to `high`, by their logarithm or as they are."""

    low: float
    high: float
    is_log: bool = False

    def shade(self, value: float) -> int:
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if high <= low:
            return 0
        share = (value - low) / (high - low)
        if self.is_log:
            share = math.log(value / low) / math.log(high / low)
        return min(int(share * SHADES), SHADES - 1)


_SHARES = _Scale(0.0, 1.0)
