"""What a C++ plugin must know of an operator, written as plugins/generated/<op>.h.

Run as `python -m edgeattn.ops.cpp_header FOLDER` to write those of all operators with a plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from edgeattn.ops.spec import DOMAIN, LEADING, OP_VERSION, AttributeSpec, OpSpec, TensorSpec

# What the address of a tensor points to; other types, and type variables, are `void`.
_ELEMENTS = {"fp32": "float", "int32": "int32_t", "int8": "int8_t"}
_ATTRIBUTES = {"int": "int32_t", "float": "float", "string": "std::string"}


def cpp_header(spec: OpSpec) -> str:
    """The header's text; `LEADING` dimensions are one there, their product."""
    source = f"edgeattn/ops/{spec.snake_name}.py"
    lines = [
        f"//! Written from {source} by edgeattn.ops.cpp_header; not to be edited.",
        "#pragma once",
        "",
        '#include "core/op_info.h"',
        "",
        *(["#include <string>", ""] if any(a.type == "string" for a in spec.attributes) else []),
        f"namespace edgeattn::{spec.snake_name}",
        "{",
        "",
        *_dims(_symbols(spec), spec.choices),
        "",
        *_attributes(spec.attributes),
        "",
        *_tensors(spec),
        "",
        *_info(spec),
        "",
        f"}} // namespace edgeattn::{spec.snake_name}",
        "",
    ]
    return "\n".join(lines)


def write_headers(specs: Sequence[OpSpec], folder: Path) -> None:
    """Writes <op>.h for each operator."""
    for spec in specs:
        (folder / f"{spec.snake_name}.h").write_text(cpp_header(spec), encoding="utf-8")


def _symbols(spec: OpSpec) -> list[str]:
    """In order of appearance."""
    tensors = (*spec.inputs, *spec.outputs)
    return list(dict.fromkeys(s for t in tensors for s in t.shape if isinstance(s, str)))


def _dims(symbols: Sequence[str], choices: Sequence[str]) -> Iterator[str]:
    and_dtypes = ", and dtypes of type variables" if choices else ""
    yield f"//! Sizes behind the symbols of the shapes{and_dtypes}."
    yield "struct Dims"
    yield "{"
    members = ("leading" if symbol == LEADING else symbol for symbol in symbols)
    yield from (f"    int32_t {member};" for member in members)
    yield from (f"    Dtype {member};" for member in choices)
    yield ""
    yield "    static Dims of(Sizes const& sizes)"
    yield "    {"
    values = [f"sizes[{i}]" for i in range(len(symbols))]
    values += [f"static_cast<Dtype>(sizes[{len(symbols) + i}])" for i in range(len(choices))]
    yield f"        return {{{', '.join(values)}}};"
    yield "    }"
    yield "};"


def _attributes(attributes: Sequence[AttributeSpec]) -> Iterator[str]:
    yield "struct Attributes"
    yield "{"
    yield from (f"    {_ATTRIBUTES[a.type]} {a.name}{_default(a)};" for a in attributes)
    yield ""
    yield "    //! Calls the visitor with name, value and whether every node must have it."
    yield "    template <typename Self, typename Visitor>"
    parameters = "Self& self, Visitor&& visitor" if attributes else "Self&, Visitor&&"
    yield f"    static void visit({parameters})"
    yield "    {"
    for attribute in attributes:
        required = "true" if attribute.default is None else "false"
        yield f'        visitor("{attribute.name}", self.{attribute.name}, {required});'
    yield "    }"
    yield "};"


def _default(attribute: AttributeSpec) -> str:
    match attribute.default:
        case None:
            return "{}"
        case str(text):
            return f'{{"{text}"}}'
        case float(number):
            return f"{{{number!r}F}}"
        case number:
            return f"{{{number}}}"


