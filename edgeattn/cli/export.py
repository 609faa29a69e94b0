"""`edgeattn export`: checkpoint in, proven bundle out."""

from __future__ import annotations

import atexit
import gc
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from edgeattn.cli.names import DTYPE, PATH, SCHEME, TARGET, VARIANT, one_of
from edgeattn.cli.verb import Verb
from edgeattn.encoder_shape import Task
from edgeattn.recipe import CALIBRATION_LENGTH, CALIBRATION_WINDOWS, KV_CACHES, LOGITS

if TYPE_CHECKING:
    from edgeattn.pipeline import ExportPlan, ExportReport

_EXAMPLES = """
  edgeattn export ./SmolLM2-135M --target jetson-orin
  edgeattn export model.gguf --target jetson-orin@jetpack6.2 --quant w4-rtn -o ./bundle
  edgeattn export HuggingFaceTB/SmolLM2-135M@main --target cpu --quant w4-rtn:group=32
  edgeattn export ./SmolLM2-135M --target l4 --quant w4a16-spinquant --calibration novel.txt
  edgeattn export ./SmolLM2-135M --target jetson-orin --attention head-sparse:density=0.75 \\
      --calibration novel.txt --finetune-text novel.txt --finetune-steps 200
  edgeattn export ./SmolLM2-135M --target jetson-orin --attention gqa:kv_heads=1 \\
      --calibration novel.txt --finetune-text novel.txt --finetune-steps 200
  edgeattn export ./MiniLM --target cpu --attention lion:variant=d \\
      --finetune-text novel.txt --finetune-steps 800
  edgeattn export ./SmolLM2-135M --recipe recipe.toml --force
"""


