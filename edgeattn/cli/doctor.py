"""`edgeattn doctor`: will a model or bundle work on a target, and what is this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import DTYPE, PATH, SCHEME, TARGET, VARIANT
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.pipeline.findings import Diagnosis

_EXAMPLES = """
  edgeattn doctor
  edgeattn doctor ./Llama-3-8B --target jetson-orin-nano --context 4096
  edgeattn doctor HuggingFaceTB/SmolLM2-135M --target jetson-orin-nano --quant w4-rtn
  edgeattn doctor ./bundle --target jetson-orin@jetpack6.2
"""
# Readable without colour.
_MARKS = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "problem": ("x", "red")}


@click.command(
    "doctor",
    cls=Verb,
    examples=_EXAMPLES,
    reads="config.json of MODEL, or the bundle BUNDLE; alone, what this machine is",
    writes="nothing",
    codes={1: "it will not work, and what would is said; or refused"},
)
@click.argument("subject", required=False, type=PATH, metavar="[MODEL|BUNDLE]")
@click.option(
    "--target",
    type=TARGET,
    metavar="NAME[@SOFTWARE]",
    show_default="this machine",
    help="Where it shall run.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    show_default="the checkpoint's",
    help="Longest sequence.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="ROWS",
    show_default="1",
    help="Most rows at once.",
)
@click.option(
    "--quant",
    type=SCHEME,
    metavar="NAME[:k=v,…]",
    show_default="none",
    help="Scheme of a MODEL, as for export.",
)
@click.option(
    "--dtype", type=DTYPE, metavar="fp32|fp16|bf16", show_default="the target's", help="Of a MODEL."
)
@click.option(
    "--attention", type=VARIANT, multiple=True, metavar="NAME[:k=v,…]", help="Variant of a MODEL."
)
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
