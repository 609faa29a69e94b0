"""Writes classes that implement TensorRT's interfaces with functions that end the program.

The fake derives from them and overrides what it needs, so that it has the very vtables of the
headers it is built with, whatever their version.
"""

from __future__ import annotations

import re
from pathlib import Path

INTERFACES = {
    "apiv::VRuntime": "NvInferImpl.h",
    "apiv::VCudaEngine": "NvInferImpl.h",
    "apiv::VExecutionContext": "NvInferImpl.h",
    "IPluginRegistry": "NvInferRuntimeCommon.h",
}
HEAD = """\
#pragma once
#include <NvInferRuntime.h>
#include <cstdio>
#include <cstdlib>

[[noreturn]] inline void missing(char const* name)
{
    std::fprintf(stderr, "fake_nvinfer: %s is not made\\n", name);
    std::abort();
}

namespace nvinfer1
{
"""


def write_stubs(headers: Path, out: Path) -> None:
    """Writes the classes, as StubRuntime for apiv::VRuntime."""
    classes = [_stub(name, (headers / file).read_text()) for name, file in INTERFACES.items()]
    out.write_text(HEAD + "\n".join(classes) + "\n} // namespace nvinfer1\n")


def _stub(interface: str, header: str) -> str:
    name = interface.rpartition("::")[2]
    found = re.search(rf"^class {name}\b[^;{{]*\{{(.*?)^\}};", header, re.MULTILINE | re.DOTALL)
    assert found, interface
    body = re.sub(r"^#if.*?^#endif[^\n]*$", "", found[1], flags=re.MULTILINE | re.DOTALL)
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", body, flags=re.DOTALL)
    pure = re.findall(r"\bvirtual\s+([^;{}~]*?)\s*=\s*0\s*;", body)  # destructors have a body
    assert pure, interface
    lines = [f'    {" ".join(one.split())} override {{ missing("{name}"); }}' for one in pure]
    stub = f"class Stub{name.removeprefix('V').removeprefix('I')} : public {interface}"
    return "\n".join([stub, "{", "public:", *lines, "};"])
