"""`edgeattn calibrate`: what an attention variant would cost a checkpoint, measured on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli.names import PATH, TARGET, VARIANT
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.attention import FftRopeRequest, HeadSparseRequest
    from edgeattn.pipeline.calibrate_attention import PolynomialReport

_EXAMPLES = """
  edgeattn calibrate ./SmolLM2-135M --attention fft-rope --text emma.txt --length 2048
  edgeattn calibrate model.gguf --attention fft-rope:window=128 --tolerance 10% --text emma.txt \\
      --target jetson-orin --context 8192 -o heads.json
  edgeattn calibrate ./SmolLM2-135M --attention head-sparse:density=7/9 --text emma.txt \\
      --eval-text persuasion.txt --eval-text mails.txt -o routers.safetensors
"""


@click.command(
    "calibrate",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the checkpoint MODEL and the text; with --eval-text further texts to judge by",
    writes="the file of --output, for fft-rope with a heat map beside it",
)
@click.argument("model", type=PATH)
@click.option(
    "--attention",
    type=VARIANT,
    required=True,
    metavar="NAME[:k=v,…]",
    help="Attention variant; see README.",
)
@click.option(
    "--text", required=True, metavar="FILE|DIR", type=click.Path(path_type=Path), help="UTF-8 text."
)
@click.option(
    "--length",
    type=int,
    metavar="TOKENS",
    show_default="fft-rope 2048, head-sparse 512",
    help="Of a window.",
)
@click.option(
    "--windows", type=int, show_default="fft-rope 8, head-sparse 64", help="Stretches of the text."
)
@click.option(
    "--tolerance",
    metavar="SHARE",
    show_default="5%",
    help="fft-rope: largest relative error of a head's output.",
)
@click.option(
    "--target", type=TARGET, metavar="NAME", help="fft-rope: say what it buys there, too."
)
@click.option(
    "--context",
    type=int,
    metavar="TOKENS",
    show_default="the model's",
    help="fft-rope: length this is said for.",
)
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="head-sparse: measure the loss on it; may be given again.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="MODEL-VARIANT.json or .safetensors, here",
    help="File to write.",
)
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(model: str, attention: str, tolerance: str | None, **options: Any) -> None:
    """Measure on a text what an attention variant costs MODEL, and prepare it.

    For fft-rope: which heads take which polynomials, in a file for `edgeattn export --attention
    fft-rope:heads=FILE`, with a heat map beside it. For head-sparse: routers, in a file for
    `--attention head-sparse:density=D,routers=FILE`. Work that was stopped goes on where it was
    when the same command runs again.
    """
    from edgeattn.attention import FftRopeRequest, HeadSparseRequest, parse_attention
    from edgeattn.errors import UsageError

    if tolerance is not None:
        attention += f"{',' if ':' in attention else ':'}tolerance={tolerance}"
    request = parse_attention(attention)
    if isinstance(request, FftRopeRequest):
        _refuse(request.name, options, "eval_texts")
        _fft_rope(model, request, **options)
    elif isinstance(request, HeadSparseRequest):
        _refuse(request.name, options, "target", "context")
        _head_sparse(model, request, **options)
    else:
        raise UsageError(
            expected="an attention variant that is prepared on a text: fft-rope or head-sparse",
            came=f"{request.label} was given, which needs none",
            todo="run edgeattn export",
        )


def _refuse(name: str, options: dict[str, Any], *others: str) -> None:
    """Takes the options of other variants away, which may not be given."""
    from edgeattn.errors import UsageError

    for key in others:
        if options.pop(key) not in (None, ()):
            option = f"--{key.removesuffix('s').replace('_', '-')}"
            raise UsageError(
                expected=f"options that {name} has",
                came=f"{option} was given, which it has not",
                todo="leave it out",
            )


def _fft_rope(
    model: str,
    request: FftRopeRequest,
    *,
    text: Path,
    length: int | None,
    windows: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline.calibrate_attention import (
        WINDOWS,
        CalibrationText,
        calibrate_polynomial_heads,
    )

    source = CalibrationText(text, length, WINDOWS if windows is None else windows)
    with show_progress() as progress:
        report = calibrate_polynomial_heads(model, request, source, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show_polynomials(report)


def _head_sparse(
    model: str,
    request: HeadSparseRequest,
    *,
    windows: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from edgeattn.cli.progress import show_progress
    from edgeattn.cli.tables import print_routers
    from edgeattn.pipeline.calibrate_routers import calibrate_routers
    from edgeattn.recipe import CALIBRATION_WINDOWS

    count = CALIBRATION_WINDOWS if windows is None else windows
    with show_progress() as progress:
        report = calibrate_routers(model, request, windows=count, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        print_routers(report)


def _show_polynomials(report: PolynomialReport) -> None:
    from edgeattn.cli.tables import print_polynomial_heads

    print_polynomial_heads(report.heads)
    heads, gain = report.heads, report.gain
    measured = sum(len(layer.heads) for layer in heads.layers)
    if not heads.passed:
        click.echo(
            f"none of {measured} heads stays within {heads.tolerance:.1%}: attention stays exact, "
            "and nothing is gained"
        )
    else:
        click.echo(
            f"{heads.passed} of {measured} heads ({heads.passed / measured:.1%}) stay within "
            f"{heads.tolerance:.1%} on {heads.held_out_windows} windows that were not fitted; the "
            "others stay exact"
        )
        click.echo(
            f"a prompt of {report.context:,} tokens then takes {_times(gain.flops)} the FLOPs of "
            "exact attention, over all heads"
        )
        for degree, tokens in report.flops_crossover.items():
            click.echo(f"degree {degree} takes fewer FLOPs from {tokens:,.0f} tokens on")
        if gain.speed is not None:
            click.echo(
                f"on {report.target} all attention would take {_times(gain.speed)} the time, by "
                "peak rate and bandwidth (not measured)"
            )
        for degree, tokens in report.speed_crossover.items():
            click.echo(f"degree {degree} would be faster there from {tokens:,} tokens on")
    image = report.image or "none, as matplotlib is missing: pip install 'edgeattn[report]'"
    seconds = sum(report.seconds.values())
    click.echo(f"heads: {report.path} ({seconds:.1f} s)\nheat map: {image}")


def _times(gain: float) -> str:
    return f"{1 / gain:.2f} times"
