"""Curves as SVG: places of lines, points and ticks, ready for the template to write down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Reads the number that is drawn from a point of report.json.
Value = Callable[[Mapping[str, Any]], float]

# The picture in its own units, and its margins.
WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 30, 42
# The same for the template.
MARGINS = {
    "width": WIDTH,
    "height": HEIGHT,
    "left": LEFT,
    "right": RIGHT,
    "bottom": BOTTOM,
}
_MOST_TICKS = 5
# Points of the curve of training; each is a mean, as single steps differ by their texts.
_TRAINING_POINTS = 10
# From here on tokens are counted by the thousand, which leaves the labels short.
_MANY = 10_000


class Point(NamedTuple):
    """A place in the picture, and what it stands for."""

    x: float
    y: float
    label: str


class Line(NamedTuple):
    """One curve.

    Attributes:
        label: what it is.
        points: from the left.
    """

    label: str
    points: list[Point]

    @property
    def path(self) -> str:
        """The points as SVG's polyline wants them."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


class Plot(NamedTuple):
    """A picture and its numbers.

    Attributes:
        name: for ids.
        title: what is shown.
        about: how it came about, "predicted" or "measured".
        x_label: name and unit.
        y_label: name and unit.
        x_ticks: place and label.
        y_ticks: place and label.
        lines: one or more.
        header: of the table.
        rows: of the table, numbers as text.
        joined: whether the points are one curve.
    """

    name: str
    title: str
    about: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    header: list[str]
    rows: list[list[str]]
    joined: bool = True


def plots(report: Mapping[str, Any]) -> list[Plot]:
    """All that the report has numbers for: those that were measured first."""
    measured = (density_plot(report), training_plot(report))
    return [plot for plot in measured if plot is not None] + cost_plots(report)


