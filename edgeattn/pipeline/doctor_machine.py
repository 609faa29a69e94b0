"""What `doctor` finds on this machine: GPU, JetPack, runtimes, and the tools that export needs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from edgeattn.devices.probe import Probe, matching_device, matching_target
from edgeattn.devices.registry import Target, all_software
from edgeattn.engine.flavours import FLAVOURS, TENSORRT_RTX
from edgeattn.engine.toolchain import ARCHITECTURES, find_toolchain
from edgeattn.errors import MissingDependencyError
from edgeattn.pipeline.build_plan import require_tensorrt, version_numbers
from edgeattn.pipeline.findings import Finding, attempt, refused, size
from edgeattn.pipeline.transform import require_export_extra

_EXPORT_PYTHON = (3, 11)


def machine_findings(found: Probe, target: Target | None) -> Iterator[Finding]:
    """What this machine is, and whether it can run what is made for it.

    Args:
        found: this machine.
        target: what is asked about; None for the machine itself.
    """
    yield from _gpu(found)
    yield from _which_target(found)
    yield from _power_mode(found)
    yield from _onnxruntime(found, needed=target is not None and target.flavour == "onnxruntime")
    if target is not None and is_here(found, target) and target.flavour != "onnxruntime":
        yield _engine_builder(found, target)


def is_here(found: Probe, target: Target) -> bool:
    """Whether a target's device is this machine."""
    return matching_device(found) == target.device


def _gpu(found: Probe) -> Iterator[Finding]:
    gpu = found.gpu
    if gpu is not None:
        memory = f"{size(gpu.memory_bytes)}, {size(gpu.free_bytes)} free"
        yield Finding("ok", "GPU", f"{gpu.name}, SM {gpu.sm}, {memory}; CUDA {found.driver}")
    elif found.l4t is not None:
        yield Finding(
            "problem",
            "GPU",
            f"this is a Jetson, but {found.gpu_problem}",
            "in a container: start it with --runtime nvidia; else reinstall JetPack",
        )
    else:
        yield Finding(
            "ok", "GPU", f"none: {found.gpu_problem}; ONNX Runtime runs bundles on the CPU"
        )


def _which_target(found: Probe) -> Iterator[Finding]:
    """Which target this machine is, where it has what one has."""
    device, target = matching_device(found), matching_target(found)
    if found.l4t is not None and found.jetpack is None:
        known = {s.name: s.stack.l4t for s in all_software() if s.stack.l4t}
        names = " or ".join(f"{name} (L4T {l4t})" for name, l4t in known.items())
        yield Finding(
            "problem", "JetPack", f"L4T {found.l4t} is of none that edgeattn knows", f"use {names}"
        )
    elif target is not None:
        yield Finding("ok", "target", f"this machine is {target.name}")
    elif device is not None and device.kind == "jetson" and found.l4t is None:
        yield Finding(
            "warning",
            "JetPack",
            f"this is a {device.name}, but no /etc/nv_tegra_release says with which",
            "in a container: mount that file; else name NAME@SOFTWARE with --target",
        )
    elif device is not None:
        runs = " or ".join(device.software.allowed)
        here = found.jetpack or (f"TensorRT {found.tensorrt}" if found.tensorrt else "no JetPack")
        yield Finding(
            "problem", "target", f"{device.name} with {here} is none of ours", f"use {runs}"
        )
    elif found.gpu is not None:
        yield Finding(
            "warning",
            "target",
            "this GPU is none of our targets",
            "name the one most like it with --target; edgeattn targets lists them",
        )


def _power_mode(found: Probe) -> Iterator[Finding]:
    """Whether a Jetson is in the mode that our figures of it hold in."""
    device = matching_device(found)
    if device is None or device.peak is None or found.power_mode is None:
        return
    best = device.peak.mode
    said = f"{found.power_mode}; our figures of {device.name} hold in {best or 'every mode'}"
    if best in (None, found.power_mode):
        yield Finding("ok", "power mode", said)
    else:
        yield Finding("warning", "power mode", said, f"choose {best} with nvpmodel for them")


