"""The plugin with its real kernels on a real GPU, without TensorRT, against the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from op_cases import TORCH, case_id, case_inputs, check_outputs, dtype_of, exact_outputs
from torch import Tensor

from edgeattn.engine.embed_cubins import embed_cubins
from edgeattn.kernels.aot import compile_variants, write
from edgeattn.kernels.manifest import MANIFEST
from edgeattn.kernels.variants import load_variants
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.ops.spec import Case

pytestmark = pytest.mark.gpu
CASES = [case for case in SPEC.cases if case.dtype != "fp32"]


@pytest.fixture(scope="session")
def gpu_library(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library with all kernels for the GPU in this machine."""
    folder = tmp_path_factory.mktemp("gpu")
    major, minor = torch.cuda.get_device_capability()
    manifest = compile_variants(load_variants(), [10 * major + minor], cache=folder / "cache")
    write(manifest, folder / "cubins", cache=folder / "cache")
    embed_cubins(folder / "cubins" / MANIFEST, folder / "sources")
    return build(platform.machine(), sources=folder / "sources")


def stored(x: Tensor, file: Path) -> Path:
    file.write_bytes(x.contiguous().view(torch.uint8).numpy().tobytes())
    return file


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_enqueue_equals_the_reference(
    case: Case, in_place: bool, gpu_library: Any, tmp_path: Path
) -> None:
    inputs = case_inputs(SPEC, case)
    exact = exact_outputs(SPEC, case, inputs)
    kinds = {"int": "int", "float": "float", "string": "text"}
    types = {attribute.name: kinds[attribute.type] for attribute in SPEC.attributes}
    words = (f"{name}={types[name]}:{value}" for name, value in case.attributes.items())
    commands = [" ".join(("create", SPEC.name, *words)), "device"]
    for tensor, x in zip(SPEC.inputs, inputs, strict=True):
        file = stored(x, tmp_path / tensor.name)
        shape = "x".join(map(str, x.shape))
        commands.append(f"input {tensor.name} {dtype_of(tensor, case)} {shape} {file}")
    for tensor, x in zip(SPEC.outputs, exact, strict=True):
        shape = "x".join(map(str, x.shape))
        alias = tensor.updates if in_place and tensor.updates else ""
        commands.append(f"output {tensor.name} {dtype_of(tensor, case)} {shape} {alias}")
    saved = [tmp_path / tensor.name for tensor in SPEC.outputs]
    saves = [f"save {file.name} {file}" for file in saved]
    answers = gpu_library.drive(*commands, "shape", "enqueue", *saves, cuda=tmp_path)
    assert (answers["shape"], answers["enqueue"], answers.logged) == ("0", "0", "")
    found = [
        torch.frombuffer(bytearray(file.read_bytes()), dtype=TORCH[dtype_of(tensor, case)])
        for tensor, file in zip(SPEC.outputs, saved, strict=True)
    ]
    shaped = [x.reshape(right.shape) for x, right in zip(found, exact, strict=True)]
    check_outputs(SPEC, case, shaped, exact)
