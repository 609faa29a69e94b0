"""Ahead of time: variants of kernels become cubins and a manifest, for GPUs that need not be here.

What is compiled is kept by everything the compiler was told (`cubin_cache`); compilers are child
processes (`compilers`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from edgeattn.errors import BundleError, LoweringError, UsageError
from edgeattn.kernels.compilers import compile_tasks
from edgeattn.kernels.cubin_cache import Compiled, CubinCache, write_whole
from edgeattn.kernels.kernel import ArgumentType
from edgeattn.kernels.manifest import FP_FUSION, MANIFEST, Cubin, Manifest, make_manifest
from edgeattn.kernels.source_key import source_key
from edgeattn.kernels.variants import Variant, require_triton

Progress: TypeAlias = Callable[[int, int], None]

# KiB of shared memory that one block can have, by SM: CUDA Programming Guide, "Compute
# Capabilities", table "Memory Information per Compute Capability".
_SHARED_KIB = {
    **{75: 64, 80: 163, 86: 99, 87: 163, 89: 99},
    **{90: 227, 100: 227, 110: 227, 120: 99, 121: 99},
}
SMS = tuple(_SHARED_KIB)
# Columns of tensor memory on the SMs that have it (Triton's compiler.py refuses more at launch).
_TENSOR_MEMORY = 512

# What a parameter of each type is in PTX, and what Triton adds behind a kernel's own parameters:
# pointers to memory for the kernel and for a profiler, null for ours.
_PTX_TYPES: Mapping[ArgumentType, str] = {
    **dict.fromkeys(("*T", "*fp32", "*i32", "*i8"), "u64"),
    **{"i32": "u32", "fp32": "f32"},
}
_HIDDEN = ("u64", "u64")


def compile_variants(
    variants: Iterable[Variant],
    sms: Iterable[int],
    *,
    cache: Path,
    jobs: int | None = None,
    timeout_s: float = 300.0,
    progress: Progress | None = None,
) -> Manifest:
    """Compiles variants for SMs, or takes them from the cache.

    All are tried before an error is raised, so that what did compile is in the cache.

    Args:
        variants: what to compile; dtypes that an SM does not have are left out there.
        sms: of `SMS`.
        cache: folder of earlier results, which other processes may use meanwhile.
        jobs: compilers at a time; None for one per processor.
        timeout_s: seconds per variant and SM.
        progress: called with (done, all), first with what the cache had.

    Raises:
        LoweringError: a variant does not compile, or cannot run on the SM.
        UsageError: an SM is unknown, or Triton runs as interpreter.
        MissingDependencyError: Triton is not installed.
    """
    require_triton()
    triton_version = str(importlib.import_module("triton").__version__)
    tasks = _tasks(variants, sms, triton_version)
    store = CubinCache(cache)
    found = {task.key: known for task in tasks if (known := store.load(task.key))}
    missing = [task for task in tasks if task.key not in found]
    failures: dict[str, LoweringError] = {}
    if progress:
        progress(len(found), len(tasks))
    processes = max(1, min(jobs or os.cpu_count() or 1, len(missing)))
    with contextlib.closing(compile_tasks(missing, processes, timeout_s)) as outcomes:
        for done, (task, outcome) in enumerate(outcomes, len(found) + 1):
            if "error" in outcome:
                failures[task.key] = _not_compiled(task, outcome["error"])
            else:
                found[task.key] = store.save(task.key, outcome)
            if progress:
                progress(done, len(tasks))
    for task in tasks:
        if task.key in found and (refusal := _refusal(task, found[task.key])):
            failures[task.key] = refusal
    _raise_first([failures[task.key] for task in tasks if task.key in failures])
    return make_manifest((task.cubin(found[task.key]) for task in tasks), triton_version)


def write(manifest: Manifest, folder: Path, *, cache: Path) -> None:
    """Puts the cubins into a folder, and then the manifest.

    Args:
        manifest: from `compile_variants`.
        folder: made where it does not exist.
        cache: that of `compile_variants`.

    Raises:
        BundleError: the cache lost a cubin since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An old manifest would describe a mixture until the new one is there.
    (folder / MANIFEST).unlink(missing_ok=True)
    store = CubinCache(cache)
    for cubin in manifest.cubins:
        content = store.cubin(cubin.sha256)
        if content is None:
            raise BundleError(
                expected=f"{cubin.file} in the cache {cache}",
                came="it was removed or changed since it was compiled",
                todo="compile again",
            )
        write_whole(folder / cubin.file, content)
    write_whole(folder / MANIFEST, manifest.to_json().encode())


