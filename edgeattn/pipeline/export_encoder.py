"""`export` of an encoder; `edgeattn.pipeline.export` has the decoder's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.attention import LionRequest
from edgeattn.bundle import bundle as layout
from edgeattn.bundle.writer import BundleWriter, open_writer
from edgeattn.devices.registry import Target, parse_target
from edgeattn.encoder_shape import EncoderShape, TokenInput
from edgeattn.errors import UsageError
from edgeattn.pipeline.calibrated_encoder import quantize_encoder_on_text
from edgeattn.pipeline.clock import Clock, Progress, rare_collections
from edgeattn.pipeline.device_script import write_device_script
from edgeattn.pipeline.export_report import ExportPlan, ExportReport, fitting, free_bytes
from edgeattn.pipeline.layer_records import layer_records
from edgeattn.pipeline.linearize import linearized, require_material
from edgeattn.pipeline.plugins import about_plugins, place_library, plugins_for
from edgeattn.pipeline.records import (
    bundle_sizes,
    write_encoder_text_files,
    write_manifest,
    write_report,
)
from edgeattn.pipeline.transform import require_export_extra
from edgeattn.pipeline.work import open_work
from edgeattn.planner.encoder_cost import encoder_cost_curves
from edgeattn.planner.encoder_estimate import estimate_encoder
from edgeattn.planner.encoder_lowering import fit_encoder_lowering
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.engine.plugins import PluginLibrary
    from edgeattn.models.encoder_checkpoint import EncoderCheckpoint
    from edgeattn.models.encoder_model import EncoderModel


def plan_encoder_export(
    model: str | Path, recipe: Recipe, output: Path, *, offline: bool = False, verify: bool = True
) -> ExportPlan:
    """What `export` of an encoder would do; see `edgeattn.pipeline.export.plan_export`."""
    from edgeattn.models.encoder_checkpoint import read_encoder_shape

    target = parse_target(recipe.target)
    lowering = _lowering(recipe, target)
    shape = read_encoder_shape(model, task=recipe.task, offline=offline)
    return _plan(recipe, lowering, shape, target, output, verify)


def export_encoder(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    verify: bool = True,
    force: bool = False,
    plugins: bool = True,
    library: PluginLibrary | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports an encoder to a proven bundle; the bundle appears whole or not at all.

    Args:
        model: Hugging Face directory or, as a str, a hub id of an encoder family.
        recipe: what is asked for.
        output: where the bundle shall appear.
        offline: take a hub id from the cache alone.
        verify: prove the bundle before it appears; False is written into the manifest.
        force: replace a bundle at `output`.
        plugins: give a graph of linear attention its TensorRT plugin.
        library: of plugins, instead of one that is built.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal or a failed proof. No part of a bundle is left behind; training
            that was stopped, or layers that were finished on a calibration text, wait beside it,
            and the error notes where.
    """
    from edgeattn.models.encoder_checkpoint import open_encoder, read_encoder_shape

    target = parse_target(recipe.target)
    lowering = _lowering(recipe, target)
    require_export_extra()
    clock = Clock(progress)
    with (
        rare_collections(),
        open_writer(output, force=force) as writer,
        open_work(output, needed=_needs_work(recipe)) as work,
    ):
        clock.start("reading the checkpoint")
        shape = read_encoder_shape(model, task=recipe.task, offline=offline)
        fitted = fitting(_plan(recipe, lowering, shape, target, output, verify), output)
        checkpoint = open_encoder(
            model, task=recipe.task, offline=offline, progress=clock.staged("downloading")
        )
        settled = (recipe, target, fitted, writer, output, work, verify, plugins, library, clock)
        return _export(checkpoint, *settled)


def _needs_work(recipe: Recipe) -> bool:
    """Whether a part of the export takes so long that a stopped one goes on where it was."""
    return recipe.needs_calibration or isinstance(recipe.attention_request, LionRequest)


def refuse_task(recipe: Recipe) -> None:
    """Refuses a recipe for a decoder that names the task of an encoder.

    Raises:
        UsageError: it does.
    """
    if recipe.task is not None:
        raise UsageError(
            expected="an encoder, for --task",
            came="the model is a decoder, which gives logits",
            todo="leave it out",
        )


