"""Commands for plugins/test/plugin_driver.cpp, from the dossier of an operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from op_cases import dtype_of

from edgeattn.ops import ALL_OPS
from edgeattn.ops.spec import Case, OpSpec

PLUGIN_OPS = [spec for spec in ALL_OPS if spec.plugin]
# In fp16, for which every library here has kernels.
PLUGIN_CASES = [(spec, replace(case, dtype="fp16")) for spec in PLUGIN_OPS for case in spec.cases]
_KINDS = {"int": "int", "float": "float", "string": "text"}


def create_command(spec: OpSpec, attributes: Mapping[str, Any]) -> str:
    """Makes the plugin as TensorRT's parser does, with these attributes."""
    kinds = {attribute.name: _KINDS[attribute.type] for attribute in spec.attributes}
    words = (f"{name}={kinds[name]}:{value}" for name, value in attributes.items())
    return " ".join(("create", spec.name, *words))


def tensor_commands(
    spec: OpSpec, case: Case, *, in_place: bool = True, files: Path | None = None
) -> list[str]:
    """Describes inputs and outputs; the inputs' numbers lie in `files`/NAME."""
    inputs = spec.input_shapes(case)
    outputs = spec.output_shapes(*inputs, **case.attributes)
    commands = []
    for tensor, shape in zip(spec.inputs, inputs, strict=True):
        words = ["input", tensor.name, dtype_of(tensor, case), "x".join(map(str, shape))]
        commands.append(" ".join([*words, *([str(files / tensor.name)] if files else [])]))
    for tensor, shape in zip(spec.outputs, outputs, strict=True):
        words = ["output", tensor.name, dtype_of(tensor, case), "x".join(map(str, shape))]
        commands.append(
            " ".join([*words, *([tensor.updates] if in_place and tensor.updates else [])])
        )
    return commands
