"""Machines as `edgeattn.devices.probe` finds them."""

from __future__ import annotations

from edgeattn.devices.probe import Probe

# Without a GPU and without any of the software; tests `replace` what theirs has.
BARE_MACHINE = Probe(
    arch="aarch64",
    gpu=None,
    gpu_problem="there is no libcuda.so.1",
    driver=None,
    l4t=None,
    jetpack=None,
    board=None,
    power_mode=None,
    tensorrt=None,
    tensorrt_rtx=None,
    onnxruntime=None,
    onnxruntime_gpu=None,
    free_memory_bytes=4_000_000_000,
    total_memory_bytes=7_989_000_000,
)
