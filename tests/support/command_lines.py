"""Command lines that texts show: found, and parsed as the program would, but never run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from edgeattn.attention import parse_attention
from edgeattn.cli import main
from edgeattn.cli.names import SCHEME, TARGET, VARIANT
from edgeattn.devices.registry import parse_target
from edgeattn.quant.scheme import parse_scheme

READERS: Mapping[click.ParamType, Callable[[str], object]] = {
    SCHEME: parse_scheme,
    TARGET: parse_target,
    VARIANT: parse_attention,
}


def calls(shell: str) -> list[list[str]]:
    """The words behind `edgeattn` of every call in a piece of shell, pipes and lists among them."""
    words: list[list[str]] = []
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>()")
        lexer.whitespace_split = True
        part: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set("|;&<>()"):
                if part[:1] == ["edgeattn"]:
                    words.append(part[1:])
                part = []
            else:
                part.append(token)
    return words


def shell_blocks(markdown: str) -> str:
    """All that stands in the shell blocks of a page."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", markdown, re.DOTALL))


def dry_run(words: list[str]) -> click.Context:
    """The context of a command that could run now: its options exist, its names are known.

    Raises:
        click.UsageError: what click itself refuses.
        EdgeattnError: a target, scheme or variant that is none.
    """
    command: click.Command = main
    context = click.Context(main)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        assert name is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    help_alone = rest in (["--help"], ["-h"], ["--version"])
    if not help_alone:
        context = command.make_context(context.info_name, rest, parent=context.parent)
    for option, value in _named_values(context):
        READERS[option.type](value)
    return context


def _named_values(context: click.Context) -> Iterator[tuple[click.Parameter, str]]:
    for option in context.command.params:
        given: Any = context.params.get(option.name or "")
        if option.type in READERS and given is not None:
            for value in [given] if isinstance(given, str) else given:
                yield option, value
