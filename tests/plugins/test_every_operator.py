"""Every operator with a plugin, in every case of its dossier: what is told and launched."""

from __future__ import annotations

import importlib
import json
import re
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from op_cases import case_id, case_inputs, outputs_of
from plugin_commands import PLUGIN_CASES, PLUGIN_OPS, create_command, tensor_commands

from edgeattn.ops.spec import DOMAIN, OP_VERSION, Case, OpSpec

RUN = ("shape", "enqueue")
TABLE_SM = 99  # the dummies of conftest.py that are as in variants.toml
_FIELD_TYPES = {"float": 1, "string": 0, "int": 5}  # nvinfer1::PluginFieldType


def test_creators_are_found_by_name_version_and_namespace(library: Any) -> None:
    answers = library.drive("creators", "abi", "table")
    expected = []
    for spec in PLUGIN_OPS:
        fields = [f"{a.name}:{_FIELD_TYPES[a.type]}" for a in spec.attributes]
        expected.append(" ".join([spec.name, str(OP_VERSION), DOMAIN, *fields]))
    assert sorted(line.strip() for line in answers.lines["creator"]) == sorted(expected)
    assert json.loads(answers["table"])["ops"] == sorted(spec.name for spec in PLUGIN_OPS)


@pytest.mark.parametrize(("spec", "case"), PLUGIN_CASES, ids=case_id)
def test_launches_are_those_from_pytorch(
    library: Any, spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, grids and numbers, whatever the case; addresses of inputs and outputs."""
    pytest.importorskip("triton")
    expected = launches_of_pytorch(monkeypatch, spec, case)
    create = create_command(spec, case.attributes)
    commands = (create, "device", *tensor_commands(spec, case), "workspace", *RUN)
    answers = library.drive(*commands, sm=TABLE_SM)
    assert (answers["shape"], answers["enqueue"]) == ("0", "0"), answers.logged
    names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
    for launch, (kernel, values) in zip(answers.launches, expected, strict=True):
        assert launch.name == kernel.name
        chosen = {n: int(v) for n, v in re.findall(r"-([A-Z_]+?)(\d+)(?=-)", launch.label)}
        assert chosen == {name: values[name] for name in kernel.constants}
        assert launch.grid == kernel.blocks(integers(values))
        numbers = {
            n: v for n, v in values.items() if isinstance(v, int | float) and n not in chosen
        }
        passed = {n: v for n, v in launch.arguments.items() if n in numbers}
        assert passed == pytest.approx({name: numbers[name] for name in passed}, rel=1e-5)
        for name in set(names) & launch.arguments.keys():
            assert launch.arguments[name] == answers.addresses[name]


def integers(values: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in values.items() if isinstance(value, int)}


def launches_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, spec: OpSpec, case: Case
) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels and values that PyTorch would launch them with."""
    from edgeattn.kernels.kernel import Kernel

    launched: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, values: launched.append((kernel, values)))
    assert spec.triton is not None
    module = importlib.import_module(spec.triton.partition(":")[0])
    inputs = case_inputs(spec, case)
    outputs = [
        torch.empty(s) for s in spec.output_shapes(*(x.shape for x in inputs), **case.attributes)
    ]
    names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
    tensors = dict(zip(names, (*inputs, *outputs_of(tuple(outputs))), strict=True))
    module.launch(tensors, spec.complete_attributes(case.attributes))
    return launched


@pytest.mark.parametrize("spec", PLUGIN_OPS, ids=case_id)
def test_kernels_are_loaded_before_they_are_launched(library: Any, spec: OpSpec) -> None:
    case = next(case for one, case in PLUGIN_CASES if one is spec)
    commands = (create_command(spec, case.attributes), "device", *tensor_commands(spec, case))
    answers = library.drive(*commands, "shape", "shape", "attach", "shape", "enqueue")
    assert answers.loaded
    assert len(answers.loaded) == len(set(answers.loaded))
    first = next(i for i, call in enumerate(answers.calls) if call.startswith("cuLaunch"))
    assert all(call.startswith("cuLaunch") for call in answers.calls[first:])
    assert library.drive(*commands, "enqueue")["enqueue"] == "1"


@pytest.mark.parametrize("spec", PLUGIN_OPS, ids=case_id)
def test_a_missing_input_is_refused(library: Any, spec: OpSpec) -> None:
    case = next(case for one, case in PLUGIN_CASES if one is spec)
    commands = tensor_commands(spec, case)[1:]
    answers = library.drive(create_command(spec, case.attributes), *commands, "device", "shape")
    assert answers["shape"] == "1"
    assert f"expected {len(spec.inputs)} inputs" in answers.logged


@pytest.mark.parametrize("spec", PLUGIN_OPS, ids=case_id)
def test_a_wrong_rank_is_refused_by_name(library: Any, spec: OpSpec) -> None:
    case = next(case for one, case in PLUGIN_CASES if one is spec)
    commands = tensor_commands(spec, case)
    for i, tensor in enumerate(spec.inputs):
        kind, name, dtype, shape, *rest = commands[i].split()
        if tensor.shape[0] == "...":
            continue  # any rank but none will do
        wrong = " ".join([kind, name, dtype, shape.rpartition("x")[0] or "1x1", *rest])
        create = create_command(spec, case.attributes)
        answers = library.drive(create, *commands[:i], wrong, *commands[i + 1 :], "device", "shape")
        assert answers["shape"] == "1"
        assert f"expected {name} [" in answers.logged
