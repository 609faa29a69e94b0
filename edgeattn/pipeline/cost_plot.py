"""A picture of what a model and others with fewer heads cost, against the context."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.bundle.whole_file import write_bytes
from edgeattn.errors import MissingDependencyError, UsageError
from edgeattn.pipeline.plan import TRADEOFF, Candidate, Plan
from edgeattn.pipeline.work import require_output
from edgeattn.planner.cost import StepCost, step_cost, with_heads
from edgeattn.planner.published_heads import CONTEXTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
_SHORTEST = 1024
_STEPS_PER_OCTAVE = 4
_MOST_LINES = 5
# Okabe and Ito's colours, which people who see few of them tell apart; black is the model's own.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def require_plot(path: Path, *, force: bool) -> None:
    """Refuses a plot that cannot be drawn or written, before any work.

    Raises:
        UsageError: the name does not end in one of `FORMATS`.
        MissingDependencyError: matplotlib is missing.
        BundleError: the file is there, or its folder is not.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            expected=f"a plot whose name ends in {' or '.join(FORMATS)}",
            came=f"it is {path.name}",
            todo="choose such a name",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            expected="matplotlib, to draw a plot",
            came="it is missing",
            todo="pip install 'edgeattn[report]', or leave out --plot",
        )
    require_output(path, force=force)


def write_plot(plan: Plan, path: Path) -> None:
    """Draws memory, FLOPs and cost of a plan's candidates; the file appears whole or not at all.

    Raises:
        BundleError: the disk refuses.
    """
    write_bytes(path, cost_plot(plan, path.suffix.lower().removeprefix(".")))


def drawn_candidates(plan: Plan) -> list[Candidate]:
    """The model, the published best or else one of fewer heads, and the model with KV merged."""
    half = [c for c in plan.candidates if 2 * c.heads.query <= plan.shape.num_heads]
    best = plan.published_candidate or max(half, key=lambda c: c.heads.query, default=None)
    merged = [c for c in plan.candidates if c.change == "merge KV" and c is not best]
    fewer = [] if best is None or best is plan.own else [best]
    return [plan.own, *fewer, *merged][:_MOST_LINES]


def drawn_contexts(plan: Plan) -> list[int]:
    """From 1,024 tokens on as far as the published table, and to twice the context asked for."""
    first, last = min(_SHORTEST, plan.context), max(CONTEXTS[-1], 2 * plan.context)
    steps = math.ceil(_STEPS_PER_OCTAVE * math.log2(last / first))
    return [round(first * 2 ** (step / _STEPS_PER_OCTAVE)) for step in range(steps + 1)]


def cost_plot(plan: Plan, file_format: str) -> bytes:
    """The picture in a format of matplotlib's.

    Args:
        plan: whose candidates are drawn.
        file_format: "png" or "svg".
    """
    from matplotlib.figure import Figure

    contexts = drawn_contexts(plan)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for candidate, colour, dashes in zip(drawn_candidates(plan), _COLOURS, _DASHES, strict=False):
        steps = _steps(plan, candidate, contexts)
        curves = (
            [step.memory_bytes / 1e9 for step in steps],
            [step.flops / plan.lowering.batch / 1e9 for step in steps],
            [step.cost(TRADEOFF) for step in steps],
        )
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(
                contexts, curve, color=colour, linestyle=dashes, label=_label(plan, candidate)
            )
    _finish(plan, panels)
    handles, labels = panels[-1].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    legend.set_title("heads/KV heads")
    lowering = plan.lowering
    rows = f"{lowering.batch} rows" if lowering.batch > 1 else "1 row"
    figure.suptitle(
        f"{plan.model}, {lowering.scheme.label}, {lowering.dtype}, {rows}: decoding on "
        f"{plan.target.device.name}, by arithmetic"
    )
    written = io.BytesIO()
    metadata = {"Software": None} if file_format == "png" else {"Date": None}
    figure.savefig(written, format=file_format, dpi=150, metadata=metadata)
    return written.getvalue()


def _steps(plan: Plan, candidate: Candidate, contexts: Sequence[int]) -> list[StepCost]:
    shape, batch = with_heads(plan.shape, candidate.heads), plan.lowering.batch
    return [step_cost(shape, plan.lowering, context, batch) for context in contexts]


def _label(plan: Plan, candidate: Candidate) -> str:
    heads = f"{candidate.heads.query}/{candidate.heads.kv}"
    if candidate is plan.own:
        return f"{heads}: this model"
    best = ", published best" if candidate is plan.published_candidate else ""
    return f"{heads}: {candidate.change}{best}"


def _finish(plan: Plan, panels: Sequence[Axes]) -> None:
    """Scales, names, the context asked for, and the device's memory."""
    from matplotlib.ticker import LogLocator, NullFormatter

    titles = ("weights and cache [GB]", "GFLOP per token", "cost Z [arbitrary unit]")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("context [tokens]")
        axes.set_ylabel(title)
        axes.grid(True, which="major", color="0.88")
        label = f"{plan.context:,} tokens, asked for"
        axes.axvline(plan.context, color="0.55", linewidth=1, label=label)
    memory = plan.target.device.memory
    # a line far above all curves would only press them together
    if memory is not None and memory.total_gb < 2 * panels[0].get_ylim()[1]:
        panels[0].axhline(memory.total_gb, color="0.55", linewidth=1)
        panels[0].annotate(
            f"memory of {plan.target.device.name}, {memory.total_gb:g} GB",
            (0.02, memory.total_gb),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            verticalalignment="top",
            fontsize=8,
            color="0.35",
        )


def _tokens(value: float) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"
