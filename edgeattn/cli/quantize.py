"""`edgeattn quantize`: checkpoint in, the same model rotated and quantised out as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import DTYPE, PATH, SCHEME
from edgeattn.cli.verb import Verb
from edgeattn.recipe import CALIBRATION_LENGTH, CALIBRATION_WINDOWS

if TYPE_CHECKING:
    from edgeattn.pipeline import QuantizeReport

_EXAMPLES = """
  edgeattn quantize ./SmolLM2-135M --quant w4-rtn:group=32 -o SmolLM2-135M-w4
  edgeattn quantize model.gguf --quant w8-rtn -o model-w8 --dtype fp16
  edgeattn quantize ./model --quant w4a16-spinquant --calibration book.txt -o model-spinquant
"""


@click.command(
    "quantize",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the checkpoint MODEL, and a calibration text where the scheme needs one",
    writes="a new directory that plain transformers loads, with edgeattn.json beside the weights",
)
@click.argument("model", type=PATH)
@click.option(
    "--quant", type=SCHEME, required=True, metavar="NAME[:k=v,…]", help="Scheme; see README."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Hugging Face directory to write.",
)
@click.option(
    "--dtype",
    type=DTYPE,
    metavar="fp32|fp16|bf16",
    show_default="fp32",
    help="Of the files: fp32 holds dequantised weights as they are; the others round them once "
    "more, as a bundle in that dtype does.",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE|DIR",
    help="Text for schemes that are calibrated.",
)
@click.option(
    "--calibration-windows",
    type=int,
    show_default=str(CALIBRATION_WINDOWS),
    help=f"Windows of {CALIBRATION_LENGTH} tokens of it.",
)
@click.option("--rotations", type=PATH, metavar="FILE", help="Learned rotations to use again.")
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace an earlier copy that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    model: str, output: Path, offline: bool, force: bool, as_json: bool, **flags: Any
) -> None:
    """Write MODEL, rotated and quantised, as a checkpoint that plain transformers loads.

    MODEL is what `edgeattn export` takes. The weights are dequantised: the copy is no smaller than
    the original, but any tool that reads checkpoints can judge what a scheme costs.

    What was done is in edgeattn.json beside the weights. Work on a calibration text that was
    stopped goes on where it was when the same command runs again.
    """
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline import quantize_checkpoint
    from edgeattn.recipe import Recipe

    asked = {key: value for key, value in flags.items() if value is not None}
    recipe = Recipe(target="cpu", **asked)
    with show_progress() as progress:
        report = quantize_checkpoint(
            model, recipe, output, offline=offline, force=force, progress=progress
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)


def _show(report: QuantizeReport) -> None:
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    size = sum(report.weight_files.values()) / 1e6
    what = f"{report.scheme.label} dequantised to {report.dtype}"
    click.echo(f"{report.path}: {size:.1f} MB of weights, {what} ({seconds})")
    if report.not_rounded:
        click.echo(
            f"{' and '.join(report.not_rounded)} are not rounded in this copy, which a checkpoint "
            "cannot say; their scales are in edgeattn.json"
        )
    if warning := report.transforms.get("warning"):
        click.echo(f"warning: {warning}")
    click.echo(f"report: {report.path / 'edgeattn.json'}")
