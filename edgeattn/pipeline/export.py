"""`export`: a checkpoint in, a proven bundle out."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.attention import FftRopeRequest
from edgeattn.bundle import bundle as layout
from edgeattn.bundle.writer import BundleWriter, open_writer
from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import BundleError, UsageError
from edgeattn.pipeline.clock import Clock, Progress, rare_collections
from edgeattn.pipeline.plugins import Plugins, given_library, place_library, plugins_for
from edgeattn.pipeline.records import write_manifest, write_report, write_text_files
from edgeattn.pipeline.transform import (
    open_checked,
    proof_tokens,
    require_export_extra,
    require_inputs,
    transform,
)
from edgeattn.pipeline.work import open_work
from edgeattn.planner.attention_calibration import FAR_LENGTH
from edgeattn.planner.estimate import Estimate, estimate
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeattn.engine.plugins import PluginLibrary
    from edgeattn.exporters.export import GraphReport
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.hub import Outline
    from edgeattn.verify.quality import Quality
    from edgeattn.verify.verify import Verification


EVAL_WINDOWS, EVAL_LENGTH = 12, 512
# What the name of a folder should not hold.
_NO_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class ExportReport:
    """What `export` did.

    Attributes:
        path: the bundle.
        lowering: what was decided.
        graph: nodes and bytes written.
        verification: the proof, None with `verify=False`.
        quality: on the recipe's evaluation text, None without one.
        transforms: what each transform reports, JSON-ready.
        seconds: wall time by stage.
        plugins: the plugin library in the bundle, None where the graph needs none.
    """

    path: Path
    lowering: Lowering
    graph: GraphReport
    verification: Verification | None
    quality: Quality | None
    transforms: Mapping[str, Any]
    seconds: dict[str, float]
    plugins: PluginLibrary | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "bundle": str(self.path),
            "lowering": self.lowering.to_dict(),
            "nodes": self.graph.nodes,
            "weight_bytes": self.graph.weight_bytes,
            "quality": self.quality.to_dict() if self.quality else None,
            "transforms": dict(self.transforms),
            "verification": self.verification.to_dict() if self.verification else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "plugins": self.plugins.to_dict() if self.plugins else None,
        }


@dataclass(frozen=True)
class ExportPlan:
    """What `export` would do.

    Attributes:
        lowering: what was decided.
        estimate: sizes, and seconds by stage.
        free_bytes: of the disk that would hold the bundle.
    """

    lowering: Lowering
    estimate: Estimate
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the disk can hold the bundle."""
        return self.estimate.disk_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "lowering": self.lowering.to_dict(),
            **self.estimate.to_dict(),
            "free_bytes": self.free_bytes,
        }


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """`./<model>-<target>-<quant>`, and what else differs from the defaults."""
    from edgeattn.models.hub import model_name

    target = parse_target(recipe.target)
    parts = [model_name(model), target.device.name]
    if target.software.name != target.device.software.default:
        parts.append(target.software.name)
    parts.append(recipe.scheme.label.replace(":", "-").replace("=", ""))
    request = recipe.attention_request
    parts += [] if request is None else [_NO_NAME.sub("-", request.label)]
    parts += [recipe.dtype] if recipe.dtype else []
    return Path("-".join(parts))


def plan_export(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    verify: bool = True,
    plugin_library: Path | None = None,
) -> ExportPlan:
    """What `export` with the same arguments would do; writes nothing and needs no torch.

    Raises:
        EdgeattnError: a refusal. A disk that is too small is none: see `ExportPlan.fits`.
    """
    from edgeattn.models.hub import read_outline

    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    require_inputs(recipe)
    if plugin_library is not None:
        given_library(plugin_library, target)
    return _plan(recipe, lowering, read_outline(model, offline=offline), target, output, verify)