def transform_encoder(
    checkpoint: EncoderCheckpoint, recipe: Recipe, lowering: Lowering, work: Path, clock: Clock
) -> tuple[EncoderModel, dict[str, Any]]:
    """Applies the transforms of a recipe: linear attention, then rotation and rounding.

    Args:
        checkpoint: where the weights are.
        recipe: names the calibration text or images, where the scheme uses some, and what linear
            attention learns on.
        lowering: scheme and dtype.
        work: folder for unfinished training and finished layers, an earlier run's among them.
        clock: for the stages that take long.

    Returns:
        The model, and what each transform reports, JSON-ready, by name.
    """
    from edgeattn.models.encoder_model import encoder_of
    from edgeattn.models.model import TORCH_DTYPES
    from edgeattn.transforms.quantize import quantize

    model = encoder_of(checkpoint.shape, checkpoint.weights)
    model, notes = linearized(checkpoint, model, recipe, work, clock)
    if lowering.scheme.needs_calibration:
        model, about = quantize_encoder_on_text(checkpoint, model, recipe, lowering, work, clock)
        return model, {**notes, **about}
    return quantize(model, lowering.scheme, scale_dtype=TORCH_DTYPES[lowering.dtype]), notes


def encoder_tokens(checkpoint: EncoderCheckpoint) -> list[int] | None:
    """Ids of the text the proof runs; None without a tokenizer, and for images."""
    from edgeattn.verify.cases import text_tokens

    if not isinstance(checkpoint.shape.input, TokenInput):
        return None
    return text_tokens(checkpoint.text.get(layout.TOKENIZER), checkpoint.shape.input.vocab_size)


def _lowering(recipe: Recipe, target: Target) -> Lowering:
    """The lowering before the encoder is known; refuses what is a decoder's."""
    for name in ("eval_text", "max_ppl_increase", "rotations"):
        if getattr(recipe, name) is not None:
            raise UsageError(
                expected=f"a decoder, for --{name.replace('_', '-')}",
                came="the model is an encoder",
                todo="leave it out",
            )
    if recipe.group_query is not None:
        raise UsageError(
            expected=f"a decoder, for --attention {recipe.group_query.label}",
            came="the model is an encoder",
            todo="leave it out",
        )
    return plan_lowering(recipe, target)


def _plan(
    recipe: Recipe,
    lowering: Lowering,
    shape: EncoderShape,
    target: Target,
    output: Path,
    verify: bool,
) -> ExportPlan:
    from edgeattn.engine.flavours import TENSORRT_RTX

    lowering = fit_encoder_lowering(lowering, shape, target)
    require_material(recipe, shape)
    available = TENSORRT_RTX.is_available()
    expected = estimate_encoder(
        shape,
        lowering,
        verify=verify,
        tensorrt=available,
        calibration_windows=recipe.calibration_windows,
        training_steps=recipe.finetune_steps,
    )
    return ExportPlan(lowering, expected, free_bytes(output))


def _export(
    checkpoint: EncoderCheckpoint,
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
    from edgeattn.models.encoder_families import encoder_parameters
    from edgeattn.verify.encoder import prove_encoder

    tokens = encoder_tokens(checkpoint)
    model, notes = transform_encoder(checkpoint, recipe, lowering, work, clock)
    clock.start("writing the graph")
    model_file = writer.path / layout.MODEL
    weights_file = writer.path / layout.WEIGHTS
    graph = export_graph(model, lowering, model_file, weights_file, progress=clock.count)
    writer.note_hash(layout.WEIGHTS, graph.weight_bytes, graph.weight_sha256)
    write_encoder_text_files(writer, checkpoint)
    plugins = None
    if with_plugins:
        plugins = plugins_for(model_file, target, library=library, progress=clock.progress)
    placed = place_library(plugins.target, writer.path / layout.PLUGINS) if plugins else None
    in_bundle = placed.path if placed is not None else None
    write_device_script(writer, target, lowering, model.shape, library=in_bundle)
    verification = None
    if verify:
        clock.start("proving the bundle")
        golden = writer.path / layout.GOLDEN_ENCODER
        verification = prove_encoder(
            model,
            lowering,
            model_file,
            golden,
            tokens=tokens,
            operators_file=writer.path / layout.GOLDEN_OPERATORS,
            plugin_library=plugins.host.path if plugins and plugins.host else None,
            progress=clock.progress,
        )
    clock.stop()
    if placed is not None:  # the bundle moves to its place when it is whole
        placed = replace(placed, path=output / placed.path.relative_to(writer.path))
    reads_text = isinstance(model.shape.input, TokenInput)
    report = ExportReport(
        output,
        lowering,
        graph,
        verification,
        None,
        {**notes, **about_plugins(plugins, library, verify)},
        clock.seconds,
        placed,
        layers=layer_records(model, encoder_parameters(model.shape), lowering.dtype),
        sizes=bundle_sizes(
            checkpoint, lowering, model.shape, graph.weight_bytes, model_file, placed
        ),
        costs=[c.to_dict() for c in encoder_cost_curves(model.shape, lowering, target)],
        reads_text=reads_text,
    )
    write_report(writer, checkpoint, recipe, report, model.shape)
    write_manifest(writer, checkpoint, recipe, target, report, model.shape)
    writer.commit()
    return report
