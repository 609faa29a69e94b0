"""Every target x software x scheme x dtype against tables written by hand from the data sheets.

The tables do not read the target files: a file that says something else fails here by name.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from edgeattn.devices.registry import Target, all_devices, all_targets, parse_target
from edgeattn.devices.schema import Device
from edgeattn.errors import LoweringError
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import DTYPES, Recipe

ORIN = ("jetpack6.2", "jetpack7.2")
THOR = ("jetpack7.2",)
SERVER = ("trt10.13", "trt10.14", "trt10.15", "trt10.16", "trt11")
RTX = ("rtx1.7", *SERVER)
SPARK = ("trt10.14", "trt10.15", "trt10.16", "trt11")

# target: compute capability, software, default software
TARGETS: dict[str, tuple[int | None, tuple[str, ...], str]] = {
    "cpu": (None, ("onnxruntime",), "onnxruntime"),
    "t4": (75, SERVER, "trt11"),
    "a100": (80, SERVER, "trt11"),
    "a10": (86, SERVER, "trt11"),
    "l4": (89, SERVER, "trt11"),
    "l40s": (89, SERVER, "trt11"),
    "h100": (90, SERVER, "trt11"),
    "h200": (90, SERVER, "trt11"),
    "b200": (100, SERVER, "trt11"),
    "rtx-4090": (89, RTX, "rtx1.7"),
    "rtx-5090": (120, RTX, "rtx1.7"),
    "rtx-pro-6000": (120, RTX, "rtx1.7"),
    "dgx-spark": (121, SPARK, "trt11"),
    "jetson-orin-agx-64gb": (87, ORIN, "jetpack7.2"),
    "jetson-orin-agx-32gb": (87, ORIN, "jetpack7.2"),
    "jetson-orin-nx-16gb": (87, ORIN, "jetpack7.2"),
    "jetson-orin-nx-8gb": (87, ORIN, "jetpack7.2"),
    "jetson-orin-nano-8gb": (87, ORIN, "jetpack7.2"),
    "jetson-orin-nano-4gb": (87, ORIN, "jetpack7.2"),
    "jetson-thor-t5000": (110, THOR, "jetpack7.2"),
    "jetson-thor-t4000": (110, THOR, "jetpack7.2"),
}
NEAREST_RTX_SM = {75: 75, 80: 80, 86: 86, 87: 86, 89: 89, 120: 120, 121: 121} | dict.fromkeys(
    (90, 100, 110), 120
)
RTX_SMS = {75, 80, 86, 89, 120, 121}
# the first TensorRT for a compute capability; those not named are older than all software here
FIRST_TENSORRT = {100: (10, 8), 110: (10, 13), 120: (10, 8), 121: (10, 14)}

# software: opset, opset with int4 weights, operators
GRAPHS = {
    "jetpack6.2": (20, 21, "primitive"),
    "jetpack7.2": (23, 23, "standard"),
    "trt10.13": (21, 21, "primitive"),
    "trt10.14": (21, 21, "primitive"),
    "trt10.15": (23, 23, "standard"),
    "trt10.16": (23, 23, "standard"),
    "trt11": (23, 23, "standard"),
    "rtx1.7": (23, 23, "standard"),
}
FUNCTION_HIDES_PLUGIN = {"jetpack6.2"}
NO_INT4_SMS = {75}
ONLY_FP16_SMS = {75}
# whoever has the standard Attention has no fp32 kernel for it
NO_FP32 = {"jetpack7.2", "trt10.15", "trt10.16", "trt11", "rtx1.7"}
NO_BF16 = {"onnxruntime"}
TENSORRT_GROUPS = {64, 128}

QUANTS = {
    "none": None,
    "w8-rtn": None,
    "w4-rtn": 64,
    "w4-rtn:group=32": 32,
    "w4-rtn:group=64": 64,
    "w4-rtn:group=128": 128,
}


def default_dtype(name: str) -> str:
    return "fp32" if name == "cpu" else "fp16"


def reasons_to_refuse(name: str, software: str, quant: str, dtype: str | None) -> set[str]:
    """Patterns, one of which a refusal must fit; empty where the recipe is allowed."""
    sm, group, wanted = TARGETS[name][0], QUANTS[quant], dtype or default_dtype(name)
    out = set()
    without = {"fp32": NO_FP32, "bf16": NO_BF16, "fp16": set()}[wanted]
    if software in without or (wanted != "fp16" and sm in ONLY_FP16_SMS):
        out.add(f"a dtype among .* on {name}@{software}, but --dtype is {wanted}")
    if group is not None and sm in NO_INT4_SMS:
        out.add(rf"stores int4 weights, which {name} \(SM{sm}\) has no kernels for")
    elif group is not None and sm is not None and group not in TENSORRT_GROUPS:
        out.add(f"a group of 64 or 128 on {name}@{software}, but scheme .* uses {group}")
    return out


def check(target: Target) -> None:
    """Compares every combination of one target and software with the tables."""
    name, software = target.device.name, target.software.name
    for quant, dtype in itertools.product(QUANTS, (None, *DTYPES)):
        reasons = reasons_to_refuse(name, software, quant, dtype)
        result = lowered_or_refused(Recipe(target.name, quant, dtype), target)
        if isinstance(result, str):
            assert any(re.search(reason, result) for reason in reasons), (quant, dtype, result)
            continue
        assert not reasons, (quant, dtype)
        assert result.dtype == (dtype or default_dtype(name))
        check_lowering(result, name, software, int4=QUANTS[quant] is not None)


def lowered_or_refused(recipe: Recipe, target: Target) -> Lowering | str:
    try:
        return plan_lowering(recipe, target)
    except LoweringError as error:
        return str(error)


def check_lowering(lowering: Lowering, name: str, software: str, *, int4: bool) -> None:
    sm = TARGETS[name][0]
    assert lowering.target == f"{name}@{software}"
    assert lowering.strip_functions == (software in FUNCTION_HIDES_PLUGIN)
    if sm is None:
        assert (lowering.flavour, lowering.rtx_sm) == ("onnxruntime", None)
        assert lowering.embedding == "gather-dequantize"
        return
    opset, opset_int4, operators = GRAPHS[software]
    assert lowering.opset == (opset_int4 if int4 else opset)
    assert lowering.attention == operators
    assert lowering.kv_cache == "concat"
    assert lowering.embedding == "dequantize-gather"
    assert lowering.rtx_sm == NEAREST_RTX_SM[sm]
    assert lowering.flavour == ("tensorrt-rtx" if software == "rtx1.7" else "tensorrt")


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_every_combination_is_as_the_tables_say(target: Target) -> None:
    check(target)


def test_the_tables_name_every_target_with_its_software() -> None:
    found = {
        device.name: (device.sm, set(device.software.allowed), device.software.default)
        for device in all_devices()
    }
    assert found == {name: (sm, set(all_), one) for name, (sm, all_, one) in TARGETS.items()}


@pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
def test_nearest_rtx_sm_is_one_that_tensorrt_rtx_knows(device: Device) -> None:
    if device.gpu is not None:
        assert device.nearest_rtx_sm in RTX_SMS
        assert device.sm not in RTX_SMS or device.nearest_rtx_sm == device.sm


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_software_supports_the_gpu(target: Target) -> None:
    version = tuple(int(part) for part in target.software.stack.version.split("."))
    if target.flavour == "tensorrt":
        assert version >= FIRST_TENSORRT.get(target.device.sm or 0, (10, 0))
    if target.flavour == "tensorrt-rtx":
        assert target.device.sm in RTX_SMS
    assert (target.device.kind == "jetson") == target.software.name.startswith("jetpack")


@pytest.mark.parametrize(
    ("name", "group", "field", "value"),
    [
        ("t4", "weights", "bits", (4, 8)),
        ("l4", "weights", "bits", (8,)),
        ("t4", "dtypes", "allowed", ("fp32", "fp16", "bf16")),
        ("a10", "dtypes", "preferred", "bf16"),
        ("h100", "gpu", "nearest_rtx_sm", 89),
        ("cpu", "dtypes", "preferred", "fp16"),
    ],
)
def test_a_wrong_device_is_noticed(name: str, group: str, field: str, value: object) -> None:
    target = parse_target(name)
    wrong = getattr(target.device, group).model_copy(update={field: value})
    device = target.device.model_copy(update={group: wrong})
    with pytest.raises(AssertionError):
        check(replace(target, device=device))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("l4@trt11", "dtypes", ("fp32", "fp16", "bf16")),
        ("l4@trt10.14", "operators", "standard"),
        ("l4@trt10.14", "opset", 23),
        ("jetson-orin@jetpack6.2", "strip_functions", False),
        ("jetson-orin@jetpack6.2", "opset_int4", 20),
        ("rtx-5090", "int4_group_sizes", (32, 64, 128)),
        ("cpu", "dtypes", ("fp32",)),
    ],
)
def test_a_wrong_software_is_noticed(name: str, field: str, value: object) -> None:
    target = parse_target(name)
    graph = target.software.graph.model_copy(update={field: value})
    software = target.software.model_copy(update={"graph": graph})
    with pytest.raises(AssertionError):
        check(replace(target, software=software))
