"""`build`: a bundle in, a TensorRT engine beside it; needs neither torch nor the checkpoint."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from edgeattn import __version__
from edgeattn.bundle.bundle import Bundle, hash_file
from edgeattn.devices.registry import Target
from edgeattn.engine.build import BuildReport, build_engine
from edgeattn.engine.folder import BUILDING, alone, place
from edgeattn.engine.profiles import input_shapes
from edgeattn.engine.record import (
    ENGINES,
    SCHEMA_VERSION,
    Engine,
    EngineRecord,
    LayerRecord,
    library_record,
    read_engines,
)
from edgeattn.errors import LoweringError
from edgeattn.pipeline.build_plan import BuildPlan, BuildRequest, plan_build, require_tensorrt
from edgeattn.pipeline.clock import Progress
from edgeattn.pipeline.selftest import SelfTest, self_test
from edgeattn.planner.encoder_estimate import build_bytes

_TIMEOUT_S = 6 * 3600.0  # a Jetson takes its time


@dataclass(frozen=True)
class Built:
    """What `build` did.

    Attributes:
        engine: the engine and its record.
        was_there: it had been built before.
        selftest: its first run on its device; None where that is not here, or the bundle has no
            golden vectors that it takes.
    """

    engine: Engine
    was_there: bool = False
    selftest: SelfTest | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the list of layers left out: it is in the record."""
        record = self.engine.record.model_dump(mode="json", exclude={"layer_list"})
        tested = self.selftest.model_dump(mode="json") if self.selftest else None
        about: dict[str, Any] = {"was_there": self.was_there, "where": self.engine.record.where}
        about["selftest"] = tested
        return {"path": str(self.engine.path), **about, **record}


def build_bundle(path: Path, request: BuildRequest, *, progress: Progress | None = None) -> Built:
    """Builds an engine for a bundle's target, or for others that run its graph.

    The engine and its record appear whole or not at all.

    Args:
        path: the bundle.
        request: how.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal: the bundle is damaged, the target has no engine or not this graph,
            the device is not here, memory is short, TensorRT refuses the graph, or the engine
            gives wrong numbers on its device; it is kept and refused until it is built again.
    """
    bundle = Bundle.open(path)
    plan = plan_build(bundle, request)
    if not plan.flavour.builds_for_any:
        _require_device(plan, progress)
    plan.flavour.require()
    if request.strip_weights and plan.flavour.builds_for_any and plan.found.gpu is None:
        raise LoweringError(
            expected=f"a GPU in this machine, for {plan.flavour.title} to leave the weights out",
            came=f"there is none ({plan.found.gpu_problem})",
            todo="leave out --strip-weights, or build on the device",
        )
    _require_memory(plan)
    with alone(bundle.path / ENGINES) as folder:
        known = None if request.force else _find(plan)
        engine = known or _build(plan, folder, progress)
        tested = self_test(engine, bundle, plan.found, progress) if plan.on_device else None
        return Built(engine, known is not None, tested)


def check_for_device(
    path: Path, request: BuildRequest, *, progress: Progress | None = None
) -> tuple[Bundle, str]:
    """Refuses here what a device would refuse only after it has been given the bundle.

    Args:
        path: the bundle.
        request: how the device shall build.
        progress: called with (stage, done, total).

    Returns:
        The opened bundle, and the processor the device has: "x86_64" or "aarch64".

    Raises:
        EdgeattnError: the bundle is damaged, the target has no engine or not this graph, or
            TensorRT-RTX, where it is installed here, does not take the graph.
    """
    bundle = Bundle.open(path)
    plan = plan_build(bundle, request)
    proven = bundle.manifest.verification.tensorrt == "built"
    if not plan.flavour.builds_for_any and not proven:
        checked = _check_here(plan, progress)
        if checked is not None and checked.status == "refused":
            raise LoweringError(
                expected=f"{bundle.path} to be a graph that TensorRT takes",
                came=f"TensorRT-RTX refuses it here: {checked.reason}",
                todo="export it again",
                details={"check": checked.to_dict()},
            )
    return bundle, plan.host


def _require_device(plan: BuildPlan, progress: Progress | None) -> None:
    """TensorRT builds on the device; elsewhere the graph is checked, and that is said."""
    target, found = plan.targets[0], plan.found
    assert target.device.gpu is not None
    if plan.on_device and found.arch == target.device.gpu.host:
        require_tensorrt(target, found)
        return
    here = f"its GPU is SM {found.gpu.sm}" if found.gpu else f"no GPU: {found.gpu_problem}"
    _refuse_here(plan, target, here, _check_here(plan, progress))


def _check_here(plan: BuildPlan, progress: Progress | None) -> BuildReport | None:
    from edgeattn.pipeline.plugins import library_for_check
    from edgeattn.verify.verify import check_tensorrt

    # the target may be another one than the bundle was exported and checked for
    nearest = plan.targets[0].device.nearest_rtx_sm
    return check_tensorrt(
        plan.bundle.model_file,
        replace(plan.lowering, rtx_sm=nearest),
        plan.bundle.any_shape,
        plugin_library=library_for_check(plan.bundle.model_file, nearest),
        progress=progress,
    )


