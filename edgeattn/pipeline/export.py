"""`export`: a checkpoint in, a proven bundle out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.attention import FftRopeRequest
from edgeattn.bundle import bundle as layout
from edgeattn.bundle.writer import BundleWriter, open_writer
from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import UsageError
from edgeattn.pipeline.clock import Clock, Progress, rare_collections
from edgeattn.pipeline.device_script import write_device_script
from edgeattn.pipeline.export_encoder import export_encoder, plan_encoder_export, refuse_task
from edgeattn.pipeline.export_report import ExportPlan, ExportReport, fitting, free_bytes
from edgeattn.pipeline.layer_records import layer_records
from edgeattn.pipeline.plugins import (
    about_plugins,
    given_library,
    place_library,
    plugins_for,
)
from edgeattn.pipeline.records import bundle_sizes, write_manifest, write_report, write_text_files
from edgeattn.pipeline.transform import (
    open_checked,
    proof_tokens,
    require_export_extra,
    require_inputs,
    transform,
)
from edgeattn.pipeline.work import open_work
from edgeattn.planner.attention_calibration import FAR_LENGTH
from edgeattn.planner.cost_curve import cost_curves
from edgeattn.planner.estimate import estimate
from edgeattn.planner.group_query import regrouped_shape, regrouping
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeattn.engine.plugins import PluginLibrary
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.hub import Outline
    from edgeattn.verify.quality import Quality


EVAL_WINDOWS, EVAL_LENGTH = 12, 512
# What the name of a folder should not hold.
_NO_NAME = re.compile(r"[^\w.-]+")


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """`./<model>-<target>-<quant>`, and what else differs from the defaults."""
    from edgeattn.models.hub import model_name

    target = parse_target(recipe.target)
    parts = [model_name(model), target.device.name]
    if target.software.name != target.device.software.default:
        parts.append(target.software.name)
    parts.append(recipe.scheme.label.replace(":", "-").replace("=", ""))
    parts += [_NO_NAME.sub("-", request.label) for request in recipe.attention_requests]
    parts += [recipe.dtype] if recipe.dtype else []
    parts += ["static-cache"] if recipe.kv_cache == "static" else []
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
    from edgeattn.models.encoder_checkpoint import is_encoder
    from edgeattn.models.hub import read_outline

    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    require_inputs(recipe)
    if plugin_library is not None:
        given_library(plugin_library, target)
    if is_encoder(model, offline=offline):
        return plan_encoder_export(model, recipe, output, offline=offline, verify=verify)
    refuse_task(recipe)
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

    An encoder goes the way of `edgeattn.pipeline.export_encoder`.

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
    from edgeattn.models.encoder_checkpoint import is_encoder

    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    require_inputs(recipe)
    if plugin_library is not None and not plugins:
        raise UsageError(
            expected="--plugin-lib or --no-plugins", came="both were given", todo="leave one out"
        )
    library = None if plugin_library is None else given_library(plugin_library, target)
    require_export_extra()
    if is_encoder(model, offline=offline):
        return export_encoder(
            model,
            recipe,
            output,
            offline=offline,
            verify=verify,
            force=force,
            plugins=plugins,
            library=library,
            progress=progress,
        )
    refuse_task(recipe)
    clock = Clock(progress)
    with (
        rare_collections(),
        open_writer(output, force=force) as writer,
        open_work(output, needed=recipe.needs_calibration) as work,
    ):
        checkpoint, fitted = open_checked(
            model,
            lambda found: fitting(_plan(recipe, lowering, found, target, output, verify), output),
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
    from edgeattn.engine.flavours import TENSORRT_RTX

    shape = regrouped_shape(outline.shape, recipe.group_query)
    lowering = fit_lowering(lowering, shape, target)
    expected = estimate(
        shape,
        lowering,
        text_bytes=outline.text_bytes,
        verify=verify,
        tensorrt=TENSORRT_RTX.is_available(),
        calibration_windows=recipe.calibration_windows,
        learns=recipe.rotations is None,
        regrouped=regrouping(outline.shape, recipe, lowering.context),
    )
    return ExportPlan(lowering, expected, free_bytes(output))


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
    from edgeattn.models.families import parameter_names
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
    shape = regrouped_shape(checkpoint.shape, recipe.group_query)
    shape = replace(shape, tied_embeddings=model.shape.tied_embeddings)
    write_text_files(writer, checkpoint, lowering, shape)
    model_file = writer.path / layout.MODEL
    plugins = None
    if with_plugins:
        plugins = plugins_for(model_file, target, library=library, progress=clock.progress)
    placed = place_library(plugins.target, writer.path / layout.PLUGINS) if plugins else None
    in_bundle = placed.path if placed is not None else None
    write_device_script(writer, target, lowering, shape, library=in_bundle)
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
    notes = {**transformed.notes, **about_plugins(plugins, library, verify)}
    if placed is not None:  # the bundle moves to its place when it is whole
        placed = replace(placed, path=output / placed.path.relative_to(writer.path))
    curves = cost_curves(replace(shape, layer_cycle=model.shape.layer_cycle), lowering, target)
    report = ExportReport(
        output,
        lowering,
        graph,
        verification,
        quality,
        notes,
        clock.seconds,
        placed,
        layer_records(model, parameter_names(model.shape), lowering.dtype),
        bundle_sizes(checkpoint, lowering, shape, graph.weight_bytes, model_file, placed),
        [curve.to_dict() for curve in curves],
    )
    write_report(writer, checkpoint, recipe, report, shape)
    write_manifest(writer, checkpoint, recipe, target, report, shape)
    writer.commit()
    return report


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
