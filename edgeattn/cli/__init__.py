"""The command line: one lazily loaded file per verb, one place where errors become exit codes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from edgeattn import __version__
from edgeattn.cli.verb import VerbGroup, asked
from edgeattn.errors import EdgeattnError, unknown_name

# Verb -> one line of help. The modules are imported only when their verb is used, so that
# `edgeattn --help` needs neither numpy nor torch.
VERBS = {
    "export": "Turn a checkpoint into a proven bundle for a target.",
    "quantize": "Write a checkpoint, rotated and quantised, for other tools to check.",
    "calibrate": "Measure on a text what an attention variant costs each head, and choose.",
    "verify": "Prove a bundle again: hashes, ONNX Runtime, TensorRT's parser and builder.",
    "run": "Let a bundle continue a text on this machine.",
    "doctor": "Say whether a model or bundle will work on a target, and what this machine is.",
    "eval": "Measure a bundle's perplexity on a text.",
    "bench": "Measure how fast a bundle is on this machine, or compare two measurements.",
    "build": "Build a TensorRT engine for a bundle.",
    "package": "Pack libedgeattn for C++ applications, or a bundle for Triton.",
    "plan": "Say what a model costs on a target, and which heads would cost less.",
    "targets": "List the devices edgeattn knows, with every figure's source.",
    "ops": "List the operators of domain edgeattn, and what each one means.",
    "plugins": "Build the TensorRT plugin library, or say what one holds.",
    "completion": "Print what makes a shell complete these commands.",
}

_EXAMPLES = """
  edgeattn export ./SmolLM2-135M --target jetson-orin --quant w4-rtn
  edgeattn verify ./SmolLM2-135M-jetson-orin-agx-64gb-w4-rtn
  edgeattn run ./bundle -p "It is a truth universally acknowledged"
"""


class _LazyGroup(VerbGroup):
    """Loads a verb's module on first use and turns refusals into one sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"edgeattn.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        unknown = bool(args) and not args[0].startswith("-") and args[0] not in VERBS
        if unknown and not ctx.resilient_parsing:  # a shell that completes wants no refusal
            raise unknown_name("verb", args[0], VERBS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeattnError as error:
            _show_notes(error)
            _fail(ctx, str(error), error.exit_code, error.details)
        except KeyboardInterrupt as error:
            _show_notes(error)
            _fail(ctx, "interrupted; nothing half-written was left behind", 130)
        except click.UsageError as error:
            if asked(ctx, "as_json"):
                click.echo(json.dumps({"error": error.format_message(), "exit_code": 2}))
            raise
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            _show_notes(error)
            sentence = f"internal error: {type(error).__name__}: {error}"
            _fail(ctx, f"{sentence} (run again with --debug and report what it prints)", 1)


def _show_notes(error: BaseException) -> None:
    """What an error, or the one it was made from, says besides its sentence."""
    for one in filter(None, (error.__cause__, error)):
        for note in getattr(one, "__notes__", ()):  # of Python 3.11
            click.echo(note, err=True)


def _fail(
    ctx: click.Context, sentence: str, exit_code: int, details: Mapping[str, Any] | None = None
) -> NoReturn:
    if asked(ctx, "debug"):
        traceback.print_exc()
    if asked(ctx, "as_json"):
        content = {"error": sentence, "exit_code": exit_code, **(details or {})}
        click.echo(json.dumps(content, indent=2))
    click.echo(f"edgeattn: {sentence}", err=True)
    ctx.exit(exit_code)


@click.group(
    cls=_LazyGroup, examples=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="edgeattn")
def main() -> None:
    """From a transformer checkpoint to a bundle proven equal in PyTorch and ONNX Runtime.

    A bundle is accepted by a real TensorRT before it reaches the device it is made for.
    """
    # Before torch is loaded: its threads else wait for each other by spinning, which makes a proof
    # four times slower where another process holds a core (measured: 46 s and 11 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if "_EDGEATTN_COMPLETE" in os.environ:  # a shell asks what could follow
    importlib.import_module("edgeattn.cli.completion")  # our way with bash, beside click's
