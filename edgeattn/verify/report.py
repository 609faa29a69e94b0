"""report/index.html: one self-contained page of what was asked, done and proven."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def report_html(report: Mapping[str, Any]) -> str:
    """Renders the content of report.json as a page that needs no script and no network.

    Args:
        report: as `edgeattn.pipeline` writes it to report.json.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = _figure
    template = (files("edgeattn.verify") / "report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(report=report, agreements=_agreements(report))


def _agreements(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each implementation with the worst comparison of each kind of tensor, in full."""
    found = []
    for agreement in report["verification"]["agreements"] if report["verification"] else []:
        rows = {row["tensor"]: row for row in agreement["comparisons"]}
        worst = [{**rows[name], "group": group} for group, name in agreement["worst"].items()]
        found.append({**agreement, "worst": worst})
    return found


def _figure(value: object) -> str:
    """A number with as many digits as mean something."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
