"""Tables and figures that more than one verb prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.pipeline.calibrate_routers import RoutersReport
    from edgeattn.planner.polynomial_heads import Layer, PolynomialHeads


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    if count < 1e6:
        return f"{count / 1e3:,.1f} kB"
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def print_verification(
    verification: Mapping[str, Any], *, builder: bool = True, error_stream: bool = False
) -> None:
    """Prints, for each implementation, the worst tensor of each kind against its bound.

    Args:
        verification: as `Verification.to_dict` gives it.
        builder: also print what TensorRT's parser and builder said.
        error_stream: print on standard error.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=error_stream)
    for agreement in verification["agreements"]:
        table = Table(box=box.SIMPLE, title=f"torch reference = {agreement['backend']}")
        table.add_column("worst of", no_wrap=True)
        for heading in ("error", "plain torch", "allowed"):
            table.add_column(heading, justify="right")
        table.add_column("")
        rows = {row["tensor"]: row for row in agreement["comparisons"]}
        for group, tensor in agreement["worst"].items():
            row = rows[tensor]
            keys = ("error", "low_precision_error", "allowed")
            figures = (f"{float(row[key]):.2e}" for key in keys)
            table.add_row(group, *figures, "ok" if row["passed"] else "FAILED")
        console.print(table)
        if (same := agreement["top1_agreement"]) is not None:
            console.print(
                f"same most likely token {same:.1%}, KL {float(agreement['kl']):.1e} nats"
            )
        if agreement.get("amplified"):
            console.print(
                f"{agreement['amplified']} tensors are beyond the usual bound: the model amplifies "
                "last bits, and each of its layers alone is within it"
            )
        if agreement["first_bad"]:
            console.print(f"the first error is in {agreement['first_bad']}")
    for case in verification.get("left_out", ()):
        click.echo(f"not run: {case}", err=error_stream)
    if builder:
        click.echo(_tensorrt_line(verification["tensorrt"]), err=error_stream)


def print_routers(report: RoutersReport) -> None:
    """Prints what each layer does, and what that costs on each text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("layer", "active", "density", "recall"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        recall = "dense" if layer.recall is None else f"{layer.recall:.1%}"
        table.add_row(str(layer.layer), str(layer.slots), f"{layer.density:.1%}", recall)
    Console().print(table)
    for text in report.texts:
        click.echo(
            f"{text.text}: perplexity {text.sparse:.3f}, with all heads {text.dense:.3f} "
            f"({text.increase:+.2%})"
        )
    if report.worst is not None and len(report.texts) > 1:
        click.echo(f"the worst text is {report.worst.text}")
    seconds = sum(report.seconds.values())
    click.echo(f"{report.path}: routers for {report.attention} ({seconds:.1f} s)")


def _tensorrt_line(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "TensorRT: no part in this target"
    if report["status"] == "built":
        seconds = (report["seconds_parse"] or 0) + (report["seconds_build"] or 0)
        return (
            f"TensorRT-RTX {report['version']} parsed and built it for SM{report['sms'][0]}: "
            f"{report['layers']} layers, engine {(report['engine_bytes'] or 0) / 1e6:.1f} MB, "
            f"{seconds:.1f} s (not run on the device)"
        )
    return f"TensorRT-RTX for SM{report['sms'][0]}: {report['status']}, {report['reason']}"


def print_polynomial_heads(heads: PolynomialHeads) -> None:
    """Prints what was measured of each layer's heads; single heads are in the file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    degree = heads.degree
    table = Table(
        box=box.SIMPLE,
        title=f"medians over heads, errors of degree {degree}: fitted, and Taylor's",
        caption="FFT is never cheaper than features for plain RoPE, whose scores factorise",
    )
    headings = ("layer", "heads", "degree", "std", "range", "sink", "near")
    for heading in (*headings, "best", "median", "Taylor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, layer in enumerate(heads.layers):
        row = ["-", "exact"] if layer.skipped else _layer_row(layer, degree)
        table.add_row(str(index), *row)
    Console().print(table)
    for reason in dict.fromkeys(layer.skipped for layer in heads.layers if layer.skipped):
        skipped = [str(i) for i, layer in enumerate(heads.layers) if layer.skipped == reason]
        click.echo(f"not measured: layer {', '.join(skipped)} ({reason})")


def _layer_row(layer: Layer, degree: int) -> list[str]:
    def median(name: str) -> float:
        return statistics.median(float(getattr(head, name)) for head in layer.heads)

    fitted, taylor = (
        [head.error(degree, fitted=one) or 0.0 for head in layer.heads]
        for one in (degree % 2 == 0, False)
    )
    errors = (min(fitted), statistics.median(fitted), statistics.median(taylor))
    return [
        f"{layer.passed}/{len(layer.heads)}",
        "exact" if layer.degree is None else str(layer.degree),
        f"{median('spread'):.1f}",
        f"{median('lowest'):.0f}…{median('highest'):.0f}",
        f"{median('sink_mass'):.0%}",
        f"{median('near_mass'):.0%}",
        *(f"{error:.1%}" for error in errors),
    ]