def _tensors(spec: OpSpec) -> Iterator[str]:
    yield "//! Where the tensors lie on the device."
    yield "struct Tensors"
    yield "{"
    yield from (f"    {_element(t)} const* {t.name};" for t in spec.inputs)
    yield from (f"    {_element(t)}* {t.name};" for t in spec.outputs)
    yield ""
    yield "    static Tensors of(void const* const* inputs, void* const* outputs)"
    yield "    {"
    casts = [f"static_cast<{_element(t)} const*>(inputs[{i}])" for i, t in enumerate(spec.inputs)]
    casts += [f"static_cast<{_element(t)}*>(outputs[{i}])" for i, t in enumerate(spec.outputs)]
    yield f"        return {{{casts[0]},"
    yield from (f"            {cast}," for cast in casts[1:-1])
    yield f"            {casts[-1]}}};"
    yield "    }"
    yield "};"


def _element(tensor: TensorSpec) -> str:
    return _ELEMENTS.get(tensor.dtypes[0], "void") if len(tensor.dtypes) == 1 else "void"


def _info(spec: OpSpec) -> Iterator[str]:
    symbols = {symbol: i for i, symbol in enumerate(_symbols(spec))}
    variables = {t.variable: t.dtypes for t in (*spec.inputs, *spec.outputs)}
    yield f"inline constexpr char const* kSYMBOLS[] = {{{', '.join(map(_quoted, symbols))}}};"
    for variable, dtypes in variables.items():
        values = ", ".join(f"Dtype::k{dtype.upper()}" for dtype in dtypes)
        yield f"inline constexpr Dtype kDTYPES_{variable}[] = {{{values}}};"
    for tensor in (*spec.inputs, *spec.outputs):
        dims = ", ".join(_dim(s, symbols) for s in tensor.shape)
        yield f"inline constexpr DimInfo kSHAPE_{tensor.name}[] = {{{dims}}};"
    yield from _tensor_table("kINPUTS", spec.inputs, {})
    updated = {tensor.name: i for i, tensor in enumerate(spec.inputs)}
    yield from _tensor_table("kOUTPUTS", spec.outputs, updated)
    yield ""
    if spec.choices:
        named = ", ".join(map(_quoted, spec.choices))
        yield f"inline constexpr char const* kCHOICES[] = {{{named}}};"
        yield ""
    names = (spec.name, str(OP_VERSION), DOMAIN, f"{spec.snake_name}.")
    yield f"inline constexpr OpInfo kINFO{{{', '.join(map(_quoted, names))},"
    yield f"    kSYMBOLS, kINPUTS, kOUTPUTS{', kCHOICES' if spec.choices else ''}}};"
    yield ""
    yield "//! All of it, for OpPlugin."
    yield "struct Op"
    yield "{"
    for name in ("Dims", "Attributes", "Tensors"):
        yield f"    using {name} = {spec.snake_name}::{name};"
    yield f"    static constexpr OpInfo const& kINFO = {spec.snake_name}::kINFO;"
    yield "};"


def _dim(symbol: str | int, symbols: Mapping[str, int]) -> str:
    if symbol == LEADING:
        return f"{{{symbols[LEADING]}, kLEADING}}"
    return f"{{{symbols[symbol]}, 0}}" if isinstance(symbol, str) else f"{{-1, {symbol}}}"


def _tensor_table(
    name: str, tensors: Sequence[TensorSpec], inputs: Mapping[str, int]
) -> Iterator[str]:
    yield f"inline constexpr TensorInfo {name}[] = {{"
    for tensor in tensors:
        updates = inputs.get(tensor.updates or "", -1)
        words = f"{_quoted(tensor.name)}, {_quoted(tensor.variable)}, kDTYPES_{tensor.variable}"
        yield f"    {{{words}, kSHAPE_{tensor.name}, {updates}}},"
    yield "};"


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    from edgeattn.ops import ALL_OPS

    write_headers([spec for spec in ALL_OPS if spec.plugin], Path(sys.argv[1]))
