"""How C++ calls the kernels of an operator, written as plugins/generated/<op>_kernels.h.

Run as `python -m edgeattn.kernels.cpp_header FOLDER` to write the headers of all operators.
"""

from __future__ import annotations

import ast
import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edgeattn.kernels.kernel import ArgumentType, Kernel
from edgeattn.kernels.variants import all_kernels

_TYPES: Mapping[ArgumentType, str] = {
    "*T": "void const*",
    "*fp32": "float const*",
    "*i32": "int32_t const*",
    "*i8": "void const*",  # where others have "*T", so that one value serves both
    "i32": "int32_t",
    "fp32": "float",
}
_WIDTH = 120
# Triton's own last arguments: memory for the kernel and for a profiler, of which ours need none.
_SCRATCH = ("globalScratch", "profileScratch")


def operator_of(kernel: Kernel) -> str:
    """In snake_case, as its files are called."""
    return kernel.name.partition(".")[0]


def signature(arguments: Iterable[tuple[str, ArgumentType]]) -> str:
    """The arguments as one line, by which library and cubins are compared."""
    return ", ".join(f"{name} {kind}" for name, kind in arguments)


def cpp_header(kernels: Sequence[Kernel]) -> str:
    """The header's text; the kernels are of one operator."""
    (operator,) = {operator_of(kernel) for kernel in kernels}
    lines = [
        f"//! Written from kernels/{operator}.py by edgeattn.kernels.cpp_header; not to be edited.",
        "#pragma once",
        "",
        '#include "core/kernel.h"',
        "",
        f"namespace edgeattn::{operator}",
        "{",
        *(line for kernel in kernels for line in ("", *_kernel(kernel))),
        "",
        f"}} // namespace edgeattn::{operator}",
        "",
    ]
    return "\n".join(lines)


def write_headers(kernels: Iterable[Kernel], folder: Path) -> None:
    """Writes <op>_kernels.h for each operator."""
    for operator, group in itertools.groupby(sorted(kernels, key=operator_of), operator_of):
        text = cpp_header(list(group))
        (folder / f"{operator}_kernels.h").write_text(text, encoding="utf-8")


def _kernel(kernel: Kernel) -> Iterator[str]:
    name = kernel.name.partition(".")[2]
    used = [name for expression in kernel.grid for name in _names(expression)]
    constants = [name for name in kernel.constants if name in used]
    values = [name for name in dict.fromkeys(used) if name not in kernel.constants]
    yield f"struct {''.join(word.capitalize() for word in name.split('_'))}"
    yield "{"
    yield f'    static constexpr char const* kNAME = "{kernel.name}";'
    yield "    static constexpr char const* kSIGNATURE"
    yield from _literals(signature(kernel.arguments.items()))
    yield "    //! Those that the grid depends on."
    yield f"    using GridConstants = std::array<int64_t, {len(constants)}>;"
    names = f"{{{', '.join(map(_quoted, constants))}}}"
    yield f"    static constexpr std::array<char const*, {len(constants)}> kGRID_CONSTANTS{names};"
    yield ""
    yield from _arguments(kernel)
    yield ""
    yield "    template <typename Values>"
    given = _parameter("Values", "values", values)
    fixed = _parameter("GridConstants", "constants", constants)
    yield f"    static Grid grid({given}, {fixed})"
    yield "    {"
    yield from (f"        int64_t const {name} = values.{name};" for name in values)
    yield from (f"        int64_t const {n} = constants[{i}];" for i, n in enumerate(constants))
    yield f"        return {{{', '.join(kernel.grid)}}};"
    yield "    }"
    yield "};"


def _arguments(kernel: Kernel) -> Iterator[str]:
    members = (*kernel.arguments, *_SCRATCH)
    yield "    struct Arguments"
    yield "    {"
    yield from (f"        {_TYPES[kind]} {name};" for name, kind in kernel.arguments.items())
    yield from (f"        void* {name};" for name in _SCRATCH)
    yield "    };"
    yield ""
    yield "    //! From anything with members of these names."
    yield "    template <typename Values>"
    yield "    static Arguments arguments(Values const& values)"
    yield "    {"
    given = [*(f"values.{name}" for name in kernel.arguments), *("nullptr" for _ in _SCRATCH)]
    yield from _returned(given)
    yield "    }"
    yield ""
    yield f"    static std::array<void*, {len(members)}> addresses(Arguments& arguments)"
    yield "    {"
    yield from _returned([f"&arguments.{name}" for name in members])
    yield "    }"


def _returned(items: Sequence[str]) -> list[str]:
    text = f"return {{{', '.join(items)}}};"
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 12)


def _literals(text: str) -> Iterator[str]:
    """A string, in as many parts as lines are needed."""
    lines = textwrap.wrap(text, _WIDTH - 15)
    for i, line in enumerate(lines):
        last = i + 1 == len(lines)
        yield f"        {' ' if i else '='} {_quoted(line if last else f'{line} ')}{';' * last}"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _parameter(kind: str, name: str, used: Sequence[str]) -> str:
    """Unnamed where nothing of it is used, or a compiler complains."""
    return f"{kind} const& {name}" if used else f"{kind} const&"


def _names(expression: str) -> list[str]:
    """Those in an expression of a grid, without the function."""
    nodes = ast.walk(ast.parse(expression))
    return [node.id for node in nodes if isinstance(node, ast.Name) and node.id != "cdiv"]


if __name__ == "__main__":
    write_headers(all_kernels().values(), Path(sys.argv[1]))
