"""Compiled kernels as sources of the plugin library: cubins.S has the bytes, registry.cpp a table.

The manifest is that of `edgeattn.kernels.aot`, whose hashes were checked when it was read; only the
standard library is needed here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeattn.errors import BundleError

ASSEMBLY, REGISTRY = "cubins.S", "registry.cpp"
# In the library a zero byte stands before it, the table as JSON behind it, then a zero byte.
TABLE_MARKER = "edgeattn-plugins-table "

_MANIFEST_VERSION = 1
_WARP = 32


def embed_cubins(manifest: Path, out: Path) -> None:
    """Writes the sources; a file that would stay the same is left alone, and need not be compiled.

    Args:
        manifest: JSON file with the cubins beside it.
        out: folder, made where it does not exist.

    Raises:
        BundleError: this is no such manifest, it is of another version or a cubin is missing.
    """
    content = _read(manifest)
    cubins = sorted(content["cubins"], key=lambda cubin: str(cubin["kernel"]))
    for cubin in cubins:
        if not (manifest.parent / cubin["file"]).is_file():
            raise _unusable(manifest, f"its {cubin['file']} is missing")
    out.mkdir(parents=True, exist_ok=True)
    _write(out / ASSEMBLY, _assembly(cubins, manifest.parent.resolve()))
    _write(out / REGISTRY, _registry(content, cubins))


def operator_name(kernel: str) -> str:
    """Of a kernel "operator_name.kernel": OperatorName."""
    return "".join(word.capitalize() for word in kernel.partition(".")[0].split("_"))


def _read(manifest: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(manifest.read_bytes())
    except OSError as error:
        raise _unusable(manifest, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _unusable(manifest, f"it is no JSON ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != _MANIFEST_VERSION:
        raise _unusable(manifest, f"its version is {version}, not {_MANIFEST_VERSION}")
    return content


def _unusable(manifest: Path, problem: str) -> BundleError:
    return BundleError(
        expected=f"compiled kernels behind {manifest}",
        came=problem,
        todo="compile the kernels again",
    )


def _write(file: Path, lines: Iterable[str]) -> None:
    text = "\n".join(lines) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _assembly(cubins: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    yield '    .section .rodata.edgeattn_cubins, "a", %progbits'
    for i, cubin in enumerate(cubins):
        path = str(folder / cubin["file"]).replace("\\", "\\\\").replace('"', '\\"')
        yield ""
        # The hash makes this text another one when the file's content changes.
        yield f"// {cubin['sha256']}"
        yield "    .balign 64"
        yield f"    .globl {_symbol(i)}"
        yield f"    .hidden {_symbol(i)}"
        yield f"{_symbol(i)}:"
        yield f'    .incbin "{path}"'
    yield ""
    yield '    .section .note.GNU-stack, "", %progbits'


def _symbol(index: int) -> str:
    return f"edgeattnCubin{index}"


def _registry(content: Mapping[str, Any], cubins: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    groups = {
        kernel: list(group)
        for kernel, group in itertools.groupby(enumerate(cubins), lambda item: item[1]["kernel"])
    }
    operators = sorted({kernel.partition(".")[0] for kernel in groups})
    yield '#include "core/registry.h"'
    yield '#include "core/table.h"'
    yield from (f'#include "generated/{operator}_kernels.h"' for operator in operators)
    yield ""
    yield 'extern "C"'
    yield "{"
    yield from (f"extern unsigned char const {_symbol(i)}[];" for i in range(len(cubins)))
    yield "}"
    yield ""
    yield "namespace edgeattn"
    yield "{"
    yield "namespace"
    yield "{"
    for number, (kernel, group) in enumerate(groups.items()):
        yield ""
        yield f"// {kernel}"
        yield from _signature_check(kernel, group[0][1])
        yield from _cubins(number, group)
    if groups:
        yield ""
        yield "constexpr KernelCubins kKERNEL_LIST[] = {"
        yield from (f'    {{"{k}", kCUBINS{number}}},' for number, k in enumerate(groups))
        yield "};"
    yield ""
    yield "} // namespace"
    yield ""
    yield f"View<KernelCubins> const kKERNELS{'{kKERNEL_LIST}' if groups else '{}'};"
    yield f'char const kKERNELS_SHA256[] = "{content["kernels_sha256"]}";'
    yield ""
    yield from _table(content, cubins)
    yield ""
    yield "} // namespace edgeattn"


def _signature_check(kernel: str, cubin: Mapping[str, Any]) -> Iterator[str]:
    """A library whose code and cubins are of different versions does not compile."""
    operator, _, name = kernel.partition(".")
    struct = f"{operator}::{''.join(word.capitalize() for word in name.split('_'))}"
    given = ", ".join(f"{argument} {kind}" for argument, kind in cubin["arguments"])
    yield f"static_assert(isSame({struct}::kSIGNATURE,"
    yield f'                  "{given}"),'
    yield f'    "{kernel} was compiled from another version: compile the kernels again");'


def _cubins(number: int, group: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[str]:
    for i, cubin in group:
        numbers = {n: v for n, v in cubin["constants"].items() if isinstance(v, int)}
        constants = ", ".join(f'{{"{name}", {value}}}' for name, value in numbers.items())
        kind = f"Constant kCONSTANTS{i}[] =" if numbers else f"View<Constant> kCONSTANTS{i}"
        yield f"constexpr {kind} {{{constants}}};"
    yield f"Cubin const kCUBINS{number}[] = {{"
    for i, cubin in group:
        dtype, threads = f"Dtype::k{cubin['dtype'].upper()}", _WARP * cubin["warps"]
        words = f'{cubin["sm"]}, {dtype}, kCONSTANTS{i}, "{cubin["entry"]}", {threads}'
        yield f"    {{{words}, {cubin['shared']}, {_symbol(i)}}},"
    yield "};"


def _table(content: Mapping[str, Any], cubins: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The JSON of the library; what only the compiler knows it adds itself."""
    operators = sorted({operator_name(cubin["kernel"]) for cubin in cubins})
    facts = {
        "triton": content["triton"],
        "kernels_sha256": content["kernels_sha256"],
        "ops": operators,
    }
    yield f'char const kTABLE[] = "\\0{TABLE_MARKER}" EDGEATTN_TABLE_START'
    yield f"    {_literal(json.dumps(facts)[1:-1])}"
    yield '    ", \\"variants\\": ["'
    for i, cubin in enumerate(cubins):
        variant = {name: cubin[name] for name in ("kernel", "dtype", "constants", "sm")}
        yield f"    {_literal(json.dumps(variant) + (', ' if i + 1 < len(cubins) else ''))}"
    yield '    "]}";'
    yield f"char const* const kTABLE_JSON = kTABLE + {len(TABLE_MARKER) + 1};"


def _literal(text: str) -> str:
    """A C++ string literal; JSON is in ASCII and its escapes are those of C++."""
    return json.dumps(text)
