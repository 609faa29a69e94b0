"""Tables that more than one verb prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeattn.verify.verify import Verification


def print_verification(verification: Verification) -> None:
    """Prints, for each implementation, the worst tensor of each kind against its bound."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for agreement in verification.agreements:
        table = Table(box=box.SIMPLE, title=f"torch reference = {agreement.backend}")
        table.add_column("worst of")
        table.add_column("tensor")
        for heading in ("error", "plain torch", "allowed"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for group, row in agreement.worst_per_group().items():
            figures = (f"{v:.2e}" for v in (row.error, row.low_precision_error, row.allowed))
            table.add_row(group, row.tensor, *figures, "ok" if row.passed else "FAILED")
        console.print(table)
        console.print(f"same most likely token {agreement.top1:.1%}, KL {agreement.kl:.1e} nats")
        if agreement.first_bad:
            console.print(f"the first error is in {agreement.first_bad}")
    console.print(_tensorrt_line(verification), markup=False, highlight=False)


def _tensorrt_line(verification: Verification) -> str:
    report = verification.tensorrt
    if report is None:
        return "TensorRT: no part in this target"
    if report.status == "built":
        return (
            f"TensorRT-RTX {report.version} parsed and built it for SM{report.sm}: "
            f"{report.layers} layers, engine {(report.engine_bytes or 0) / 1e6:.1f} MB, "
            f"{(report.seconds_parse or 0) + (report.seconds_build or 0):.1f} s "
            "(not run on the device)"
        )
    return f"TensorRT-RTX for SM{report.sm}: {report.status}, {report.reason}"
