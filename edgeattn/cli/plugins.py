"""`edgeattn plugins`: builds the TensorRT plugin library, and says what one holds."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli.names import one_of
from edgeattn.cli.verb import Verb, VerbGroup
from edgeattn.errors import UsageError

if TYPE_CHECKING:
    from edgeattn.engine.plugins import PluginLibrary

_EXAMPLES = """\
  edgeattn plugins build --arch aarch64 -o ./plugins
  edgeattn plugins build --arch x86_64 --sm 80,90 -o ./plugins
"""
_INFO_EXAMPLES = """\
  edgeattn plugins info ./plugins/aarch64/libedgeattn_plugins.so
  edgeattn plugins info ./bundle/plugins/aarch64/libedgeattn_plugins.so --json
"""


@click.group("plugins", cls=VerbGroup, examples=_EXAMPLES + _INFO_EXAMPLES)
def command() -> None:
    """Build the TensorRT plugin library, or say what one holds."""


@command.command(
    "build",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the plugins and kernels of edgeattn itself, and TensorRT's headers",
    writes="DIR/ARCH/libedgeattn_plugins.so; compiled parts stay in the user's cache",
)
@click.option(
    "--arch",
    type=one_of("x86_64", "aarch64"),
    metavar="x86_64|aarch64",
    show_default="this machine's",
    help="Processor beside the GPU.",
)
@click.option(
    "--sm",
    "sms",
    metavar="SM,…",
    show_default="those of all known targets",
    help="GPUs as numbers, such as 87,110.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder to write into.",
)
@click.option(
    "--subset",
    metavar="NAME",
    show_default="all",
    help="A subset of the table of variants, such as smoke.",
)
@click.option(
    "--tensorrt",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    show_default="EDGEATTN_TENSORRT_INCLUDE, then where JetPack has them",
    help="TensorRT's headers.",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    show_default="processors",
    help="Compilers at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def build(
    arch: str | None,
    sms: str | None,
    output: Path,
    subset: str | None,
    tensorrt: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build DIR/ARCH/libedgeattn_plugins.so; neither a GPU nor a Jetson is needed.

    What was compiled once is kept, so that a second build takes seconds.
    """
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline.plugins import build_plugins, default_sms, place_library

    arch = arch or platform.machine()
    with show_progress() as progress:
        library = build_plugins(
            arch,
            _numbers(sms) if sms else default_sms(arch),
            subset=subset,
            tensorrt=tensorrt,
            jobs=jobs,
            progress=progress,
        )
    _show(place_library(library, output), as_json)


@command.command(
    "info",
    cls=Verb,
    examples=_INFO_EXAMPLES,
    reads="the library FILE",
    writes="nothing but what it prints",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def info(file: Path, as_json: bool) -> None:
    """Say what the plugin library FILE holds, whatever machine it is for."""
    from edgeattn.engine.plugins import read_library

    _show(read_library(file), as_json)


def _numbers(sms: str) -> tuple[int, ...]:
    try:
        return tuple(int(sm) for sm in sms.split(","))
    except ValueError as error:
        raise UsageError(
            expected="--sm with numbers, such as 87,110",
            came=f"'{sms}' was given",
            todo="use commas",
        ) from error


def _show(library: PluginLibrary, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(library.to_dict(), indent=2))
        return
    size = library.path.stat().st_size / 1e6
    click.echo(f"{library.path}: {size:.1f} MB for {library.arch}, ABI {library.abi}")
    click.echo(f"TensorRT headers {library.tensorrt_headers}, kernels by Triton {library.triton}")
    click.echo(f"GPUs: {', '.join(f'SM {sm}' for sm in library.sms)}")
    for op in library.ops:
        click.echo(f"plugin {op}")
    kernels: dict[str, dict[str, int]] = {}
    for variant in library.variants:
        counts = kernels.setdefault(variant.kernel, {})
        counts[variant.dtype] = counts.get(variant.dtype, 0) + 1
    for kernel, counts in kernels.items():
        click.echo(f"  {kernel}: " + ", ".join(f"{n} in {dtype}" for dtype, n in counts.items()))
