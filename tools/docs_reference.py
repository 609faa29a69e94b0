"""The reference pages of the documentation: commands, operators and errors, from the code."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import click
from readme_tables import table, yes

from edgeattn import errors
from edgeattn.attention import REQUESTS
from edgeattn.cli import main
from edgeattn.cli.verb import Manual
from edgeattn.ops import ALL_OPS
from edgeattn.ops.spec import DOMAIN, OP_VERSION, OpSpec, TensorSpec
from edgeattn.quant.scheme import SCHEMES, Scheme, WeightFormat

INCLUDE = Path(__file__).resolve().parent.parent / "plugins" / "include" / "edgeattn"


def code(text: str) -> str:
    """Text as code in a cell of a table, where a bar would end the cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return re.sub(r"\s+", " ", html.escape(text, quote=False)).replace("|", "&#124;")


def shell(lines: str) -> str:
    """A block that a reader can copy."""
    return f"```sh\n{lines}\n```"


def commands() -> str:
    """Every command with what its --help says."""
    parts = [
        "# Commands",
        "What `--help` prints, on one page. Every command takes `--json`, which prints one object "
        "on standard output and everything else on standard error.",
    ]
    for context in walk(click.Context(main, info_name="edgeattn", **main.context_settings)):
        parts += command_parts(context)
    return "\n\n".join(parts) + "\n"


def walk(context: click.Context) -> Iterator[click.Context]:
    """The context of a command and of all below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            found = context.command.get_command(context, name)
            assert found is not None
            yield from walk(click.Context(found, parent=context, info_name=name))


def command_parts(context: click.Context) -> Iterator[str]:
    """The paragraphs of one command."""
    command, path = context.command, context.command_path
    assert isinstance(command, Manual)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"## {path}"
    yield f"```text\n{usage}\n```"
    yield inspect.cleandoc(command.help or "")
    options = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    records = filter(None, (one.get_help_record(context) for one in options))
    yield table(("option", "what it says"), ((code(name), cell(text)) for name, text in records))
    for title, text in (("Reads", command.reads), ("Writes", command.writes)):
        if text:
            yield f"**{title}** {cell(text)}."
    codes = ((str(value), cell(meaning)) for value, meaning in command.codes.items())
    yield table(("exit code", "meaning"), codes)
    yield shell(command.examples)


def operators() -> str:
    """Every operator of domain edgeattn: its formula, tensors, attributes, bounds and sources."""
    parts = [
        "# Operators",
        f"Nodes of ONNX domain `{DOMAIN}`, version {OP_VERSION}. Each means the same in all its "
        "runtimes; what it means is its reference in torch, and all others are compared with that. "
        "All inputs are mandatory: what is not used is given as a neutral tensor. "
        "`edgeattn ops NAME` prints the same.",
    ]
    for spec in ALL_OPS:
        parts += operator_parts(spec)
    return "\n\n".join(parts) + "\n"


def operator_parts(spec: OpSpec) -> Iterator[str]:
    """The paragraphs of one operator."""
    yield f"## {spec.name}"
    yield cited(spec.meaning[0].upper() + spec.meaning[1:])
    for title, side in (("Inputs", spec.inputs), ("Outputs", spec.outputs)):
        yield f"**{title}**"
        titles = ("name", "shape", "dtypes", "values", "next value of")
        yield table(titles, (tensor_row(tensor) for tensor in side))
    if spec.attributes:
        yield "**Attributes**"
        rows = (
            (
                code(one.name),
                one.type,
                "required" if one.default is None else code(str(one.default)),
            )
            for one in spec.attributes
        )
        yield table(("name", "type", "default"), rows)
    yield "**Tolerance**, beside twice the error of plain torch in that dtype"
    bounds = ((dtype, f"{one.floor:g}", cell(one.reason)) for dtype, one in spec.tolerance.items())
    yield table(("dtype", "floor", "why"), bounds)
    ways = ", ".join(spec.to_dict()["implementations"])
    yield f"**Implementations** {ways}, tested against the reference on {len(spec.cases)} cases."
    papers = dict.fromkeys(re.findall(r"arXiv \d{4}\.\d{4,5}", spec.meaning))
    if papers:
        yield f"**Sources** {cited(', '.join(papers))}"


def tensor_row(tensor: TensorSpec) -> tuple[str, ...]:
    """One line of a table of tensors."""
    shape = f"[{', '.join(map(str, tensor.shape))}]"
    updated = code(tensor.updates) if tensor.updates else ""
    return code(tensor.name), code(shape), ", ".join(tensor.dtypes), tensor.values, updated


def cited(text: str) -> str:
    """Text whose papers are links, but in formulas."""
    link = r"[arXiv \1](https://arxiv.org/abs/\1)"
    return "\n".join(
        line if line.startswith("    ") else re.sub(r"arXiv (\d{4}\.\d{4,5})", link, line)
        for line in text.splitlines()
    )


def error_classes() -> list[type[errors.EdgeattnError]]:
    """Every class of error, the family's head first."""
    found = [one for one in vars(errors).values() if inspect.isclass(one)]
    return [one for one in found if issubclass(one, errors.EdgeattnError)]