def _refuse_here(
    plan: BuildPlan, target: Target, here: str, checked: BuildReport | None
) -> NoReturn:
    outcome = "it was not checked"
    if checked is not None and checked.status == "built":
        sm = checked.sms[0]
        outcome = f"TensorRT-RTX {checked.version} parsed and built the graph for SM {sm} here"
    elif checked is not None:
        outcome = f"TensorRT-RTX here: {checked.status}, {checked.reason}"
    raise LoweringError(
        expected=f"{target.device.description} (SM {target.device.sm}) in this machine, "
        f"where {plan.flavour.title} builds its engine",
        came=f"{here}; {outcome}",
        todo=f"copy {plan.bundle.path} to the device and run the same command there, "
        "or let it be done with --on user@host",
        details={"check": checked.to_dict() if checked else None},
    )


def _require_memory(plan: BuildPlan) -> None:
    needed, free = build_bytes(plan.bundle.any_shape, plan.lowering), plan.found
    if needed > free.free_memory_bytes > 0:
        raise LoweringError(
            expected=f"{needed / 1e9:.1f} GB of free memory, which building takes",
            came=f"{free.free_memory_bytes / 1e9:.1f} GB are free",
            todo="close other programs, or build on a machine with more memory",
        )


def _find(plan: BuildPlan) -> Engine | None:
    """An engine that was built like this before and is still whole."""
    for engine in read_engines(plan.bundle):
        record = engine.record
        installed = {
            "tensorrt": plan.found.tensorrt,
            "tensorrt-rtx": plan.found.tensorrt_rtx,
        }[record.flavour]
        asked = (plan.model_sha256, plan.flavour.name, plan.sms, plan.sizes)
        there = (record.model_sha256, record.flavour, record.sms, record.profiles)
        same = asked == there and record.stripped == plan.options.strip_weights
        if same and record.tensorrt == installed and _is_whole(engine):
            return engine
    return None


def _is_whole(engine: Engine) -> bool:
    return engine.path.is_file() and hash_file(engine.path) == engine.record.sha256


def _build(plan: BuildPlan, folder: Path, progress: Progress | None) -> Engine:
    titled = f"{plan.flavour.title}: "
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder) as name:
        draft = Path(name) / "engine"
        report = build_engine(
            plan.bundle.model_file,
            draft,
            flavour=plan.flavour,
            sms=plan.sms,
            profiles=[input_shapes(plan.bundle.model_file, one) for one in plan.profiles],
            options=plan.options,
            timeout_s=_TIMEOUT_S,
            progress=(lambda phase, done, of: progress(titled + phase.lower(), done, of))
            if progress
            else None,
        )
        if report.status != "built":
            _refuse(plan, report)
        record = _record(plan, report, draft)
        engine = Engine(folder / record.engine, record)
        place(engine, draft)
        return engine


def _refuse(plan: BuildPlan, report: BuildReport) -> NoReturn:
    sms = " and ".join(f"SM {sm}" for sm in plan.sms)
    raise LoweringError(
        expected=f"{plan.flavour.title} to build {plan.bundle.model_file} for {sms}",
        came=report.reason,
        todo="free memory if it ran short; else report this graph, or export for another target",
        details={"build": report.to_dict()},
    )


def _record(plan: BuildPlan, report: BuildReport, draft: Path) -> EngineRecord:
    assert report.version is not None
    assert report.layers is not None
    seconds = {"parse": report.seconds_parse or 0.0, "build": report.seconds_build or 0.0}
    return EngineRecord(
        schema_version=SCHEMA_VERSION,
        edgeattn=__version__,
        engine=_name(plan, report.version),
        bytes=draft.stat().st_size,
        sha256=hash_file(draft),
        model_sha256=plan.model_sha256,
        targets=tuple(target.name for target in plan.targets),
        flavour=plan.flavour.name,
        tensorrt=report.version,
        sms=plan.sms,
        arch=platform.machine(),
        gpu=plan.found.gpu.name if plan.found.gpu is not None and plan.on_device else None,
        driver=plan.found.driver,
        plugins=library_record(plan.bundle, plan.host, report.plugin_layers or 0),
        profiles=plan.sizes,
        stripped=plan.options.strip_weights,
        layers=report.layers,
        layer_source="network" if report.layer_source == "network" else "engine inspector",
        layer_list=tuple(
            LayerRecord(name=layer.name, kind=layer.kind, precision=layer.precision)
            for layer in report.layer_list
        ),
        seconds=seconds,
        peak_rss_mb=report.peak_rss_mb,
    )


def _name(plan: BuildPlan, version: str) -> str:
    """FLAVOUR-VERSION-smNN.engine: the same bundle may have several."""
    parts = [plan.flavour.name, ".".join(version.split(".")[:3]), *(f"sm{sm}" for sm in plan.sms)]
    parts += ["stripped"] if plan.options.strip_weights else []
    return "-".join(parts) + ".engine"
