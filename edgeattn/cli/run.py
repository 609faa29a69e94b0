"""`edgeattn run`: a bundle continues a prompt."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, cast

import click

from edgeattn.cli.names import BACKEND, PATH, PROVIDER
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from edgeattn.runtime import Generation, Token
    from edgeattn.runtime.backend import BackendName

_EXAMPLES = """
  edgeattn run ./bundle -p "It is a truth"
  edgeattn run ./bundle --chat -p "What is a bundle?" -n 200
  edgeattn run ./bundle -p "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
  edgeattn run ./bundle -p "It is a truth" --backend tensorrt
  cat prompt.txt | edgeattn run ./bundle -p - --json
"""

_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@click.command(
    "run",
    cls=Verb,
    examples=_EXAMPLES,
    reads="the bundle BUNDLE; with -p - standard input",
    writes="the text to standard output as it comes",
)
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@click.option("-p", "--prompt", required=True, help="Text to continue; - reads standard input.")
@click.option("-n", "--max-new-tokens", default=128, metavar="TOKENS", help="Most that are added.")
@click.option("--chat", is_flag=True, help="Put the prompt through the bundle's chat template.")
@click.option("--temperature", default=0.0, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, help="Most candidates; 0 is all.")
@click.option("--top-p", default=1.0, help="Their probability; 1 is all.")
@click.option("--seed", default=0, help="Same seed, same text.")
@click.option("--exact", is_flag=True, help="Quantised weights: fp32 sums, as proven; slower.")
@click.option("--threads", type=int, show_default="all cores", help="Threads of one operator.")
@click.option(
    "--provider",
    type=PROVIDER,
    metavar="NAME",
    default="cpu",
    help="Of ONNX Runtime: cpu, cuda or tensorrt.",
)
@click.option(
    "--backend",
    type=BACKEND,
    metavar="NAME",
    default="onnxruntime",
    help="onnxruntime, or tensorrt for an engine that edgeattn build made.",
)
@click.option(
    "--engine",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    show_default="the newest that runs here",
    help="With --backend tensorrt: which engine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.pass_context
def command(
    context: click.Context,
    bundle: str,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    exact: bool,
    threads: int | None,
    provider: str,
    backend: str,
    engine: str | None,
    as_json: bool,
) -> None:
    """Continue a prompt with the bundle BUNDLE, token by token.

    The text goes to standard output, speed and memory of the cache to standard error.
    """
    # not at the top: `edgeattn --help` must not wait for numpy
    from edgeattn.runtime import Session, generate

    session = Session.open(
        bundle,
        backend=cast("BackendName", backend),  # an unknown one is refused there
        threads=threads,
        exact=exact,
        provider=provider,
        engine=engine,
    )
    generation = generate(
        session,
        _read_stdin() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_token=None if as_json else _print_token,
    )
    if as_json:
        click.echo(json.dumps({"bundle": bundle, **generation.to_dict()}, ensure_ascii=False))
    else:
        click.echo()
        click.echo(_speed(generation), err=True)
    if generation.finish_reason == "interrupted":
        context.exit(_INTERRUPTED)


def _print_token(token: Token) -> None:
    # A terminal that cannot show a character shows a question mark instead of ending the program.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    click.echo(token.text, nl=False)


def _read_stdin() -> str:
    from edgeattn.errors import RuntimeInputError

    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RuntimeInputError(
            expected="a prompt in UTF-8 on standard input",
            came=f"byte {error.start} does not fit",
            todo="convert it to UTF-8",
        ) from error
    # What ends the last line is the shell's, not the prompt's.
    return text.removesuffix("\n").removesuffix("\r")


def _speed(generation: Generation) -> str:
    from edgeattn.cli.tables import size_text

    prefill, decode = generation.prefill_tokens_per_second, generation.decode_tokens_per_second
    parts = [
        f"prefill {generation.prompt_tokens} tokens"
        + (f" at {prefill:.1f} tokens/s" if prefill else ""),
        f"decode {len(generation.token_ids)} tokens"
        + (f" at {decode:.1f} tokens/s" if decode else ""),
        f"cache {size_text(generation.cache_bytes)}",
        f"ended by {generation.finish_reason}",
    ]
    return "; ".join(parts)
