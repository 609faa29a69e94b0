"""What `doctor` finds about a model before it is exported: is it allowed, and does it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from edgeattn.devices.probe import Probe
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import AnyShape, EncoderShape, is_image
from edgeattn.errors import EdgeattnError
from edgeattn.models.encoder_checkpoint import is_encoder, read_encoder_shape
from edgeattn.models.hub import read_outline
from edgeattn.pipeline.doctor_machine import is_here
from edgeattn.pipeline.findings import Finding, refused, size
from edgeattn.planner.encoder_lowering import fit_any_lowering
from edgeattn.planner.fit import Choice, MemoryFit, memory_fit, what_fits
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe

_SHOWN_CHOICES = 3


def examine(
    model: str | Path, recipe: Recipe, target: Target, found: Probe, *, offline: bool
) -> tuple[list[Finding], MemoryFit | None, Sequence[Choice]]:
    """What is to be said of a model on a target; reads no weights.

    Args:
        model: Hugging Face directory, of which config.json is enough, GGUF or ONNX file, or hub id.
        recipe: what would be asked of `export`.
        target: the recipe's.
        found: this machine.
        offline: take a hub id from the cache alone.

    Returns:
        Findings, what it takes (None where the target refuses it), and what would fit.
    """
    try:
        shape = _shape(model, offline)
    except EdgeattnError as error:
        return [refused("model", error)], None, ()
    about = f"{shape.family}, {shape.num_parameters / 1e6:,.1f} million weights"
    findings = [Finding("ok", "model", f"{about}, {shape.num_layers} layers")]
    available = available_bytes(target, found)
    try:
        lowering = fit_any_lowering(plan_lowering(recipe, target), shape, target)
    except EdgeattnError as error:
        choices = what_fits(shape, recipe, target, available=available)
        finding = refused("support", error)
        if recipe.dtype is not None and recipe.dtype not in target.dtypes:
            finding = replace(finding, fix=f"--dtype {' or '.join(target.dtypes)}")
        elif choices:
            finding = replace(finding, fix=_advice(choices, target))
        return [*findings, finding], None, choices
    findings.append(Finding("ok", "support", _graph(lowering, shape)))
    fit = memory_fit(shape, lowering, target.device.memory, available=available)
    choices = [] if fit.fits else what_fits(shape, recipe, target, available=available)
    return [*findings, *memory_findings(fit, target, found, choices)], fit, choices


def _shape(model: str | Path, offline: bool) -> AnyShape:
    """The architecture of MODEL, read without its weights."""
    if is_encoder(model, offline=offline):
        return read_encoder_shape(model, offline=offline)
    return read_outline(model, offline=offline).shape


def _graph(lowering: Lowering, shape: AnyShape) -> str:
    parts = [lowering.dtype, lowering.scheme.label, f"{lowering.attention} attention"]
    parts += [] if isinstance(shape, EncoderShape) else [f"cache {lowering.kv_cache}"]
    return f"{', '.join(parts)}, opset {lowering.opset}"


def available_bytes(target: Target, found: Probe) -> int | None:
    """Memory of a target whose file does not say: any CPU is taken for this machine's."""
    return found.total_memory_bytes if target.device.memory is None else None


def memory_findings(
    fit: MemoryFit, target: Target, found: Probe, choices: Sequence[Choice]
) -> Iterator[Finding]:
    """Whether a model fits while it runs, is loaded, and is built.

    Args:
        fit: what it takes.
        target: where.
        found: this machine.
        choices: what would fit instead.
    """
    where = target.device.name if target.device.memory else "this machine"
    total = f"{size(fit.needed)} of the {size(fit.device)} of {where}: {_parts(fit)}"
    if fit.runs:
        yield Finding("ok", "memory", total)
        yield from _before_it_runs(fit, where, choices, target)
        yield from _free_now(fit, target, found)
    else:
        yield Finding("problem", "memory", total, _advice(choices, target))


def _parts(fit: MemoryFit) -> str:
    where = f"at {fit.context} tokens in " + (f"{fit.batch} rows" if fit.batch > 1 else "1 row")
    parts = [
        f"weights {size(fit.weights)}",
        f"cache {size(fit.cache)} {where}" if fit.cache else "",
        f"a step {size(fit.activations + fit.logits)}" + ("" if fit.cache else f" {where}"),
        f"runtime {size(fit.runtime)}" if fit.runtime else "",
        f"system {size(fit.system)}" if fit.system else "",
    ]
    return ", ".join(filter(None, parts))


def _before_it_runs(
    fit: MemoryFit, where: str, choices: Sequence[Choice], target: Target
) -> Iterator[Finding]:
    """What runs must first be built and loaded, in the same memory."""
    if fit.building > fit.device:
        yield Finding(
            "problem",
            "building",
            f"an engine is built on {where} itself, which takes {size(fit.building)}, estimated",
            _advice(choices, target),
        )
    if fit.loading > fit.device:
        yield Finding(
            "warning",
            "loading",
            f"{size(fit.loading)} where the engine's file is read as a whole",
            "give the device swap, or map the file",
        )


def _free_now(fit: MemoryFit, target: Target, found: Probe) -> Iterator[Finding]:
    """Whether other programs leave enough, where this machine runs or builds it."""
    here = is_here(found, target)
    free = found.free_memory_bytes if target.device.memory is None else None
    if here and found.gpu is not None:
        free = found.gpu.free_bytes
    builds = target.flavour == "tensorrt-rtx" or (here and target.flavour == "tensorrt")
    wanted = {
        "to run it": (fit.needed - fit.system, free),
        "to build its engine": (fit.build, found.free_memory_bytes if builds else None),
    }
    for what, (needed, there) in wanted.items():
        if there is not None and needed > there:
            said = f"{size(needed)} {what}, of which {size(there)} are free here"
            yield Finding("warning", "free memory", said, "close other programs")


def _advice(choices: Sequence[Choice], target: Target) -> str:
    if not choices:
        return "choose a smaller model: no scheme makes it fit any device of this kind"
    return "; or ".join(_choice(choice, target) for choice in choices[:_SHOWN_CHOICES])


def _choice(choice: Choice, target: Target) -> str:
    words = [] if choice.target == target.name else [f"--target {choice.target.partition('@')[0]}"]
    words += [f"--quant {choice.quant}"]
    words += [f"--context {choice.context}"] if choice.context is not None else []
    rows = f" --batch {choice.batch}" if choice.batch > 1 else ""
    return f"{' '.join(words)}{rows} takes {size(choice.needed)}"


def check_limits(
    shape: AnyShape, lowering: Lowering, context: int | None, batch: int | None
) -> Iterator[Finding]:
    """Whether a graph was exported for as many tokens and rows as are asked for."""
    if context is not None and is_image(shape):
        said = f"an image is always {shape.max_context} tokens"
        yield Finding("problem", "context", said, "leave out --context")
        context = None
    limits = {
        "--context": (context, lowering.context or shape.max_context, "tokens"),
        "--batch": (batch, lowering.batch, "rows"),
    }
    for option, (asked, most, what) in limits.items():
        if asked is not None and asked > most:
            yield Finding(
                "problem",
                option.removeprefix("--"),
                f"{asked} {what} are asked for, the bundle is for {most}",
                f"export it again with {option} {asked}",
            )
