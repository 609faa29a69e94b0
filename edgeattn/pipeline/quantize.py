"""`quantize`: a checkpoint in, the same model rotated and quantised out, again as a checkpoint.

Others can then check with their own tools what a bundle is made of: the weights are dequantised, so
that plain transformers computes with the numbers that a bundle's graph computes with.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.bundle import bundle as layout
from edgeattn.bundle.writer import BundleWriter, Kind, open_writer
from edgeattn.devices.registry import parse_target
from edgeattn.errors import BundleError, LoweringError
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.transform import (
    Transformed,
    open_checked,
    require_inputs,
    require_torch,
    transform,
)
from edgeattn.pipeline.work import open_work
from edgeattn.planner.calibration import work_bytes
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.scheme import Scheme
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.models.checkpoint import Checkpoint

REPORT = "edgeattn.json"
CHECKPOINT = Kind("quantised checkpoint", REPORT)
# The target whose rules apply: it takes every scheme, and puts no limit on the model.
_TARGET = "cpu"


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did.

    Attributes:
        path: the written checkpoint.
        scheme: what was done to its weights.
        dtype: of its files.
        weight_files: bytes of each safetensors file by name.
        transforms: what each transform reports, JSON-ready.
        activation_scales: of int8 inputs, by the weight they are multiplied with; a checkpoint
            cannot carry them, so they are not applied in it.
        cache_scales: of keys (rotated, where the scheme rotates) and of values in an int8 cache, by
            layer; not applied either.
        seconds: wall time by stage.
    """

    path: Path
    scheme: Scheme
    dtype: str
    weight_files: Mapping[str, int]
    transforms: Mapping[str, Any]
    activation_scales: Mapping[str, float]
    cache_scales: Mapping[int, tuple[float, float]]
    seconds: Mapping[str, float]

    @property
    def not_rounded(self) -> tuple[str, ...]:
        """What the scheme rounds at run time, which a checkpoint cannot say."""
        rounded = {"activations": self.activation_scales, "keys and values": self.cache_scales}
        return tuple(part for part, scales in rounded.items() if scales)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "checkpoint": str(self.path),
            **self.about(),
            "weight_files": dict(self.weight_files),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def about(self) -> dict[str, Any]:
        """What is true wherever the checkpoint lies, JSON-ready."""
        return {
            "scheme": self.scheme.to_dict(),
            "dtype": self.dtype,
            "activations": "as they are",
            **dict.fromkeys(self.not_rounded, "not rounded in this copy"),
            "activation_scales": dict(self.activation_scales),
            "cache_scales": dict(self.cache_scales),
            "transforms": dict(self.transforms),
        }


def quantize_checkpoint(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes a rotated, fake-quantised copy of a checkpoint; it appears whole or not at all.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        recipe: what is asked for; target, shapes and evaluation text play no part. Without a dtype
            the files are fp32, which holds dequantised weights as they are. fp16 and bf16 round
            scales and weights as a bundle in that dtype does.
        output: the Hugging Face directory to write.
        offline: take a hub id from the cache alone.
        force: replace an earlier copy at `output`.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal. No part of a copy is left behind; layers that were finished on a
            calibration text wait beside it, and the error notes where.
    """
    lowering = _lowering(recipe)
    require_inputs(recipe)
    require_torch("quantising")
    clock = Clock(progress)
    with (
        open_writer(output, force=force, kind=CHECKPOINT) as writer,
        open_work(output, needed=recipe.needs_calibration) as work,
    ):
        checkpoint, _ = open_checked(
            model,
            lambda outline: _check(recipe, lowering, outline.shape, output),
            clock,
            offline=offline,
        )
        transformed = transform(checkpoint, recipe, lowering, work, clock)
        report = _write(writer, checkpoint, transformed, lowering, output, work, clock)
        writer.commit()
    return report


def _lowering(recipe: Recipe) -> Lowering:
    """Scheme and dtype; with projections apart, as they are stored."""
    scheme = recipe.scheme
    if scheme.online:
        settings = [item for item in scheme.settings if not item.startswith("online=")]
        raise LoweringError(
            expected="a scheme whose rotations lie in the weights, all that a checkpoint carries",
            came=f"scheme {scheme.label} also rotates the inputs of down projections at run time",
            todo=f"choose --quant {scheme.name}:{','.join([*settings, 'online=off'])}",
        )
    plain = Recipe(_TARGET, quant=recipe.quant)
    lowering = plan_lowering(plain, parse_target(_TARGET))
    dtype: Any = recipe.dtype or "fp32"
    return replace(lowering, dtype=dtype, attention="standard", kv_cache="concat")


def _check(recipe: Recipe, lowering: Lowering, shape: ModelShape, output: Path) -> None:
    """Refuses what cannot be done for a model, or what the disk cannot hold."""
    from edgeattn.models.families import parameter_names

    fit_lowering(lowering, shape, parse_target(_TARGET))
    untied = replace(shape, tied_embeddings=False)
    written = shape if lowering.scheme.rotation == "none" else untied
    size = 4 if lowering.dtype == "fp32" else 2
    needed = size * sum(math.prod(sizes) for sizes in parameter_names(written).values())
    needed += work_bytes(shape, lowering.scheme, size, learns=recipe.rotations is None)
    place = Path(os.path.abspath(output)).parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BundleError(
            expected=f"{needed / 1e6:,.1f} MB of free disk for {output}",
            came=f"{free / 1e6:,.1f} MB are free",
            todo="free some space or choose another folder with -o",
        )


def _write(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    transformed: Transformed,
    lowering: Lowering,
    output: Path,
    work: Path,
    clock: Clock,
) -> QuantizeReport:
    from edgeattn.models.hf_writer import checkpoint_config, write_weights

    model, dtype = transformed.model, lowering.dtype
    clock.start("writing the weights")
    files = write_weights(writer.path, model, checkpoint.config, dtype, progress=clock.count)
    clock.stop()
    for name, content in checkpoint.text.items():
        writer.write(name, content)
    writer.write(layout.CONFIG, _json(checkpoint_config(checkpoint.config, model.shape, dtype)))
    learned = work / layout.ROTATIONS
    if lowering.scheme.rotation == "learned" and learned.exists():
        writer.write(layout.ROTATIONS, learned.read_bytes())
    if checkpoint.generation_config:
        writer.write(layout.GENERATION_CONFIG, _json(checkpoint.generation_config))
    scales = {name: read.scale for name, read in model.reads.items() if read.scale is not None}
    caches = {layer: cache.scales for layer, cache in model.caches.items()}
    report = QuantizeReport(
        output, lowering.scheme, dtype, files, transformed.notes, scales, caches, clock.seconds
    )
    source = {"edgeattn": __version__, "model": checkpoint.name, "source": checkpoint.identity}
    writer.write(REPORT, _json({**source, **report.about()}))
    return report


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