def _onnxruntime(found: Probe, *, needed: bool) -> Iterator[Finding]:
    oldest = next(s.stack.version for s in all_software() if s.stack.engine == "onnxruntime")
    both = {"onnxruntime": found.onnxruntime, "onnxruntime-gpu": found.onnxruntime_gpu}
    there = {name: version for name, version in both.items() if version}
    said = " and ".join(f"{name} {version}" for name, version in there.items())
    if len(there) == 2:
        yield Finding(
            "problem",
            "ONNX Runtime",
            f"{said} are installed, and overwrite each other's files",
            "pip uninstall both, then install edgeattn[ort] or edgeattn[gpu]",
        )
    elif not there:
        yield Finding(
            "problem" if needed else "warning",
            "ONNX Runtime",
            "not installed: no bundle can be run or verified here",
            "install edgeattn[ort], or edgeattn[gpu] for an NVIDIA GPU",
        )
    elif version_numbers(*there.values()) < version_numbers(oldest):
        yield Finding(
            "problem", "ONNX Runtime", f"{said} is older than {oldest}", "pip install --upgrade it"
        )
    else:
        yield Finding("ok", "ONNX Runtime", said)


def _engine_builder(found: Probe, target: Target) -> Finding:
    """Whether this machine, which is the target's device, can build and run its engine."""
    flavour = FLAVOURS[target.flavour]  # type: ignore[index]  # onnxruntime was left out

    def check() -> str:
        flavour.require()
        if flavour is TENSORRT_RTX:
            return f"{flavour.title} {found.tensorrt_rtx}"
        require_tensorrt(target, found)
        return f"{flavour.title} {found.tensorrt}"

    return attempt("TensorRT", check)


def tool_findings(target: Target | None, *, plugins: bool) -> Iterator[Finding]:
    """Whether the tools of `edgeattn export` are here; another machine may have them.

    Args:
        target: what is exported for; None for none in particular.
        plugins: an attention variant is asked for, whose plugin library is built.
    """
    python = platform.python_version()
    if sys.version_info < _EXPORT_PYTHON:
        newer = ".".join(map(str, _EXPORT_PYTHON))
        yield Finding(
            "warning", "Python", f"{python} runs bundles", f"export with {newer} or newer"
        )
    else:
        yield Finding("ok", "Python", python)

    def packages() -> str:
        require_export_extra()
        return "torch, onnxscript and ONNX Runtime are here"

    yield attempt("export", packages, "warning")
    if target is None or target.flavour != "onnxruntime":
        yield _graph_check()
    if plugins and target is not None and target.device.gpu is not None:
        yield _plugin_tools(target.device.gpu.host)
    elif target is None:
        yield _plugin_tools(platform.machine())


def _graph_check() -> Finding:
    said = "its parser and builder check every graph before it reaches a device"
    if TENSORRT_RTX.is_available():
        return Finding("ok", "TensorRT-RTX", said)
    if platform.machine() != "x86_64":
        return Finding("ok", "TensorRT-RTX", "is for x86-64 alone: graphs are checked there")
    return Finding("warning", "TensorRT-RTX", f"not here; {said}", TENSORRT_RTX.todo)


def _plugin_tools(arch: str) -> Finding:
    """What compiles a plugin library, which only graphs with an attention variant need."""
    if arch not in ARCHITECTURES:
        return Finding("ok", "plugin library", f"there is none for {arch}")
    try:
        toolchain = find_toolchain(arch)
    except MissingDependencyError as error:
        return refused("plugin library", error, "warning")
    if find_spec("triton") is None:
        return Finding(
            "warning",
            "plugin library",
            "there is no triton, which compiles its kernels",
            "install edgeattn[plugins]",
        )
    return Finding("ok", "plugin library", f"can be built for {arch}, with {toolchain.compiler[0]}")
