"""`edgeattn calibrate`: what an attention variant would cost a checkpoint, measured on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.attention import FftRopeRequest
    from edgeattn.pipeline.calibrate_attention import PolynomialReport

_EPILOG = """\b
Examples:
  edgeattn calibrate ./SmolLM2-135M --attention fft-rope --text emma.txt --length 2048
  edgeattn calibrate model.gguf --attention fft-rope:window=128,tolerance=10% --text emma.txt \\
      --target jetson-orin --context 8192 -o heads.json
"""


@click.command("calibrate", epilog=_EPILOG)
@click.argument("model")
@click.option(
    "--attention", required=True, metavar="NAME[:k=v,…]", help="Attention variant; see README."
)
@click.option(
    "--text", required=True, metavar="FILE|DIR", type=click.Path(path_type=Path), help="UTF-8 text."
)
@click.option("--length", type=int, help="Tokens of a window [2048, or the model's context].")
@click.option(
    "--windows", default=8, show_default=True, help="Stretches of text; half of them judge."
)
@click.option("--target", metavar="NAME", help="Say what it buys on this target, too.")
@click.option("--context", type=int, help="Tokens of the prompt that is said for [the model's].")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write [MODEL-VARIANT.json], with a heat map beside it.",
)
@click.option("--offline", is_flag=True, help="Take a hub id from the cache alone.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(model: str, attention: str, as_json: bool, **options: Any) -> None:
    """Measure on a text what an attention variant costs each head of MODEL, and choose.

    The file that is written is what `edgeattn export --attention NAME:heads=FILE` takes. Work that
    was stopped goes on where it was when the same command runs again.
    """
    from edgeattn.attention import FftRopeRequest, parse_attention
    from edgeattn.errors import UsageError

    request = parse_attention(attention)
    if not isinstance(request, FftRopeRequest):
        raise UsageError(
            expected="an attention variant that this verb calibrates",
            came=f"{request.name} is none",
            todo="pass --attention fft-rope",
        )
    _fft_rope(model, request, as_json=as_json, **options)


def _fft_rope(
    model: str,
    request: FftRopeRequest,
    *,
    text: Path,
    length: int | None,
    windows: int,
    as_json: bool,
    **options: Any,
) -> None:
    from edgeattn.cli.progress import show_progress
    from edgeattn.pipeline.calibrate_attention import CalibrationText, calibrate_polynomial_heads

    source = CalibrationText(text, length, windows)
    with show_progress() as progress:
        report = calibrate_polynomial_heads(model, request, source, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show_polynomials(report)


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
