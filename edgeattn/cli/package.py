"""`edgeattn package`: libedgeattn as an archive, or a bundle as a model of Triton."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import PATH, one_of
from edgeattn.cli.verb import Verb
from edgeattn.errors import UsageError

if TYPE_CHECKING:
    from edgeattn.pipeline.package import LibraryPackage
    from edgeattn.pipeline.triton import TritonModel

_EXAMPLES = """
  edgeattn package --arch aarch64 -o ./dist
  edgeattn package --arch x86_64 -o ./dist --force
  edgeattn package ./bundle --triton -o ./models --name smollm2
"""
_LIBRARY, _TRITON = ("arch", "tensorrt"), ("name", "engine")


@click.command(
    "package",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the sources of libedgeattn, and headers of TensorRT and CUDA; or the bundle BUNDLE",
    writes="DIR/edgeattn-VERSION-linux-ARCH.tar.gz, or the folder DIR/NAME with --triton",
)
@click.argument("bundle", required=False, type=PATH, metavar="BUNDLE")
@click.option("--triton", is_flag=True, help="Write BUNDLE as a model of Triton Inference Server.")
@click.option(
    "--arch",
    type=one_of("x86_64", "aarch64"),
    metavar="x86_64|aarch64",
    show_default="this machine's",
    help="Library: processor it is for.",
)
@click.option(
    "--tensorrt",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    metavar="DIR",
    show_default="EDGEATTN_TENSORRT_INCLUDE, then where JetPack has them",
    help="Library: TensorRT's headers; once for each TensorRT.",
)
@click.option(
    "--name", metavar="NAME", show_default="the bundle's", help="Triton: what the model is called."
)
@click.option(
    "--engine",
    type=click.Path(path_type=Path),
    metavar="FILE",
    show_default="the newest",
    help="Triton: which engine of a bundle for TensorRT.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Folder to write into.",
)
@click.option("--force", is_flag=True, help="Replace what is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    bundle: str | None, triton: bool, output: Path, force: bool, as_json: bool, **asked: Any
) -> None:
    """Pack libedgeattn for C++ applications, or the bundle BUNDLE for Triton Inference Server.

    Without BUNDLE: the C++ library with headers, CMake package, pkg-config and an adapter for each
    TensorRT whose headers are there, for this processor or another; no GPU is needed. With BUNDLE
    and --triton: a model of a Triton repository, the graph for ONNX Runtime or an engine.
    """
    if triton != (bundle is not None):
        raise click.UsageError("give BUNDLE together with --triton, or neither")
    _require_none(asked, _LIBRARY if triton else _TRITON, triton=triton)
    if bundle is None:
        _show_library(_library(output, force, as_json, asked), as_json)
    else:
        _show_model(_model(bundle, output, force, asked), as_json)


def _require_none(asked: dict[str, Any], names: tuple[str, ...], *, triton: bool) -> None:
    for name in names:
        if asked[name]:
            raise UsageError(
                expected=f"--{name} {'without' if triton else 'with'} --triton",
                came="it was given",
                todo=f"leave out --{name}",
            )


def _library(output: Path, force: bool, as_json: bool, asked: dict[str, Any]) -> LibraryPackage:
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline.package import package_library

    with show_progress(quiet=as_json) as progress:
        return package_library(
            asked["arch"] or platform.machine(),
            output,
            tensorrt=asked["tensorrt"],
            force=force,
            progress=progress,
        )


def _show_library(made: LibraryPackage, as_json: bool) -> None:
    if as_json:
        facts = {**vars(made), "path": str(made.path), "adapters": list(made.adapters)}
        click.echo(json.dumps(facts))
        return
    click.echo(f"{made.path}: {made.bytes / 1e6:.1f} MB for {made.arch}")
    click.echo(f"runs engines through the adapters {', '.join(made.adapters)}")
    if made.standard_library == "libc++":
        click.echo(
            "built with LLVM's C++ library: applications of g++ use its C header edgeattn.h, or "
            f"pack it where {made.arch}-linux-gnu-g++ is"
        )


def _model(bundle: str, output: Path, force: bool, asked: dict[str, Any]) -> TritonModel:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.pipeline.triton import write_triton_model

    opened = Bundle.open(bundle)
    return write_triton_model(
        opened, output, name=asked["name"], engine=asked["engine"], force=force
    )


def _show_model(made: TritonModel, as_json: bool) -> None:
    if as_json:
        plugins = None if made.plugins is None else str(made.plugins)
        click.echo(json.dumps({**vars(made), "path": str(made.path), "plugins": plugins}))
        return
    click.echo(f"{made.path}: for Triton's backend {made.backend}")
    start = f"tritonserver --model-repository {made.path.parent}"
    if made.plugins is not None:
        start += f" --backend-config=tensorrt,plugins={made.plugins}"
    click.echo(f"start it with: {start}")
    if made.keeps_cache:
        click.echo("Triton keeps the cache of each sequence; requests carry a sequence id")
