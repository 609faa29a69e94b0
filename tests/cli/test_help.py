"""Every help reads like a manual page, and what it shows exists."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from command_lines import calls, dry_run

from edgeattn.cli import VERBS, main
from edgeattn.cli.names import BACKEND
from edgeattn.cli.verb import EXIT_CODES, Manual
from edgeattn.errors import EdgeattnError, UsageError
from edgeattn.recipe import Recipe


def commands(command: click.Command = main, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command by what is typed for it, "plugins build"."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, *path, name)


COMMANDS = dict(commands())
WORKING = [name for name, found in COMMANDS.items() if not isinstance(found, click.Group)]


def help_of(name: str) -> str:
    done = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="edgeattn")
    assert done.exit_code == 0
    return done.output


def test_every_verb_is_seen() -> None:
    assert set(VERBS) < set(COMMANDS)
    assert {"plugins build", "plugins info"} < set(WORKING)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_its_sections(name: str) -> None:
    text = help_of(name)
    sections = ["Exit codes:", "Examples:"] if name in ("", "plugins") else (
        ["Options:", "Files:", "Exit codes:", "Examples:"]
    )  # fmt: skip
    places = [text.index(f"\n{section}\n") for section in sections]
    assert places == sorted(places)
    files = text.partition("\nFiles:\n")[2]
    assert name in ("", "plugins") or ("  reads " in files and "  writes " in files)
    codes = text.partition("\nExit codes:\n")[2].partition("\nExamples:")[0]
    assert [line.split()[0] for line in codes.splitlines() if line[2:3].isdigit()] == [
        str(code) for code in EXIT_CODES
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_purpose_is_one_sentence(name: str) -> None:
    told = (COMMANDS[name].help or "").partition("\n\n")[0]
    assert told[-1] == "."
    assert told.count(". ") == 0


@pytest.mark.parametrize("name", WORKING)
def test_every_option_says_what_it_is(name: str) -> None:
    options = [one for one in COMMANDS[name].params if isinstance(one, click.Option)]
    assert {"as_json", "debug"} <= {one.name for one in options}
    assert [one.name for one in options if not one.help or one.help[-1] not in ".]"] == []
    text = " ".join(help_of(name).split())
    for one in options:
        if isinstance(one.default, int | float | str) and not one.is_flag and not one.required:
            assert f"[default: {one.default}" in text, one.name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_parse(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Manual)
    found = calls(command.examples)
    assert len(found) >= 2
    for words in found:
        assert words[: len(name.split())] == name.split()
        dry_run(words)
    # whole lines: an example is there to be copied
    for line in command.examples.splitlines():
        assert f"\n  {line}\n" in help_of(name) + "\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("edgeattn export ./m --target jetson-orin --dry-runn", click.UsageError),
        ("edgeattn export --target jetson-orin", click.UsageError),
        ("edgeattn expert ./m", UsageError),
        ("edgeattn export ./m --target jetson-pear", UsageError),
        ("edgeattn export ./m --target cpu --quant w5-rtn", UsageError),
        ("cat emma.txt | edgeattn plan ./m --target cpu --attention lion", click.UsageError),
        ("edgeattn export ./m --target cpu --attention lion", UsageError),
        ("edgeattn plugins built", click.UsageError),
    ],
)
def test_an_example_that_rots_is_found(line: str, error: type[Exception]) -> None:
    (words,) = calls(line)
    with pytest.raises(error):
        dry_run(words)


def test_the_codes_are_those_of_the_errors() -> None:
    assert {EdgeattnError.exit_code, UsageError.exit_code} == {1, 2} < set(EXIT_CODES)


def test_defaults_that_are_told_are_those_that_hold() -> None:
    from edgeattn.pipeline.calibrate_attention import WINDOWS
    from edgeattn.recipe import CALIBRATION_LENGTH, CALIBRATION_WINDOWS
    from edgeattn.transforms.descent import LEARNING_RATE

    def told(verb: str) -> dict[str, object]:
        options = COMMANDS[verb].params
        return {one.name or "": getattr(one, "show_default", None) for one in options}

    recipe = Recipe("cpu")
    export = told("export")
    for name in ("quant", "batch", "kv_cache", "logits", "calibration_windows"):
        assert export[name] == str(getattr(recipe, name))
    assert float(str(export["finetune_lr"])) == LEARNING_RATE
    calibrate = told("calibrate")
    assert calibrate["windows"] == f"fft-rope {WINDOWS}, head-sparse {CALIBRATION_WINDOWS}"
    assert f"head-sparse {CALIBRATION_LENGTH}" in str(calibrate["length"])


def test_the_backends_that_a_shell_offers_are_those_there_are() -> None:
    from edgeattn.runtime.backend import BACKENDS

    offered = BACKEND.shell_complete(click.Context(main), COMMANDS["run"].params[0], "")
    assert tuple(item.value for item in offered) == BACKENDS


@pytest.mark.parametrize(
    "example",
    [
        "run ./bundle -p 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 7",
        "eval ./bundle --text pride_and_prejudice.txt --windows 4 --length 256 --json",
        "bench ./bundle",
        "verify ./bundle --no-tensorrt --json",
        "plan ./SmolLM2-135M --target jetson-orin --quant w4-rtn --context 8192",
        "quantize ./SmolLM2-135M --quant w4-rtn:group=32 -o SmolLM2-135M-w4",
        "export ./SmolLM2-135M --recipe recipe.toml --force",
        "targets jetson-orin@jetpack6.2",
        "ops RecurrentLinearAttention",
        "completion bash",
    ],
)
def test_an_example_works(
    example: str,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that need no TensorRT and no network, with tiny files in the places they name."""
    words = shlex.split(example)
    assert words in calls(getattr(COMMANDS[words[0]], "examples", ""))
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.copytree(tiny_checkpoint, tmp_path / "SmolLM2-135M")
    (tmp_path / "recipe.toml").write_text('target = "cpu"\n')
    text = "It is a truth universally acknowledged, that a single man is in want of a wife.\n"
    (tmp_path / "pride_and_prejudice.txt").write_text(text * 500)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words, prog_name="edgeattn")
    assert done.exit_code == 0, done.output
    assert len(done.output) > 20
