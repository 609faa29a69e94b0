"""`edgeattn ops`: the operators of domain edgeattn, and the dossier of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from edgeattn.cli.names import OPERATOR
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.ops.spec import OpSpec, TensorSpec

_EXAMPLES = """
  edgeattn ops
  edgeattn ops RecurrentLinearAttention
  edgeattn ops --json
"""


@click.command(
    "ops",
    cls=Verb,
    examples=_EXAMPLES,
    reads="edgeattn's own operators",
    writes="nothing but what it prints",
)
@click.argument("name", required=False, type=OPERATOR)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(name: str | None, as_json: bool) -> None:
    """List the operators, or what one of them means, takes and gives."""
    from edgeattn.ops import ALL_OPS, find_op

    specs = (find_op(name),) if name else ALL_OPS
    if as_json:
        click.echo(json.dumps({"ops": [spec.to_dict() for spec in specs]}, indent=2))
    elif name:
        _show(specs[0])
    else:
        _list(specs)


def _list(specs: tuple[OpSpec, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for title in ("inputs", "outputs", "Triton", "plugin"):
        table.add_column(title)
    for spec in specs:
        inputs, outputs = (" ".join(t.name for t in side) for side in (spec.inputs, spec.outputs))
        kernel, plugin = ("yes" if has else "no" for has in (spec.triton, spec.plugin))
        table.add_row(spec.name, inputs, outputs, kernel, plugin)
    Console().print(table)
    click.echo("every operator has a reference in torch and a function body in standard ONNX")


def _show(spec: OpSpec) -> None:
    click.echo(f"edgeattn::{spec.name}, version {spec.to_dict()['version']}\n")
    click.echo(spec.meaning + "\n")
    for title, side in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        click.echo(f"{title}:")
        for tensor in side:
            click.echo(f"  {_tensor(tensor)}")
    if spec.attributes:
        click.echo("attributes:")
    for attribute in spec.attributes:
        default = "required" if attribute.default is None else f"default {attribute.default}"
        click.echo(f"  {attribute.name}: {attribute.type}, {default}")
    click.echo("tolerance, beside twice the error of plain torch in that dtype:")
    for dtype, tolerance in spec.tolerance.items():
        click.echo(f"  {dtype}: {tolerance.floor:g} ({tolerance.reason})")


def _tensor(tensor: TensorSpec) -> str:
    shape = ", ".join(map(str, tensor.shape))
    state = f", the next {tensor.updates}" if tensor.updates else ""
    return f"{tensor.name} [{shape}], {' or '.join(tensor.dtypes)}{state}"
