"""`edgeattn targets`: which devices there are, and every fact about one with its source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import TARGET
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from rich.table import Table

    from edgeattn.devices.registry import Target
    from edgeattn.devices.schema import Device, Software

_EXAMPLES = """
  edgeattn targets
  edgeattn targets jetson-orin@jetpack6.2
  edgeattn targets --json
"""


@click.command(
    "targets",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the target files of edgeattn itself",
    writes="nothing but what it prints",
)
@click.argument("name", required=False, type=TARGET, metavar="[NAME[@SOFTWARE]]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(name: str | None, as_json: bool) -> None:
    """List the targets, or the facts of one with their sources."""
    # not at the top: `edgeattn --help` must not wait for pydantic and rich
    from edgeattn.devices.registry import all_devices, all_software, parse_target

    target = parse_target(name) if name else None
    if as_json:
        facts = _target_facts(target) if target else _all_facts(all_devices(), all_software())
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    if target is None:
        console.print(_overview(all_devices()), _software_list(all_software()))
        return
    console.print(f"{target.name}: {target.device.description}", markup=False, highlight=False)
    console.print(_fact_table(target))


def _all_facts(devices: tuple[Device, ...], software: tuple[Software, ...]) -> dict[str, Any]:
    return {
        "targets": [device.model_dump(mode="json") for device in devices],
        "software": [stack.model_dump(mode="json") for stack in software],
    }


def _target_facts(target: Target) -> dict[str, Any]:
    return {
        "target": target.name,
        "device": target.device.model_dump(mode="json"),
        "software": target.software.model_dump(mode="json"),
    }


def _overview(devices: tuple[Device, ...]) -> Table:
    table = _plain_table("* shared with the CPU; +N: further software, see edgeattn targets NAME")
    for title in ("target", "sm", "memory", "software"):
        table.add_column(title, no_wrap=True)
    table.add_column("aliases")
    for device in devices:
        further = len(device.software.allowed) - 1
        table.add_row(
            device.name,
            str(device.sm or "-"),
            _memory(device),
            device.software.default + (f" +{further}" if further else ""),
            ", ".join(device.aliases) or "-",
        )
    return table


def _software_list(software: tuple[Software, ...]) -> Table:
    table = _plain_table("choose with NAME@SOFTWARE")
    table.add_column("software", no_wrap=True)
    table.add_column("what is installed")
    for stack in software:
        table.add_row(stack.name, stack.description)
    return table


def _plain_table(caption: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE, pad_edge=False, caption=caption, caption_justify="left")


def _memory(device: Device) -> str:
    if device.memory is None:
        return "-"
    return f"{device.memory.total_gb:g} GB{'*' if device.memory.shared_with_cpu else ''}"


def _fact_table(target: Target) -> Table:
    from rich.table import Table

    table = Table(show_lines=True)
    for title in ("fact", "value", "source"):
        table.add_column(title, overflow="fold")
    for title, values, source in fact_rows(target):
        table.add_row(title, "\n".join(values), source)
    return table


def fact_rows(target: Target) -> Iterator[tuple[str, list[str], str]]:
    """Every group of facts of a target: its name, its values in words, and its source."""
    facts = _target_facts(target)
    groups = {**facts["device"], **{k: facts["software"][k] for k in ("stack", "graph")}}
    groups["software"] = facts["device"]["software"]
    for title, group in groups.items():
        if isinstance(group, dict):
            values = [
                f"{key} {_words(value)}"
                for key, value in group.items()
                if key != "source" and value is not None
            ]
            yield title, values, group["source"]


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return (
            value["name"] if value["watts"] is None else f"{value['name']} ({value['watts']:g} W)"
        )
    return str(value)
