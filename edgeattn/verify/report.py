"""report/index.html: one self-contained page of what was asked, done and proven."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from edgeattn.verify.compare import group_of


def report_html(report: Mapping[str, Any]) -> str:
    """Renders the content of report.json as a page that needs no script and no network.

    Args:
        report: as `edgeattn.pipeline` writes it to report.json.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = _figure
    template = (files("edgeattn.verify") / "report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        report=report, agreements=[_worst_rows(a) for a in _agreements(report)]
    )


def _agreements(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    verification = report["verification"]
    found: list[dict[str, Any]] = verification["agreements"] if verification else []
    return found


def _worst_rows(agreement: dict[str, Any]) -> dict[str, Any]:
    """The agreement with, for each kind of tensor, the comparison nearest to its bound."""
    worst: dict[str, dict[str, Any]] = {}
    for row in agreement["comparisons"]:
        group = group_of(row["tensor"])
        used = float(row["error"]) / row["allowed"]
        if group not in worst or used > worst[group]["used"]:
            worst[group] = {**row, "group": group, "used": used}
    return {**agreement, "worst": list(worst.values())}


def _figure(value: object) -> str:
    """A number with as many digits as mean something."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