@dataclass(frozen=True)
class _Task:
    """One variant for one SM.

    Attributes:
        request: all that the compiler is told.
        key: hash of `request`.
    """

    variant: Variant
    sm: int
    request: Mapping[str, Any]
    key: str

    @property
    def name(self) -> str:
        return f"{self.variant.name} for SM {self.sm}"

    def cubin(self, compiled: Compiled) -> Cubin:
        kernel, constants = self.variant.kernel, self.variant.constants
        parts = (kernel.name, self.variant.dtype, *(f"{n}{v}" for n, v in constants.items()))
        return Cubin(
            kernel=kernel.name,
            dtype=self.variant.dtype,
            constants=dict(constants),
            sm=self.sm,
            file="-".join((*parts, f"sm{self.sm}.cubin")),
            entry=compiled.entry,
            shared=compiled.shared,
            warps=compiled.warps,
            arguments=tuple(kernel.arguments.items()),
            grid=kernel.grid,
            sizes=kernel.sizes,
            sha256=compiled.sha256,
        )


def _tasks(variants: Iterable[Variant], sms: Iterable[int], triton_version: str) -> list[_Task]:
    """In the order of the manifest."""
    sms = sorted(set(sms))
    for sm in sms:
        if sm not in SMS:
            raise UsageError(
                expected=f"an SM among {', '.join(map(str, SMS))}",
                came=f"{sm} was given",
                todo="choose one of these",
            )
    unique = {variant.name: variant for variant in variants}
    return [
        _task(variant, sm, triton_version)
        for variant in sorted(unique.values(), key=_order)
        for sm in sms
        if sm >= variant.minimum_sm
    ]


def _order(variant: Variant) -> tuple[Any, ...]:
    constants = tuple((n, isinstance(v, str), v) for n, v in variant.constants.items())
    return variant.kernel.name, variant.dtype, constants


def _task(variant: Variant, sm: int, triton_version: str) -> _Task:
    kernel = variant.kernel
    function = kernel.function
    if not hasattr(function, "cache_key"):
        raise UsageError(
            expected="kernels that Triton compiles",
            came="it was told to interpret them",
            todo="unset TRITON_INTERPRET",
        )
    types = {name: kind.replace("T", variant.dtype) for name, kind in kernel.arguments.items()}
    request = {
        "triton": triton_version,
        "function": [function.__module__, function.__name__],
        "source": source_key(function),
        "signature": {**types, **dict.fromkeys(kernel.constants, "constexpr")},
        "constants": dict(variant.constants),
        # TensorRT asks for tensors aligned to 256 bytes, our workspaces are.
        "attributes": {i: 16 for i, kind in enumerate(types.values()) if kind.startswith("*")},
        "options": {
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "enable_fp_fusion": FP_FUSION,
        },
        "sm": sm,
    }
    return _Task(variant, sm, request, hashlib.sha256(json.dumps(request).encode()).hexdigest())


def _not_compiled(task: _Task, problem: str) -> LoweringError:
    return LoweringError(
        expected=f"{task.name} to compile",
        came=problem,
        todo="change the kernel or its entry in variants.toml",
    )


def _refusal(task: _Task, compiled: Compiled) -> LoweringError | None:
    """Why the launcher could not run the cubin, if so."""
    refused = functools.partial(
        LoweringError, todo="change the kernel or its entry in variants.toml"
    )
    limit = _SHARED_KIB[task.sm] * 1024
    if compiled.shared > limit:
        expected = f"at most {limit} bytes of shared memory per block on SM {task.sm}"
        return refused(expected=expected, came=f"{task.name} takes {compiled.shared}")
    if compiled.tensor_memory > _TENSOR_MEMORY:
        expected = f"at most {_TENSOR_MEMORY} columns of tensor memory"
        return refused(expected=expected, came=f"{task.name} takes {compiled.tensor_memory}")
    if compiled.scratch:
        expected = "kernels without global scratch memory, which the launcher does not give"
        return refused(expected=expected, came=f"{task.name} takes {compiled.scratch} bytes")
    if compiled.sm != task.sm:
        expected = f"a cubin of {task.name}"
        return refused(expected=expected, came=f"Triton gave one for SM {compiled.sm}")
    types = [*(_PTX_TYPES[kind] for kind in task.variant.kernel.arguments.values()), *_HIDDEN]
    if list(compiled.parameters) != types:
        expected = f"parameters {' '.join(types)} of {task.name}"
        return refused(expected=expected, came=f"they are {' '.join(compiled.parameters)}")
    return None


def _raise_first(errors: Sequence[LoweringError]) -> None:
    if not errors:
        return
    first, more = errors[0], len(errors) - 1
    raise LoweringError(
        expected=first.expected,
        came=first.came + (f" ({more} more failed)" if more else ""),
        todo=first.todo,
        details={"failures": [str(error) for error in errors]},
    )
