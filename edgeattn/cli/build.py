"""`edgeattn build`: a TensorRT engine for a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli.names import FLAVOUR, TARGET
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.pipeline.build import Built

_EXAMPLES = """
  edgeattn build ./bundle
  edgeattn build ./bundle --target rtx-4090 --target rtx-5090
  edgeattn build ./bundle --profile batch_size=1:1:4 --profile decode.past_sequence_length=0:64:511
  edgeattn build ./bundle --target a100 --flavour tensorrt-rtx
  edgeattn build ./bundle --on jetson@192.168.55.1
"""


@click.command(
    "build",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the bundle BUNDLE",
    writes="BUNDLE/engines: the engine, and its record as JSON",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    type=TARGET,
    multiple=True,
    metavar="NAME[@SOFTWARE]",
    show_default="the bundle's",
    help="Build for another GPU that runs the same graph; several make one engine.",
)
@click.option(
    "--flavour",
    type=FLAVOUR,
    metavar="NAME",
    show_default="the target's",
    help="tensorrt, on the device; or tensorrt-rtx, on any x86-64 machine.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="[PROFILE.]DIMENSION=min:opt:max",
    help="Sizes of batch_size, sequence_length or past_sequence_length, of prefill or decode.",
)
@click.option(
    "--timing-cache",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TensorRT's measurements of kernels: read if there, and written.",
)
@click.option("--strip-weights", is_flag=True, help="Put the weights in when it is loaded.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    show_default="TensorRT's",
    help="Threads of the builder.",
)
@click.option(
    "--on",
    "where",
    metavar="[USER@]HOST[:FOLDER]",
    help="Copy the bundle to a device by ssh, build there, and bring the engine here.",
)
@click.option(
    "--on-command",
    metavar="PATH",
    show_default="edgeattn",
    help="edgeattn on the device, where its shell does not find it.",
)
@click.option("--force", is_flag=True, help="Build again what was built already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    bundle: Path,
    targets: tuple[str, ...],
    flavour: str | None,
    profiles: tuple[str, ...],
    timing_cache: Path | None,
    strip_weights: bool,
    jobs: int | None,
    where: str | None,
    on_command: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine for BUNDLE, into its folder engines.

    GeForce and RTX PRO engines are built on any machine by TensorRT-RTX. All others are built by
    TensorRT on the device itself: run this there, or here with --on. Elsewhere the graph is checked
    and the command says so.
    """
    from edgeattn.cli.progress import show_progress
    from edgeattn.errors import UsageError
    from edgeattn.pipeline.build import build_bundle
    from edgeattn.pipeline.build_plan import BuildRequest
    from edgeattn.pipeline.remote_build import build_on

    request = BuildRequest(
        targets=targets,
        flavour=flavour,
        profiles=profiles,
        timing_cache=timing_cache,
        strip_weights=strip_weights,
        jobs=jobs,
        force=force,
    )
    if on_command is not None and where is None:
        raise UsageError(
            expected="--on-command beside --on",
            came="there is no --on",
            todo="name the device, or leave --on-command out",
        )
    with show_progress() as progress:
        if where is None:
            built = build_bundle(bundle, request, progress=progress)
        else:
            command = on_command or "edgeattn"
            built = build_on(where, bundle, request, command=command, progress=progress)
    if as_json:
        click.echo(json.dumps(built.to_dict(), indent=2))
    else:
        _show(built)


def _show(built: Built) -> None:
    if built.was_there:
        click.echo(f"{built.engine.path} was there already (--force builds it again)")
    else:
        _show_new(built)
    if built.selftest is not None:
        click.echo(f"self-test passed: {built.selftest.told}")


def _show_new(built: Built) -> None:
    record = built.engine.record
    sms = " and ".join(f"SM {sm}" for sm in record.sms)
    plugins = f", {record.plugins.layers} of them plugins" if record.plugins else ""
    click.echo(
        f"{built.engine.path}: {record.bytes / 1e6:.1f} MB for {sms}, {record.layers} layers"
        f"{plugins}, {sum(record.seconds.values()):.1f} s, {record.where}"
    )
    for name, sizes in record.profiles.items():
        told = ", ".join(f"{dimension} {size}" for dimension, size in sizes.items())
        click.echo(f"  {name}: {told}")
