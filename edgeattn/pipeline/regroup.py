"""`export --attention gqa`: a model with other numbers of heads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.attention import FftRopeRequest, HeadSparseRequest, LionRequest
from edgeattn.image_file import IMAGES
from edgeattn.pipeline.clock import Clock
from edgeattn.planner.group_query import regrouped_shape
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.model import Model
    from edgeattn.transforms.regroup import LayerGroups, RegroupReport

# Of the work folder.
_PART, _GROUPS = "regroup", "groups.safetensors"


def made_before(recipe: Recipe) -> dict[str, Any]:
    """What later transforms depend on of the ones here, JSON-ready; nothing without any."""
    request = recipe.attention_request
    found: dict[str, Any] = {}
    if recipe.group_query is not None:
        found["group query"] = recipe.group_query.label
    if isinstance(request, LionRequest):
        found["linear attention"] = request.label
    if recipe.finetune_text is not None:
        if isinstance(request, FftRopeRequest | HeadSparseRequest):
            found["trained with"] = {"attention": request.label, "sha256": _tables_sha256(request)}
        found["finetune"] = {
            "sha256": _sha256(Path(recipe.finetune_text)),
            "steps": recipe.finetune_steps,
            "learning_rate": recipe.finetune_lr,
        }
    return found


def _tables_sha256(request: FftRopeRequest | HeadSparseRequest) -> str | None:
    """Of the file of a variant, which is known to be there; None where it is measured."""
    file = request.heads if isinstance(request, FftRopeRequest) else request.routers
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _sha256(material: Path) -> str:
    """Of a text, or of images."""
    from edgeattn.calibration.windows import text_sha256

    if material.suffix == IMAGES:
        return hashlib.sha256(material.read_bytes()).hexdigest()
    return text_sha256(read_text(material))


def with_regrouped_heads(
    checkpoint: Checkpoint,
    model: Model,
    recipe: Recipe,
    context: int | None,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    """The model with the recipe's numbers of heads, and notes.

    Args:
        checkpoint: with tokenizer and fingerprint.
        model: of the checkpoint, neither rotated nor quantised.
        recipe: names numbers and texts.
        context: of the bundle; None takes the checkpoint's own.
        work: folder of unfinished work.
        clock: for stages and progress.

    Raises:
        EdgeattnError: a text that does not fit, or work of another recipe.
    """
    from edgeattn.calibration.work import WorkFolder
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.pipeline.transform import calibration_windows
    from edgeattn.transforms.regroup import regroup

    request = recipe.group_query
    if request is None:
        return model, {}
    windows, about = calibration_windows(checkpoint, recipe, context)
    made_from = {
        "edgeattn": __version__,
        "checkpoint": checkpoint_digest(checkpoint),
        **about,
        "group query": request.label,
    }
    folder = WorkFolder(work / _PART, {**made_from, **made_before(recipe)})
    shape = regrouped_shape(model.shape, request)
    clock.start("comparing heads")
    layers, report = _groups(model, windows, shape, folder, made_from, clock)
    notes = _about(model.shape, shape, layers, report)
    return regroup(model, layers), {"regrouped heads": notes}


def _groups(
    model: Model,
    windows: Tensor,
    shape: ModelShape,
    folder: Any,
    made_from: Mapping[str, Any],
    clock: Clock,
) -> tuple[tuple[LayerGroups, ...], RegroupReport]:
    """The groups of all layers, from the work folder where they were found before."""
    from edgeattn.calibration.work import read_state, save_state
    from edgeattn.transforms.regroup import (
        RegroupReport,
        regroup_on_text,
        stack_groups,
        unstack_groups,
    )

    file = folder.path / _GROUPS
    if (state := read_state(file, made_from)) is not None:
        return unstack_groups(state[0]), RegroupReport(**state[1])
    layers, report = regroup_on_text(model, windows, shape, progress=clock.count)
    folder.begin()
    save_state(file, stack_groups(layers), asdict(report), made_from)
    return layers, report


def _about(
    before: ModelShape,
    after: ModelShape,
    layers: Sequence[LayerGroups],
    report: RegroupReport,
) -> dict[str, Any]:
    """What the report says of regrouping."""
    notes: dict[str, Any] = {
        "heads": f"{before.num_heads} query and {before.num_kv_heads} KV heads became "
        f"{after.num_heads} and {after.num_kv_heads}",
        "perplexity before": report.before,
        "aligned and ordered (exact)": report.aligned,
        "KV heads averaged": report.averaged,
    }
    if report.fewer_heads is not None:
        notes["query heads of least mean output left out"] = report.fewer_heads
    if before.qk_norm:
        notes["keys"] = "not aligned, as the norms behind their projections commute with no map"
    lossy = after.num_kv_heads % before.num_kv_heads or after.num_heads < before.num_heads
    notes["loss"] = (
        "training is needed before this model is of use: --finetune-text pays a part of it back"
        if lossy
        else "none: KV heads are copies"
    )
    for row in (records := [_record(*item, before) for item in enumerate(layers)]):
        groups = " | ".join(" ".join(map(str, group)) for group in row["groups"])
        notes[f"layer {row['layer']}"] = (
            f"KV heads {groups}; averages lose {row['key_loss']:.0%} of the keys and "
            f"{row['value_loss']:.0%} of the values"
        )
    notes["layers"] = records
    return notes


def _record(index: int, layer: LayerGroups, before: ModelShape) -> dict[str, Any]:
    """A layer for the report: heads of the checkpoint by group, and shares that averages lose."""
    copies = layer.members.numel() // before.num_kv_heads
    return {
        "layer": index,
        "groups": [[head // copies for head in group] for group in layer.members.tolist()],
        "key_loss": round(layer.key_loss, 4),
        "value_loss": round(layer.value_loss, 4),
    }
