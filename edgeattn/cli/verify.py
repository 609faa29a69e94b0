"""`edgeattn verify`: prove a bundle again, here and now."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeattn.cli.names import PATH, PROVIDER, one_of
from edgeattn.cli.verb import Verb

_EXAMPLES = """
  edgeattn verify ./bundle
  edgeattn verify ./bundle --checkpoint ./SmolLM2-135M
  edgeattn verify ./bundle --checkpoint HuggingFaceTB/SmolLM2-135M --offline
  edgeattn verify ./bundle --no-tensorrt --json
  edgeattn verify ./bundle --backend tensorrt
  edgeattn verify ./bundle --backend triton
"""


@click.command(
    "verify",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the bundle BUNDLE; with --checkpoint the checkpoint, too",
    writes="nothing",
    codes={1: "refused, or the proof failed: the first layer out of tolerance is named"},
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="MODEL",
    help="Compare with torch on this checkpoint (see export) instead of the golden vectors.",
)
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--no-tensorrt", is_flag=True, help="Leave out TensorRT's parser and builder.")
@click.option(
    "--backend",
    type=one_of("onnxruntime", "tensorrt", "triton"),
    default="onnxruntime",
    metavar="NAME",
    help="onnxruntime: the graph; tensorrt: an engine of edgeattn build, on its GPU; "
    "triton: the kernels of its own operators, on a GPU.",
)
@click.option(
    "--engine",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="the newest that runs here",
    help="With --backend tensorrt: which engine.",
)
@click.option(
    "--provider",
    type=PROVIDER,
    metavar="NAME",
    default="cpu",
    help="Of ONNX Runtime: cpu, cuda or tensorrt.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    bundle: Path,
    checkpoint: str | None,
    offline: bool,
    no_tensorrt: bool,
    backend: str,
    engine: Path | None,
    provider: str,
    as_json: bool,
) -> None:
    """Prove BUNDLE: every hash, ONNX Runtime against the reference, TensorRT's parser and builder.

    Without --checkpoint the reference is the golden vectors the export wrote, and torch is not
    needed. On a mismatch the first layer out of tolerance is named and the exit code is 1.
    """
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline import verify_bundle

    with show_progress() as progress:
        verification = verify_bundle(
            bundle,
            checkpoint=checkpoint,
            offline=offline,
            tensorrt=not no_tensorrt,
            backend=backend,
            engine=engine,
            provider=provider,
            progress=progress,
        )
    if as_json and verification.passed:
        click.echo(json.dumps(verification.to_dict(), indent=2))
    elif not as_json:
        from edgeattn.cli.tables import print_verification

        print_verification(verification.to_dict(), builder=backend == "onnxruntime")
    verification.raise_if_failed()
