"""The plugin with its real kernels on a real GPU, without TensorRT, against the reference."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from op_cases import TORCH, case_id, case_inputs, check_outputs, dtype_of, exact_outputs
from plugin_commands import PLUGIN_CASES, create_command, tensor_commands
from torch import Tensor

from edgeattn.engine.embed_cubins import embed_cubins
from edgeattn.kernels.aot import compile_variants, write
from edgeattn.kernels.manifest import MANIFEST
from edgeattn.kernels.variants import load_variants
from edgeattn.ops.spec import Case, OpSpec

pytestmark = pytest.mark.gpu
CASES = [(s, replace(c, dtype=d)) for s, c in PLUGIN_CASES for d in ("fp16", "bf16")]


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
@pytest.mark.parametrize(("spec", "case"), CASES, ids=case_id)
def test_enqueue_equals_the_reference(
    spec: OpSpec, case: Case, in_place: bool, gpu_library: Any, tmp_path: Path
) -> None:
    inputs = case_inputs(spec, case)
    exact = exact_outputs(spec, case, inputs)
    for tensor, x in zip(spec.inputs, inputs, strict=True):
        stored(x, tmp_path / tensor.name)
    described = tensor_commands(spec, case, in_place=in_place, files=tmp_path)
    commands = [create_command(spec, case.attributes), "device", *described]
    saved = [tmp_path / tensor.name for tensor in spec.outputs]
    saves = [f"save {file.name} {file}" for file in saved]
    answers = gpu_library.drive(*commands, "shape", "enqueue", *saves, cuda=tmp_path)
    assert (answers["shape"], answers["enqueue"], answers.logged) == ("0", "0", "")
    found = [
        torch.frombuffer(bytearray(file.read_bytes()), dtype=TORCH[dtype_of(tensor, case)])
        for tensor, file in zip(spec.outputs, saved, strict=True)
    ]
    shaped = [x.reshape(right.shape) for x, right in zip(found, exact, strict=True)]
    check_outputs(spec, case, shaped, exact)
