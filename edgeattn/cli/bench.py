"""`edgeattn bench`: how fast a bundle is on this machine, and two such measurements compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import BACKEND, PATH, PROVIDER, TARGET
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.runtime.bench_record import BenchRecord, Comparison, Moment

_EXAMPLES = """
  edgeattn bench ./bundle
  edgeattn bench ./bundle --tokens 512 --new-tokens 128 --repeats 10 -o int4.json
  edgeattn bench ./encoder --tokens 256 --rows 8 --json
  edgeattn bench ./bundle --device jetson-orin-nano-8gb -o orin.json
  edgeattn bench --compare fp16.json int4.json
"""
_FILE = click.Path(path_type=Path)


@click.command(
    "bench",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the bundle BUNDLE, or two records",
    writes="with --output the record, as JSON",
)
@click.argument("bundle", required=False, type=PATH, metavar="BUNDLE")
@click.option("--compare", "pair", nargs=2, type=_FILE, metavar="A.json B.json", help="Ratios B/A.")
@click.option(
    "--backend",
    type=BACKEND,
    metavar="NAME",
    default="onnxruntime",
    help="onnxruntime, or tensorrt.",
)
@click.option(
    "--engine",
    type=_FILE,
    metavar="FILE",
    show_default="the newest here",
    help="With --backend tensorrt: which.",
)
@click.option(
    "--provider",
    type=PROVIDER,
    metavar="NAME",
    default="cpu",
    help="Of ONNX Runtime: cpu, cuda or tensorrt.",
)
@click.option("--threads", type=int, show_default="all cores", help="Threads of one operator.")
@click.option("--exact", is_flag=True, help="Quantised weights: fp32 sums, as proven; slower.")
@click.option(
    "--tokens",
    type=int,
    metavar="TOKENS",
    show_default="128, or the context",
    help="Of the prompt or text.",
)
@click.option("--new-tokens", type=int, metavar="TOKENS", show_default="64", help="Decode steps.")
@click.option("--rows", default=1, help="Encoders: texts or images at once.")
@click.option("--repeats", default=5, help="Timed passes.")
@click.option("--warmup", default=1, help="Passes before, not timed.")
@click.option(
    "--device", type=TARGET, metavar="NAME", help="Refuse unless this machine is that device."
)
@click.option(
    "-o", "--output", type=_FILE, metavar="FILE.json", help="Write the record to this JSON file."
)
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    bundle: str | None,
    pair: tuple[Path, Path] | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Measure the bundle BUNDLE on this machine: prefill and decode apart, or an encoder's texts.

    Times are the median and the 90th percentile. The record says which bundle and which machine the
    figures are of, with clocks and temperatures where the machine shows them. With --compare, no
    bundle: two records of the same quantity are set side by side.
    """
    if (bundle is None) == (pair is None):
        raise click.UsageError("give either BUNDLE or --compare A.json B.json")
    if pair is not None:
        _compare(*pair, as_json=as_json)
    elif bundle is not None:
        _measure(bundle, output, force, as_json, asked)


def _measure(
    bundle: str, output: Path | None, force: bool, as_json: bool, asked: Mapping[str, Any]
) -> None:
    # not at the top: `edgeattn --help` must not wait for numpy
    from edgeattn.cli.progress import show_progress
    from edgeattn.runtime.bench import Amount, bench

    if output is not None:
        from edgeattn.pipeline.work import require_output

        require_output(output, force=force)
    names = ("tokens", "new_tokens", "rows", "repeats", "warmup")
    amount = Amount(**{name: asked[name] for name in names})
    others = {name: value for name, value in asked.items() if name not in names}
    with show_progress(quiet=as_json) as progress:
        record = bench(bundle, amount, progress=progress, **others)
    if output is not None:
        record.write(output)
    if as_json:
        click.echo(json.dumps(record.to_dict(), ensure_ascii=False))
    else:
        _show(record)


def _show(record: BenchRecord) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from edgeattn.cli.tables import size_text

    table = Table(box=box.SIMPLE, title=f"{record.bundle.name}: {record.quantity}")
    table.add_column("")
    for heading in ("median", "p90", "speed", "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in record.phases:
        speed = f"{one.per_second:,.1f} {one.unit}/s"
        times = (f"{1e3 * seconds:,.2f} ms" for seconds in (one.median_seconds, one.p90_seconds))
        table.add_row(one.name, *times, speed, str(one.samples))
    Console().print(table)
    machine, setup = record.machine, record.setup
    what = machine.gpu if not setup.on_cpu else machine.processor or machine.board
    click.echo(
        f"measured on {machine.device or 'a device that edgeattn does not know'} "
        f"({what or machine.arch}) with {setup.backend}"
        + (f", {setup.provider}" if setup.backend == "onnxruntime" else "")
    )
    sizes = {
        "peak memory": record.peak_memory_bytes,
        "memory of the GPU": record.gpu_memory_bytes,
        "cache": record.cache_bytes,
    }
    click.echo("; ".join(f"{name} {size_text(size)}" for name, size in sizes.items() if size))
    click.echo(f"power mode: {machine.power_mode or 'not shown by this machine'}")
    click.echo(f"clocks: {_change(record.before, record.after, 'clocks_mhz', 'MHz')}")
    click.echo(f"temperature: {_change(record.before, record.after, 'temperatures_c', '°C')}")


def _change(before: Moment, after: Moment, field: str, unit: str) -> str:
    """What the machine showed before and after, or that it shows nothing."""
    first, last = getattr(before, field), getattr(after, field)
    said = [f"{name} {first[name]:.0f} → {last[name]:.0f} {unit}" for name in first if name in last]
    return ", ".join(said) or "not shown by this machine"


def _compare(first: Path, second: Path, *, as_json: bool) -> None:
    from edgeattn.runtime.bench_record import compare, read_record

    found = compare(read_record(first), read_record(second))
    if as_json:
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False))
        return
    _show_comparison(found)


def _show_comparison(found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=str(found.quantity))
    table.add_column("")
    for heading in ("A", "B", "B/A"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.ratios:
        figures = (f"{value:,.6g} {one.unit}" for value in (one.first, one.second))
        table.add_row(one.figure, *figures, f"{one.ratio:.3f}")
    Console().print(table)
    for difference in found.differences:
        click.echo(difference)
    if any(one.startswith("machine: ") for one in found.differences):
        click.echo("the machines differ: the ratios are not the bundles' alone")
