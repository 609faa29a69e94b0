"""`edgeattn doctor`: will a model or bundle work on a target, and what is this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.pipeline.findings import Diagnosis

_EPILOG = """\b
Examples:
  edgeattn doctor
  edgeattn doctor ./Llama-3-8B --target jetson-orin-nano --context 4096
  edgeattn doctor HuggingFaceTB/SmolLM2-135M --target jetson-orin-nano --quant w4-rtn
  edgeattn doctor ./bundle --target jetson-orin@jetpack6.2
"""
# Readable without colour.
_MARKS = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "problem": ("x", "red")}


@click.command("doctor", epilog=_EPILOG)
@click.argument("subject", required=False, metavar="[MODEL|BUNDLE]")
@click.option("--target", metavar="NAME[@SOFTWARE]", help="Where it shall run [this machine].")
@click.option("--context", type=click.IntRange(min=1), help="Longest sequence in tokens.")
@click.option("--batch", type=click.IntRange(min=1), help="Most rows at once.")
@click.option("--quant", metavar="NAME[:k=v,…]", help="Scheme of a MODEL, as for export.")
@click.option("--dtype", metavar="fp32|fp16|bf16", help="Of a MODEL; default: the target's.")
@click.option("--attention", multiple=True, metavar="NAME[:k=v,…]", help="Variant of a MODEL.")
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    subject: str | None,
    target: str | None,
    offline: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Say whether MODEL or BUNDLE will work on a target, and how to make it; alone, what is here.

    Of a MODEL no weights are read: a folder with config.json is enough. Memory is arithmetic and
    what it assumes is said; nothing is built or written. The exit code is 1 when it will not work.
    """
    from edgeattn.pipeline.doctor import diagnose

    given = {name: value for name, value in asked.items() if value not in (None, ())}
    diagnosis = diagnose(subject, target=target, asked=given, offline=offline)
    if as_json:
        click.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        _show(diagnosis)
    click.get_current_context().exit(0 if diagnosis.works else 1)


def _show(diagnosis: Diagnosis) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in diagnosis.findings:
        mark, colour = _MARKS[finding.level]
        said = Text(finding.found)
        if finding.fix:
            said.append(f"\n→ {finding.fix}")
        table.add_row(Text(mark, style=colour), finding.about, said)
    Console().print(table)
    what = diagnosis.subject or "this machine"
    where = f" on {diagnosis.target}" if diagnosis.subject and diagnosis.target else ""
    problems = sum(finding.level == "problem" for finding in diagnosis.findings)
    count = {0: "no problem", 1: "one problem"}.get(problems, f"{problems} problems")
    click.echo(f"{what}{where}: {count} found")
