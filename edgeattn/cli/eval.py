"""`edgeattn eval`: perplexity of a bundle on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli.names import PATH, PROVIDER
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.runtime import Evaluation, Session

_EXAMPLES = """
  edgeattn eval ./bundle --text pride_and_prejudice.txt
  edgeattn eval ./bundle --text pride_and_prejudice.txt --windows 4 --length 256 --json
"""


@click.command(
    "eval",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the bundle BUNDLE and the text",
    writes="nothing but what it prints",
)
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@click.option(
    "--text",
    "file",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text.",
)
@click.option("--windows", default=12, help="Stretches of text to read.")
@click.option("--length", default=512, metavar="TOKENS", help="Of each.")
@click.option("--fast", is_flag=True, help="ONNX Runtime's int8 activations, as `run` uses them.")
@click.option("--threads", type=int, show_default="all cores", help="Threads of one operator.")
@click.option(
    "--provider",
    type=PROVIDER,
    metavar="NAME",
    default="cpu",
    help="Of ONNX Runtime: cpu, cuda or tensorrt.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    bundle: str,
    file: Path,
    windows: int,
    length: int,
    fast: bool,
    threads: int | None,
    provider: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of the bundle BUNDLE on a text.

    Skips 2,000 characters, tokenises the rest without special tokens, takes consecutive windows,
    and predicts each token of a window but its first from those before it.
    """
    # not at the top: `edgeattn --help` must not wait for numpy
    from edgeattn.runtime import Session

    text = _read(file)
    session = Session.open(bundle, threads=threads, exact=not fast, provider=provider)
    evaluation = _evaluate(session, text, windows, length)
    mode = "fast" if fast else "exact"
    if as_json:
        about = {"bundle": bundle, "text": str(file), "mode": mode}
        click.echo(json.dumps({**about, **evaluation.to_dict()}, ensure_ascii=False))
        return
    click.echo(
        f"perplexity {evaluation.perplexity:.3f} (nll {evaluation.nll:.4f}) on {windows} windows "
        f"of {length} tokens in {evaluation.seconds:.1f} s, {mode} arithmetic"
    )


def _evaluate(session: Session, text: str, windows: int, length: int) -> Evaluation:
    """Measures with a progress bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from edgeattn.runtime import perplexity

    console = Console(stderr=True)
    columns = (TextColumn("windows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows", total=windows)
        return perplexity(
            session,
            text,
            windows=windows,
            length=length,
            progress=lambda done, _: bar.update(task, completed=done),
        )


def _read(file: Path) -> str:
    from edgeattn.errors import RuntimeInputError
    from edgeattn.text_file import read_text_file

    text = read_text_file(file)
    if not text.strip():
        raise RuntimeInputError(
            expected=f"a text in {file}", came="the file is empty", todo="pass a text of some pages"
        )
    return text