def export(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    verify: bool = True,
    force: bool = False,
    plugins: bool = True,
    plugin_library: Path | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports a checkpoint to a proven bundle; the bundle appears whole or not at all.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        recipe: what is asked for.
        output: where the bundle shall appear.
        offline: take a hub id from the cache alone.
        verify: prove the bundle before it appears; False is written into the manifest.
        force: replace a bundle at `output`.
        plugins: give a graph whose operators have TensorRT plugins their library; False leaves
            TensorRT their function bodies.
        plugin_library: for such graphs, instead of building it.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal or a failed proof. No part of a bundle is left behind; layers that
            were finished on a calibration text wait beside it, and the error notes where.
    """
    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    require_inputs(recipe)
    if plugin_library is not None and not plugins:
        raise UsageError(
            expected="--plugin-lib or --no-plugins", came="both were given", todo="leave one out"
        )
    library = None if plugin_library is None else given_library(plugin_library, target)
    require_export_extra()
    clock = Clock(progress)
    with (
        rare_collections(),
        open_writer(output, force=force) as writer,
        open_work(output, needed=recipe.needs_calibration) as work,
    ):
        checkpoint, fitted = open_checked(
            model,
            lambda found: _fitting(_plan(recipe, lowering, found, target, output, verify), output),
            clock,
            offline=offline,
        )
        settled = (recipe, target, fitted, writer, output, work, verify, plugins, library, clock)
        return _export(checkpoint, *settled)


def _plan(
    recipe: Recipe,
    lowering: Lowering,
    outline: Outline,
    target: Target,
    output: Path,
    verify: bool,
) -> ExportPlan:
    from edgeattn.engine.tensorrt_rtx import is_available

    lowering = fit_lowering(lowering, outline.shape, target)
    expected = estimate(
        outline.shape,
        lowering,
        text_bytes=outline.text_bytes,
        verify=verify,
        tensorrt=is_available(),
        calibration_windows=recipe.calibration_windows,
        learns=recipe.rotations is None,
    )
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    return ExportPlan(lowering, expected, shutil.disk_usage(place).free)


def _fitting(plan: ExportPlan, output: Path) -> Lowering:
    """What the plan decided, where the disk can hold it."""
    if not plan.fits:
        raise BundleError(
            expected=f"{plan.estimate.disk_bytes / 1e6:,.1f} MB of free disk for {output}",
            came=f"{plan.free_bytes / 1e6:,.1f} MB are free",
            todo="free some space or choose another folder with -o",
        )
    return plan.lowering


def _export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target,
    lowering: Lowering,
    writer: BundleWriter,
    output: Path,
    work: Path,
    verify: bool,
    with_plugins: bool,
    library: PluginLibrary | None,
    clock: Clock,
) -> ExportReport:
    from edgeattn.exporters.export import export_graph
    from edgeattn.verify.verify import prove

    tokens = proof_tokens(checkpoint)
    windows = _eval_windows(checkpoint, recipe, lowering)
    transformed = transform(checkpoint, recipe, lowering, work, clock)
    model, lowering = transformed.model, transformed.lowering
    clock.start("writing the graph")
    graph = export_graph(
        model,
        lowering,
        writer.path / layout.MODEL,
        writer.path / layout.WEIGHTS,
        progress=clock.count,
    )
    writer.note_hash(layout.WEIGHTS, graph.weight_bytes, graph.weight_sha256)
    write_text_files(writer, checkpoint, lowering)
    model_file = writer.path / layout.MODEL
    plugins = None
    if with_plugins:
        plugins = plugins_for(model_file, target, library=library, progress=clock.progress)
    placed = place_library(plugins.target, writer.path / layout.PLUGINS) if plugins else None
    learned = work / layout.ROTATIONS
    if lowering.scheme.rotation == "learned" and learned.exists():  # for a later --rotations
        writer.write(layout.ROTATIONS, learned.read_bytes())
    verification = None
    if verify:
        clock.start("proving the bundle")
        verification = prove(
            model,
            lowering,
            model_file,
            writer.path / layout.GOLDEN,
            tokens=tokens,
            operators_file=writer.path / layout.GOLDEN_OPERATORS,
            plugin_library=plugins.host.path if plugins and plugins.host else None,
            progress=clock.progress,
        )
    quality = None
    if windows is not None:
        clock.start("measuring quality")
        quality = _quality(checkpoint, recipe, lowering, model_file, windows, clock)
    clock.stop()
    notes = {**transformed.notes, **_about_plugins(plugins, library, verify)}
    if placed is not None:  # the bundle moves to its place when it is whole
        placed = replace(placed, path=output / placed.path.relative_to(writer.path))
    report = ExportReport(
        output, lowering, graph, verification, quality, notes, clock.seconds, placed
    )
    write_report(writer, checkpoint, recipe, report)
    shape = replace(checkpoint.shape, tied_embeddings=model.shape.tied_embeddings)
    write_manifest(writer, checkpoint, recipe, target, report, shape)
    writer.commit()
    return report


def _about_plugins(
    plugins: Plugins | None, given: PluginLibrary | None, verify: bool
) -> dict[str, Any]:
    """What the report says of the plugin library, nothing where there is none."""
    if plugins is None:
        return {} if given is None else {"plugins": {given.path.name: "not needed, left out"}}
    sms = ", ".join(f"SM {sm}" for sm in plugins.target.sms)
    about = {"library": f"for {plugins.target.arch}, {sms}: {', '.join(plugins.target.ops)}"}
    return {"plugins": {**about, "checked here": plugins.checked if verify else "no: --no-verify"}}


def _eval_windows(
    checkpoint: Checkpoint, recipe: Recipe, lowering: Lowering
) -> NDArray[np.int64] | None:
    """Windows of the recipe's evaluation text; read first, so that one too short is no work."""
    from edgeattn.verify.quality import eval_windows

    if recipe.eval_text is None:
        return None
    windows, length = EVAL_WINDOWS, EVAL_LENGTH
    if isinstance(lowering.request, FftRopeRequest):
        exact = lowering.request.sink + lowering.request.window
        length = max(FAR_LENGTH, 2 * exact)  # as many tokens, in windows that have far keys
        windows = max(1, EVAL_WINDOWS * EVAL_LENGTH // length)
    return eval_windows(
        read_text(Path(recipe.eval_text)),
        checkpoint.text.get(layout.TOKENIZER),
        windows=windows,
        length=min(length, lowering.context or checkpoint.shape.max_context),
    )


def _quality(
    checkpoint: Checkpoint,
    recipe: Recipe,
    lowering: Lowering,
    model_file: Path,
    windows: NDArray[np.int64],
    clock: Clock,
) -> Quality:
    """Quality on windows of a text, within the recipe's budget where it names one."""
    from edgeattn.models.model import model_of
    from edgeattn.verify.quality import check_budget, measure_quality, parse_budget

    quality = measure_quality(
        model_of(checkpoint), model_file, lowering, windows, progress=clock.count
    )
    if recipe.max_ppl_increase is not None:
        check_budget(quality, parse_budget(recipe.max_ppl_increase))
    return quality