@click.command(
    "export",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the checkpoint MODEL, and the texts and files its options name",
    writes="a new directory, the bundle, with its proof in report/index.html; whole or not at all",
    codes={1: "refused, or the proof failed: no bundle appears"},
)
@click.argument("model", type=PATH)
@click.option(
    "--target", type=TARGET, metavar="NAME[@SOFTWARE]", help="Device, see `edgeattn targets`."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="MODEL-TARGET-SCHEME, here",
    help="Bundle to write.",
)
@click.option(
    "--quant",
    type=SCHEME,
    metavar="NAME[:k=v,…]",
    show_default="none",
    help="Scheme, such as w4a16-spinquant; see README.",
)
@click.option(
    "--attention",
    type=VARIANT,
    multiple=True,
    show_default="the checkpoint's",
    metavar="NAME[:k=v,…]",
    help="Variant: gqa:kv_heads=K, fft-rope, head-sparse:density=D, recurrent; of an encoder "
    "lion:variant=lit|d|s; see README.",
)
@click.option(
    "--task",
    type=one_of(*get_args(Task)),
    metavar="hidden|embedding|classification",
    show_default="what the checkpoint was made for",
    help="Of an encoder: what comes out.",
)
@click.option(
    "--dtype",
    type=DTYPE,
    metavar="fp32|fp16|bf16",
    show_default="what the target prefers",
    help="Of weights and activations that are not quantised.",
)
@click.option(
    "--context",
    type=int,
    metavar="TOKENS",
    show_default="the checkpoint's",
    help="Longest sequence.",
)
@click.option("--batch", type=int, metavar="ROWS", show_default="1", help="Most rows at once.")
@click.option(
    "--kv-cache",
    type=one_of(*KV_CACHES),
    metavar="growing|static",
    show_default="growing",
    help="A static cache has its full size from the start; see README.",
)
@click.option(
    "--logits",
    type=one_of(*LOGITS),
    metavar="all|last",
    show_default="all",
    help="Logits of all positions or the last one.",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE|DIR",
    help="Text (or .npy images) to calibrate on.",
)
@click.option(
    "--calibration-windows",
    type=int,
    show_default=str(CALIBRATION_WINDOWS),
    help=f"Windows of {CALIBRATION_LENGTH} tokens of it.",
)
@click.option("--rotations", type=PATH, metavar="FILE", help="Rotations that were learned before.")
@click.option(
    "--finetune-text",
    type=PATH,
    metavar="FILE|DIR",
    help="Text, or images (.npy), to train on after any --attention that loses something.",
)
@click.option(
    "--finetune-steps", type=int, metavar="N", help="Steps of that training, such as 200."
)
@click.option(
    "--finetune-lr",
    type=float,
    metavar="RATE",
    show_default="0.0005",
    help="Its highest learning rate.",
)
@click.option(
    "--eval-text",
    type=PATH,
    metavar="FILE",
    help="Measure the exported graph's quality on it.",
)
@click.option("--max-ppl-increase", metavar="10%", help="Refuse a bundle that lost more.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="These options from a file; flags win.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, sizes and times; write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the proof; the manifest will say so.")
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option(
    "--plugin-lib",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plugin library for graphs that need one, instead of building it.",
)
@click.option("--no-plugins", is_flag=True, help="Leave TensorRT the operators' function bodies.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    model: str,
    output: Path | None,
    recipe_file: Path | None,
    dry_run: bool,
    no_verify: bool,
    offline: bool,
    force: bool,
    plugin_lib: Path | None,
    no_plugins: bool,
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
    from edgeattn.pipeline import default_output, export, plan_export
    from edgeattn.recipe import Recipe, read_recipe

    asked = read_recipe(recipe_file) if recipe_file else {}
    asked.update({key: value for key, value in flags.items() if value not in (None, ())})
    recipe = Recipe.from_dict(asked)
    place = output or default_output(model, recipe)
    if dry_run:
        plan = plan_export(
            model,
            recipe,
            place,
            offline=offline,
            verify=not no_verify,
            plugin_library=plugin_lib,
        )
        if as_json:
            click.echo(json.dumps(plan.to_dict(), indent=2))
        else:
            _show_plan(plan)
        return
    try:
        with show_progress() as progress:
            report = export(
                model,
                recipe,
                place,
                offline=offline,
                verify=not no_verify,
                force=force,
                plugins=not no_plugins,
                plugin_library=plugin_lib,
                progress=progress,
            )
    except ProofError as error:
        if "agreements" in error.details and not as_json:
            print_verification(error.details, error_stream=True)
        raise
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show_report(report)


def _show_plan(plan: ExportPlan) -> None:
    from edgeattn.cli.tables import size_text
    from edgeattn.planner.estimate import MEASURED_ON

    for key, value in plan.lowering.to_dict().items():
        click.echo(f"{key:16} {value['label'] if key == 'scheme' else value}")
    expected = plan.estimate
    rows = f"{expected.batch} rows" if expected.batch > 1 else "1 row"
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in expected.seconds.items())
    click.echo(f"{'weights':16} {size_text(expected.weight_bytes)}")
    click.echo(f"{'graph':16} {size_text(expected.graph_bytes)}")
    if expected.cache_bytes:  # an encoder has none
        click.echo(
            f"{'cache':16} {size_text(expected.cache_bytes_per_token)} per token, "
            f"{size_text(expected.cache_bytes)} at {expected.context} tokens in {rows}"
        )
    free = f"{size_text(plan.free_bytes)} are free"
    wrong = "" if plan.fits else ": TOO LITTLE, the export would be refused"
    click.echo(f"{'disk':16} {size_text(expected.disk_bytes)}, {free}{wrong}")
    click.echo(f"{'memory':16} {size_text(expected.memory_bytes)} at the peak, estimated")
    click.echo(f"{'time':16} {sum(expected.seconds.values()):.0f} s, estimated, on {MEASURED_ON}")
    click.echo(f"{'':16} {seconds}")


def _show_report(report: ExportReport) -> None:
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())
    size = report.graph.weight_bytes / 1e6
    click.echo(f"{report.path}: {report.graph.nodes} nodes, {size:.1f} MB of weights ({seconds})")
    if report.reads_text and not (report.path / "tokenizer.json").is_file():
        click.echo("no tokenizer.json in the checkpoint: applications must bring token ids")
    _show_transforms(report.transforms)
    if report.verification is None:
        click.echo("not verified (--no-verify)")
    else:
        from edgeattn.cli.tables import print_verification

        print_verification(report.verification.to_dict())
    if report.quality is not None:
        found = report.quality
        click.echo(
            f"perplexity {found.perplexity:.2f}, {found.increase:+.1%} beside the checkpoint's "
            f"{found.reference_perplexity:.2f}; KL {found.kl:.3f} nats, same most likely token "
            f"{found.top1_agreement:.1%} of {found.tokens} times"
        )
        if found.fallback_share is not None:
            click.echo(
                f"{found.fallback_share:.2%} of the rows of heads with a polynomial fell back to "
                "exact attention"
            )
    click.echo(f"report: {report.path / 'report' / 'index.html'}")


def _show_transforms(notes: Mapping[str, Any]) -> None:
    for name, found in notes.items():
        if not isinstance(found, Mapping):
            click.echo(f"{name}: {found}")
        elif not name.startswith("sensitivity"):  # a long table; it is in the report
            lines = {key: value for key, value in found.items() if not _is_long(key, value)}
            values = (f"{key} {_shown(value)}".strip() for key, value in lines.items())
            click.echo(f"{name}: {', '.join(values)}")


def _is_long(key: str, value: object) -> bool:
    """Whether it is for the report, which has the room: a line of every layer, or a table."""
    table = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    return table or re.fullmatch(r"layer \d+", key) is not None


def _shown(value: object) -> str:
    if isinstance(value, list | tuple) and len(value) > 2:
        return f"{_shown(value[0])} … {_shown(value[-1])}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
