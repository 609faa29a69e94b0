"""`edgeattn export`: checkpoint in, proven bundle out."""

from __future__ import annotations

import atexit
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.pipeline import ExportReport
    from edgeattn.recipe import Recipe

_EPILOG = """\b
Examples:
  edgeattn export ./SmolLM2-135M --target jetson-orin
  edgeattn export model.gguf --target jetson-orin@jetpack6.2 --quant w4-rtn -o ./bundle
  edgeattn export HuggingFaceTB/SmolLM2-135M@main --target cpu --quant w4-rtn:group=32
  edgeattn export ./SmolLM2-135M --recipe recipe.toml --force
"""


@click.command("export", epilog=_EPILOG)
@click.argument("model")
@click.option("--target", metavar="NAME[@SOFTWARE]", help="Device, see `edgeattn targets`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to write.")
@click.option("--quant", metavar="NAME[:k=v,…]", help="none, w8-rtn, w4-rtn[:group=32|64|128].")
@click.option("--dtype", metavar="fp32|fp16|bf16", help="Default: what the target prefers.")
@click.option("--context", type=int, help="Longest sequence in tokens.")
@click.option("--batch", type=int, help="Most rows at once.")
@click.option("--logits", metavar="all|last", help="Logits of all positions or the last one.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML; flags win.")
@click.option("--dry-run", is_flag=True, help="Show the lowering and sizes; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the proof; the manifest will say so.")
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    model: str,
    output: Path | None,
    recipe_file: Path | None,
    dry_run: bool,
    no_verify: bool,
    offline: bool,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Export MODEL to a bundle for a target.

    MODEL is a Hugging Face directory, a .gguf file, or a repository of the Hugging Face hub as
    OWNER/NAME[@REVISION], of which only configuration, tokenizer and safetensors are downloaded.

    The bundle is proven before it appears: the torch model of the same recipe against ONNX Runtime
    on the bundle's own file, and TensorRT's parser and builder where edgeattn[rtx] is installed.
    """
    # The interpreter would search everything torch made for garbage once more before it ends.
    atexit.register(gc.freeze)
    from edgeattn.cli.progress import show_progress
    from edgeattn.cli.tables import print_verification
    from edgeattn.errors import ProofError
    from edgeattn.pipeline import default_output, export
    from edgeattn.recipe import Recipe, read_recipe

    asked = read_recipe(recipe_file) if recipe_file else {}
    asked.update({key: value for key, value in flags.items() if value is not None})
    recipe = Recipe.from_dict(asked)
    if dry_run:
        _show_plan(model, recipe, offline, as_json)
        return
    place = output or default_output(model, recipe)
    try:
        with show_progress() as progress:
            report = export(
                model,
                recipe,
                place,
                offline=offline,
                verify=not no_verify,
                force=force,
                progress=progress,
            )
    except ProofError as error:
        if error.details and not as_json:
            print_verification(error.details, error_stream=True)
        raise
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show_report(report)


def _show_plan(model: str, recipe: Recipe, offline: bool, as_json: bool) -> None:
    from edgeattn.devices.registry import parse_target
    from edgeattn.models.hub import read_model_shape
    from edgeattn.planner.lowering import fit_lowering, plan_lowering
    from edgeattn.planner.memory import weight_bytes

    target = parse_target(recipe.target)
    shape = read_model_shape(model, offline=offline)
    lowering = fit_lowering(plan_lowering(recipe, target), shape, target)
    size = weight_bytes(shape, lowering)
    plan = {"lowering": lowering.to_dict(), "weight_bytes": size}
    if as_json:
        click.echo(json.dumps(plan, indent=2))
        return
    for key, value in lowering.to_dict().items():
        shown = value["label"] if key == "scheme" else value
        click.echo(f"{key:16} {shown}")
    click.echo(f"{'weights':16} {size / 1e6:.1f} MB")


def _show_report(report: ExportReport) -> None:
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    size = report.graph.weight_bytes / 1e6
    click.echo(f"{report.path}: {report.graph.nodes} nodes, {size:.1f} MB of weights ({seconds})")
    if not (report.path / "tokenizer.json").is_file():
        click.echo("no tokenizer.json in the checkpoint: applications must bring token ids")
    if report.verification is None:
        click.echo("not verified (--no-verify)")
        return
    from edgeattn.cli.tables import print_verification

    print_verification(report.verification.to_dict())
    click.echo(f"report: {report.path / 'report' / 'index.html'}")
