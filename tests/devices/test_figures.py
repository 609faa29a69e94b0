"""The figures of every target hold together: no sparse rate, no unit and no board mixed up."""

from __future__ import annotations

import pytest

from edgeattn.devices.registry import all_devices, parse_target
from edgeattn.devices.schema import Device, Memory, Peak

GPUS = [device for device in all_devices() if device.gpu]
BY_NAME = pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)

# gigabytes and GB/s, from the data sheets
MEMORY = {
    "t4": (16, 320),
    "a100": (80, 2039),
    "a10": (24, 600),
    "l4": (24, 300),
    "l40s": (48, 864),
    "h100": (80, 3350),
    "h200": (141, 4800),
    "b200": (180, 8000),
    "rtx-4090": (24, 1008),
    "rtx-5090": (32, 1792),
    "rtx-pro-6000": (96, 1792),
    "dgx-spark": (128, 273),
    "jetson-orin-agx-64gb": (64, 204.8),
    "jetson-orin-agx-32gb": (32, 204.8),
    "jetson-orin-nx-16gb": (16, 102),
    "jetson-orin-nx-8gb": (8, 102),
    "jetson-orin-nano-8gb": (8, 102),
    "jetson-orin-nano-4gb": (4, 51),
    "jetson-thor-t5000": (128, 273),
    "jetson-thor-t4000": (64, 273),
}
# NVIDIA publishes no rate for fp16 in these data sheets
NO_FP16 = {"rtx-pro-6000", "dgx-spark"}
FIRST_SM = {"bf16": 80, "fp8": 89, "fp4": 100}


def memory(device: Device) -> Memory:
    assert device.memory
    return device.memory


def peak(device: Device) -> Peak:
    assert device.peak
    return device.peak


def ratio(device: Device, fast: str, slow: str) -> float | None:
    """How much faster one type is than the other, None where one is not published."""
    a, b = getattr(peak(device), fast), getattr(peak(device), slow)
    return a / b if a and b else None


@BY_NAME
def test_memory_is_that_of_the_data_sheet(device: Device) -> None:
    assert (memory(device).total_gb, memory(device).bandwidth_gb_s) == MEMORY[device.name]


@BY_NAME
def test_memory_is_shared_where_cpu_and_gpu_are_one_chip(device: Device) -> None:
    one_chip = device.kind == "jetson" or device.name == "dgx-spark"
    assert memory(device).shared_with_cpu == one_chip


@BY_NAME
def test_rates_relate_as_tensor_cores_do(device: Device) -> None:
    # with fp32 accumulation GeForce runs 16-bit and 8-bit floats at half its integer rate
    halved = 2 if device.kind == "geforce" else 1
    expected = {
        ("bf16", "fp16"): 1,
        ("fp8", "fp16"): 2,
        ("int8", "fp16"): 2 * halved,
        ("fp4", "fp8"): 2 * halved,
        ("int4", "int8"): 2,
    }
    for (fast, slow), times in expected.items():
        found = ratio(device, fast, slow)
        assert found is None or found == pytest.approx(times, rel=0.03), (fast, slow)
    faster = ratio(device, "fp16", "fp32")
    assert faster is None or 1.9 <= faster <= 33


@BY_NAME
def test_types_the_hardware_has_not_have_no_rate(device: Device) -> None:
    assert device.sm
    for dtype, first in FIRST_SM.items():
        assert device.sm >= first or getattr(peak(device), dtype) is None
    assert ("bf16" in device.dtypes.allowed) == (device.sm >= FIRST_SM["bf16"])


@BY_NAME
def test_fp16_is_there_and_fits_the_bandwidth(device: Device) -> None:
    rate = peak(device).fp16
    assert (rate is None) == (device.name in NO_FP16)
    if rate is not None:
        operations_per_byte = 1000 * rate / memory(device).bandwidth_gb_s
        assert 100 <= operations_per_byte <= 1000


@BY_NAME
def test_power_modes_are_plausible(device: Device) -> None:
    assert device.power
    watts = [mode.watts for mode in device.power.modes if mode.watts]
    low, high = (7, 130) if device.kind == "jetson" else (70, 1000)
    assert watts == sorted(set(watts))
    assert all(low <= value <= high for value in watts)
    # a wrong kilo or a board taken for a module would show here
    tflops_per_watt = (peak(device).fp16 or 0) / max(watts)
    assert tflops_per_watt < 4


@BY_NAME
def test_rates_of_a_jetson_say_their_power_mode(device: Device) -> None:
    assert device.power
    unconstrained = [mode.name for mode in device.power.modes if mode.watts is None]
    modes = [peak(device).mode] if peak(device).mode else []
    assert modes == unconstrained
    assert bool(modes) == (device.kind == "jetson")


def test_super_mode_is_for_orin_nx_and_nano_and_speeds_up_the_memory_of_nano() -> None:
    in_super = {d.name for d in GPUS if peak(d).mode == "MAXN_SUPER"}
    assert in_super == {d.name for d in GPUS if "orin-n" in d.name}
    assert {d.name for d in GPUS if memory(d).mode} == {d.name for d in GPUS if "nano" in d.name}


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("jetson-orin-nano-4gb", "jetson-orin-nano-8gb"),
        ("jetson-orin-nano-8gb", "jetson-orin-nx-8gb"),
        ("jetson-orin-nx-16gb", "jetson-orin-agx-32gb"),
        ("jetson-orin-agx-32gb", "jetson-orin-agx-64gb"),
        ("jetson-orin-agx-64gb", "jetson-thor-t4000"),
        ("jetson-thor-t4000", "jetson-thor-t5000"),
        ("t4", "l4"),
        ("l4", "l40s"),
        ("a100", "h100"),
        ("h100", "b200"),
        ("rtx-4090", "rtx-5090"),
    ],
)
def test_the_larger_board_is_faster(small: str, large: str) -> None:
    slow, fast = (peak(parse_target(name).device) for name in (small, large))
    assert slow.int8
    assert fast.int8
    assert slow.int8 < fast.int8
