"""report/index.html: one self-contained page, made of report.json alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from edgeattn.verify.report.curves import MARGINS, plots
from edgeattn.verify.report.heat_maps import heat_maps
from edgeattn.verify.report.summary import budget, command, fallbacks, key_figures
from edgeattn.verify.report.tables import (
    agreements,
    graph_rows,
    layer_rows,
    note_tables,
    recipe_rows,
    size_rows,
)

_TEMPLATES = files("edgeattn.verify.report")
# Of sizes: 1000 bytes are 1 kB, as disks and memories are sold.
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def report_html(report: Mapping[str, Any]) -> str:
    """Renders the content of report.json as a page that needs no script and no network.

    Args:
        report: as `edgeattn.pipeline` writes it to report.json.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: (_TEMPLATES / name).read_text("utf-8")),
    )
    environment.filters.update(figure=figure, percent=percent, size=size)
    return environment.get_template("index.html.j2").render(
        report=report,
        agreements=agreements(report),
        budget=budget(report),
        command=command(report),
        fallbacks=fallbacks(report),
        graph_rows=_written(graph_rows(report)),
        heat_maps=heat_maps(report),
        key_figures=key_figures(report),
        layers=layer_rows(report),
        notes=note_tables(report),
        plot_size=MARGINS,
        plots=plots(report),
        quality_rows=_written((report["quality"] or {}).items()),
        recipe_rows=_written(recipe_rows(report)),
        size_rows=size_rows(report),
    )


def _written(rows: Iterable[tuple[str, object]]) -> list[tuple[str, str]]:
    return [(name, figure(value)) for name, value in rows]


def figure(value: object) -> str:
    """A number with as many digits as mean something; a list by its items."""
    if isinstance(value, list | tuple):
        return ", ".join(map(figure, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def percent(share: object) -> str:
    """A share in percent; what is no number stays as it is."""
    return f"{100 * share:.3g} %" if isinstance(share, int | float) else str(share)


def size(count: float) -> str:
    """A number of bytes in a unit that fits."""
    unit = min(int(math.log(max(count, 1), 1000)), len(_UNITS) - 1)
    return f"{count / 1000**unit:.3g} {_UNITS[unit]}"