def training_plot(report: Mapping[str, Any]) -> Plot | None:
    """Recovery training: divergence from the original against the steps, as means of a few."""
    losses = report["transforms"].get("recovery training", {}).get("losses", ())
    if not losses:
        return None
    each = -(-len(losses) // _TRAINING_POINTS)
    parts = [losses[begin : begin + each] for begin in range(0, len(losses), each)]
    points = [
        (min((i + 1) * each, len(losses)), sum(part) / len(part)) for i, part in enumerate(parts)
    ]
    ticks = _ticks(max(loss for _, loss in points))
    drawn = [
        Point(_across(step / len(losses)), _up(loss / ticks[-1]), f"{loss:.4g} at step {step:,}")
        for step, loss in points
    ]
    return Plot(
        "training",
        "Recovery training",
        f"Measured on the text it learned from, before each step; a point is the mean of {each} "
        "steps up to its place.",
        "steps",
        "divergence from the original [nats]",
        [(_across(share), f"{share * len(losses):,.0f}") for share in (0, 0.5, 1)],
        _scale(ticks),
        [Line("next token's distribution", drawn)],
        ["Steps", "Divergence"],
        [[f"{step:,}", f"{loss:.4g}"] for step, loss in points],
    )


def cost_plots(report: Mapping[str, Any]) -> list[Plot]:
    """Memory, and what a decode step reads or reaches, against the context: all predicted.

    Of an encoder time or, where no rate is known, operations.
    """
    curves = report["costs"]
    if not curves or len(curves[0]["points"]) < 2:
        return []
    if "operations" in curves[0]["points"][0]:
        return [_encoder_cost(curves, report["lowering"]["target"])]
    highest = max(p["memory_bytes"] for curve in curves for p in curve["points"])
    scale, unit = _byte_unit(highest)
    memory = _by_context(
        "memory",
        "Memory by context",
        "Predicted by arithmetic: weights and cache of all rows; activations, workspace and the "
        "runtime itself come on top.",
        f"weights and cache [{unit}]",
        curves,
        lambda point: point["memory_bytes"] / scale,
    )
    if curves[0]["points"][0]["tokens_per_s"] is not None:
        return [memory, _speed(curves, report["lowering"]["target"])]
    moved = _by_context(
        "bytes",
        "Bytes of a decode step by context",
        "Predicted by arithmetic: weights, and what a step needs of the cache. This target's "
        "bandwidth is not known, so that no time follows from it.",
        f"read by a decode step [{unit}]",
        curves,
        lambda point: point["moved_bytes"] / scale,
    )
    return [memory, moved]


def _encoder_cost(curves: Sequence[Mapping[str, Any]], target: str) -> Plot:
    """Of one pass; a batch has the rows of the recipe."""
    if curves[0]["points"][0]["seconds"] is not None:
        return _by_context(
            "time",
            "Time of a pass by length",
            f"Predicted by the roofline of {target}, never measured: the least its arithmetic and "
            "memory allow, without kernels' losses, launches and the host.",
            "time at least, all rows [ms]",
            curves,
            lambda point: 1000 * point["seconds"],
        )
    return _by_context(
        "operations",
        "Operations of a pass by length",
        "Predicted by arithmetic: linear layers and attention. This target's rates are not known, "
        "so that no time follows from it.",
        "operations, all rows [10⁹]",
        curves,
        lambda point: point["operations"] / 1e9,
    )


def _speed(curves: Sequence[Mapping[str, Any]], target: str) -> Plot:
    fastest = max(p["tokens_per_s"] for curve in curves for p in curve["points"])
    many, unit = (1000, "thousand tokens/s") if fastest >= _MANY else (1, "tokens/s")
    return _by_context(
        "speed",
        "Decoding by context",
        f"Predicted by the roofline of {target}, never measured: what its memory or its arithmetic "
        "allows at most, without kernels' losses, launches and the host.",
        f"{unit} at most, all rows",
        curves,
        lambda point: point["tokens_per_s"] / many,
    )


def _by_context(
    name: str, title: str, about: str, label: str, curves: Sequence[Mapping[str, Any]], value: Value
) -> Plot:
    contexts = [point["context"] for point in curves[0]["points"]]
    drawn = _distinct({c["label"]: [value(point) for point in c["points"]] for c in curves})
    ticks = _ticks(max(map(max, drawn.values())))
    low, high = math.log(contexts[0]), math.log(contexts[-1])
    places = {c: _across((math.log(c) - low) / (high - low)) for c in contexts}
    lines = []
    for curve, numbers in drawn.items():
        points = [
            Point(places[c], _up(n / ticks[-1]), f"{curve}: {n:,.4g} at {c:,} tokens")
            for c, n in zip(contexts, numbers, strict=True)
        ]
        lines.append(Line(curve, points))
    every = 2 if len(contexts) > _MOST_TICKS else 1
    shown = contexts[::-1][::every][::-1]  # the longest context is always among them
    return Plot(
        name,
        title,
        about,
        "context [tokens]",
        label,
        [(places[context], f"{context:,}") for context in shown],
        _scale(ticks),
        lines,
        ["Context", *drawn],
        [
            [f"{context:,}", *(f"{numbers[i]:,.4g}" for numbers in drawn.values())]
            for i, context in enumerate(contexts)
        ],
    )


def _distinct(curves: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Of curves that are the same only the first, for the others would hide it."""
    found: dict[str, list[float]] = {}
    for label, numbers in curves.items():
        if numbers not in found.values():
            found[label] = numbers
    return found


def density_plot(report: Mapping[str, Any]) -> Plot | None:
    """Perplexity against the share of heads that are active: measured points, and no others."""
    notes, quality = report["transforms"].get("head sparsity", {}), report["quality"]
    rows = notes.get("layers", ())
    if not rows:
        return None
    density = sum(row["slots"] / row["units"] for row in rows) / len(rows)
    points = []
    if quality is not None:
        points += [
            ("the checkpoint, fp32, evaluation text", 1.0, quality["reference_perplexity"]),
            ("this bundle, evaluation text", density, quality["perplexity"]),
        ]
    for text in notes.get("texts", ()):
        points += [
            (f"calibration, all heads, {text['text']}", 1.0, text["dense"]),
            (f"calibration, with routers, {text['text']}", density, text["sparse"]),
        ]
    if not points:
        return None
    ticks = _ticks(max(perplexity for _, _, perplexity in points))
    return Plot(
        "density",
        "Perplexity by share of active heads",
        "Measured: every point is a model that was run. Nothing is drawn between them, as no "
        "other density was measured.",
        "active heads [% of all]",
        "perplexity",
        [(_across(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)],
        _scale(ticks),
        [
            Line(label, [Point(_across(x), _up(y / ticks[-1]), f"{label}: {y:.4g} at {x:.1%}")])
            for label, x, y in points
        ],
        ["Model and text", "Active heads", "Perplexity"],
        [[label, f"{x:.1%}", f"{y:.4g}"] for label, x, y in points],
        joined=False,
    )


def _across(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _up(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _ticks(highest: float) -> list[float]:
    """From zero to the first round number that is not below the highest value."""
    rough = max(highest, 1e-12) / (_MOST_TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [step * n for n in range(math.ceil(highest / step - 1e-9) + 1)]


def _scale(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return [(_up(tick / ticks[-1]), f"{tick:,g}") for tick in ticks]


def _byte_unit(highest: float) -> tuple[float, str]:
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB")) if highest >= s), (1e3, "kB"))