def cpp_codes(text: str) -> dict[str, tuple[int, str]]:
    """The codes of error.hpp: name -> number and comment."""
    found = re.findall(r"^ +k(\w+) = (\d+), +//!< (.+)$", text, re.MULTILINE)
    return {name: (int(number), comment) for name, number, comment in found}


def error_catalogue() -> str:
    """Every class of error, in Python and in C++."""
    codes = cpp_codes((INCLUDE / "error.hpp").read_text("utf-8"))
    parts = [
        "# Errors",
        "A refusal is one sentence: *expected* what edgeattn needed, *but* what came, and what to "
        "do. In Python it is an exception with these parts as `expected`, `came`, `todo` and "
        "`details`; the command line prints it on standard error and ends with the exit code. In "
        "C++ it is an `edgeattn::Error` with a `code()`; in C a function returns the code, and "
        "`edgeattn_last_error()` gives the sentence.",
    ]
    for kind in error_classes():
        first, _, advice = (inspect.getdoc(kind) or "").partition("\n\n")
        in_cpp = [f"`k{name}` ({number})" for name, (number, told) in codes.items()
                  if told.startswith(f"{kind.__name__}:")]  # fmt: skip
        parts += [f"## {kind.__name__}", first]
        if kind is not errors.EdgeattnError:
            parts.append(f"**What to do** {advice}")
        parts.append(f"**Exit code** {kind.exit_code}. **In C++** {in_cpp[0] if in_cpp else '–'}")
    rows = ((f"`k{name}`", str(number), cell(told)) for name, (number, told) in codes.items())
    parts += ["## Codes of C and C++", table(("`edgeattn::ErrorCode`", "in C", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def schemes() -> str:
    """Every scheme of quantisation with its defaults."""
    titles = ("`--quant`", "linear layers", "embedding", "activations", "rotated", "options")
    return table(titles, (scheme_row(scheme) for scheme in SCHEMES.values()))


def scheme_row(scheme: Scheme) -> tuple[str, ...]:
    """One line of the table of schemes."""
    activations = f"int{scheme.activation_bits}" if scheme.activation_bits else "the dtype"
    method = {"rtn": "nearest", "gptq": "GPTQ"}[scheme.method]
    linear = f"{weights(scheme.linear)}, {method}" if scheme.linear else weights(None)
    rotated = "no" if scheme.rotation == "none" else scheme.rotation
    options = " ".join(f"`{option}`" for option in scheme.options)
    return f"`{scheme.name}`", linear, weights(scheme.embedding), activations, rotated, options


def weights(stored: WeightFormat | None) -> str:
    """How a matrix is stored."""
    if stored is None:
        return "the dtype"
    scales = f"groups of {stored.group_size}" if stored.group_size else "per channel"
    return f"int{stored.bits}, {scales}"


def variants() -> str:
    """Every attention variant, what it is and whether it is prepared on a text."""
    rows: Iterable[tuple[str, ...]] = (
        (
            f"`{name}`",
            cell((inspect.getdoc(kind) or "").partition("\n\n")[0].partition(": ")[2]),
            " ".join(f"`{field.name}`" for field in fields(kind)),
            yes(kind.needs_calibration is not False),
        )
        for name, kind in REQUESTS.items()
    )
    return table(("`--attention`", "what it is", "options", "reads a calibration text"), rows)
