"""What every command has: a help that reads like a manual page, and `--debug`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

# How every command ends; a command may say more of a code.
EXIT_CODES: Mapping[int, str] = MappingProxyType(
    {
        0: "done",
        1: "refused, or a proof failed; one sentence on standard error says what to do",
        2: "wrong usage: an option, or a name of a target, scheme or variant",
        130: "interrupted; nothing half-written is left behind",
    }
)


class Manual(click.Command):
    """A command whose help ends with what it reads and writes, its exit codes and examples.

    Args:
        examples: lines for a shell that work as they stand, given the files they name.
        reads: what it takes in, as a noun phrase.
        writes: what it leaves behind.
        codes: what an exit code means where `EXIT_CODES` is not precise enough.
    """

    def __init__(
        self,
        *args: Any,
        examples: str,
        reads: str = "",
        writes: str = "",
        codes: Mapping[int, str] = MappingProxyType({}),
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.examples = textwrap.dedent(examples).strip()
        self.reads, self.writes, self.codes = reads, writes, {**EXIT_CODES, **codes}
        # Only defaults that say something are shown: None and a flag's False are not.
        self.context_settings.setdefault("show_default", True)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the last sections."""
        super().format_epilog(ctx, formatter)
        files = {"reads": self.reads, "writes": self.writes}
        sections = {
            "Files": [(name, text) for name, text in files.items() if text],
            "Exit codes": [(str(code), meaning) for code, meaning in self.codes.items()],
        }
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        with formatter.section("Examples"):
            # never wrapped: they are there to be copied
            formatter.write(textwrap.indent(self.examples, " " * formatter.current_indent) + "\n")


class Verb(Manual):
    """A command that works: it has --debug, and its --json is known before it fails."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        told = "Show the traceback of an error."
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=told))
        for option in self.params:
            if option.name in ("debug", "as_json"):
                option.callback, option.is_eager = _remember, True


class VerbGroup(Manual, click.Group):
    """A command that has commands."""


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> bool:
    ctx.find_root().meta[f"edgeattn.{option.name}"] = value
    return value


def asked(ctx: click.Context, name: str) -> bool:
    """Whether "as_json" or "debug" was given, also where the verb has failed since."""
    return bool(ctx.find_root().meta.get(f"edgeattn.{name}"))
