"""`export --attention`: a quantised model whose layers take the variant that was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.attention import FftRopeRequest, HeadSparseRequest, LionRequest, RecurrentRequest
from edgeattn.devices.registry import parse_target
from edgeattn.errors import LoweringError, UsageError
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.layer_records import polynomial_records, router_records
from edgeattn.pipeline.regroup import made_before
from edgeattn.planner.attention_calibration import attention_text
from edgeattn.planner.head_sparsity import WORTH_IT, cache_share, decode_speedup
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.model import Model

# Of the work folder: what a scheme has finished waits beside it.
_PART = "attention"


def require_attention(recipe: Recipe) -> None:
    """Refuses a variant's file that is missing, before any work.

    Raises:
        UsageError: no such file, or none of these.
    """
    request = recipe.attention_request
    if (
        isinstance(request, FftRopeRequest | HeadSparseRequest)
        and recipe.group_query is not None
        and not request.needs_calibration
    ):
        raise LoweringError(
            expected=f"{request.name} to be measured on the regrouped model",
            came=f"{request.label} names a file that was made for the checkpoint's own heads",
            todo=f"leave out {request.name}'s file, or {recipe.group_query.label}",
        )
    if isinstance(request, FftRopeRequest) and request.heads is not None:
        from edgeattn.planner.polynomial_heads import read_polynomial_heads

        read_polynomial_heads(Path(request.heads))
    if not isinstance(request, HeadSparseRequest) or request.routers is None:
        return
    if not Path(request.routers).is_file():
        raise UsageError(
            expected=f"a file {request.routers}",
            came="there is none",
            todo="pass routers that `edgeattn calibrate` made for this model",
        )


def with_attention(
    checkpoint: Checkpoint,
    plain: Model,
    model: Model,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    """The model with the recipe's attention variant, and what to note of it.

    Heads are measured, and routers trained, on the model as it will be: quantised.

    Args:
        checkpoint: with tokenizer and fingerprint.
        plain: the model before it was rotated and quantised, whose basis files are in.
        model: quantised as the recipe says.
        recipe: names variant and calibration text.
        lowering: for the context.
        work: folder of unfinished work.
        clock: for stages and progress.

    Raises:
        EdgeattnError: a text or a file that does not fit.
    """
    request = recipe.attention_request
    if request is None or isinstance(request, RecurrentRequest):
        return model, {}
    assert not isinstance(request, LionRequest), "only encoders have it"
    rest = (model, recipe, lowering, work / _PART, clock)
    if isinstance(request, FftRopeRequest):
        return _fft_rope(request, checkpoint, *rest)
    return _head_sparse(request, checkpoint, plain, *rest)


def without_variant(recipe: Recipe, lowering: Lowering, shape: ModelShape) -> Lowering:
    """The lowering of a recipe whose attention variant no layer of the model takes."""
    target = parse_target(recipe.target)
    group_query = () if recipe.group_query is None else (recipe.group_query.label,)
    # Training needs something lossy in a recipe, and a lowering knows nothing of it.
    untrained = replace(recipe, finetune_text=None, finetune_steps=None, finetune_lr=None)
    plain = plan_lowering(replace(untrained, attention=group_query), target)
    return fit_lowering(replace(plain, dtype=lowering.dtype), shape, target)


def _fft_rope(
    request: FftRopeRequest,
    checkpoint: Checkpoint,
    model: Model,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.pipeline.calibrate_attention import (
        CalibrationText,
        calibrated_heads,
        cost_notes,
    )
    from edgeattn.planner.polynomial_heads import check_fits, read_polynomial_heads
    from edgeattn.transforms.polynomial import with_polynomials

    context = lowering.context or checkpoint.shape.max_context
    if request.heads is not None:
        heads = read_polynomial_heads(Path(request.heads))
        check_fits(heads, model.shape, checkpoint_digest(checkpoint))
    else:
        assert recipe.calibration is not None
        asked = (model.shape, lowering.context, recipe.calibration_windows)
        windows, length = attention_text(request, *asked)
        options = ("--context", "--calibration-windows")
        text = CalibrationText(Path(recipe.calibration), length, windows, *options)
        made_from = {"quant": recipe.quant, "dtype": lowering.dtype, "context": lowering.context}
        made_from |= made_before(recipe)
        heads = calibrated_heads(checkpoint, model, request, text, made_from, work, clock)
    notes = cost_notes(heads, model.shape, context)
    notes |= {"tolerance": heads.tolerance, "layers": polynomial_records(heads)}
    return with_polynomials(model, heads), {"polynomial heads": notes}


def _head_sparse(
    request: HeadSparseRequest,
    checkpoint: Checkpoint,
    plain: Model,
    model: Model,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.pipeline.calibrate_routers import (
        layer_densities,
        routers_made_from,
        train_on_text,
    )
    from edgeattn.pipeline.transform import calibration_windows
    from edgeattn.transforms.routers_file import load_routers
    from edgeattn.transforms.sparsify import in_basis_of, sparsify

    if request.routers is not None:
        routers, made_from = load_routers(
            Path(request.routers), model.shape, checkpoint_digest(checkpoint), request
        )
        routers = in_basis_of(routers, model, plain)
        about = {"trained on": str(made_from.get("text", "an unknown text"))}
    else:
        windows, text = calibration_windows(checkpoint, recipe, lowering.context)
        made_from = routers_made_from(checkpoint, request, text)
        made_from |= {"quant": recipe.quant, "dtype": lowering.dtype, "context": lowering.context}
        made_from |= made_before(recipe)
        routers = train_on_text(model, request, windows, work, made_from, clock)
        about = {"trained on": text["text"]}
    layers = layer_densities(routers, model.shape.num_layers)
    active = sum(n.slots for n in layers)
    notes: dict[str, Any] = {
        **about,
        "active": f"{active} of {routers.units * len(layers)} {request.unit}",
        "decoding": _gain(model, lowering, active / (routers.units * len(layers))),
    }
    for layer in layers:
        recall = "dense" if layer.recall is None else f"recall {layer.recall:.1%}"
        notes[f"layer {layer.layer}"] = f"{layer.slots} of {routers.units}, {recall}"
    notes["layers"] = router_records(routers, len(layers))
    if request.routers is not None and made_from.get("texts"):
        notes["texts"] = made_from["texts"]
    return sparsify(model, routers), {"head sparsity": notes}


def _gain(model: Model, lowering: Lowering, density: float) -> str:
    """What fewer heads can buy at the recipe's context and batch."""
    context = lowering.context or model.shape.max_context
    weights = read_bytes(model.shape, lowering)
    per_token = cache_bytes_per_token(model.shape, lowering)
    share = cache_share(weights, per_token, context, lowering.batch)
    gain = decode_speedup(share, density)
    rows = f"{lowering.batch} rows" if lowering.batch > 1 else "1 row"
    verdict = "" if gain >= WORTH_IT else ": not worth its loss"
    return (
        f"at most {gain:.2f} times as fast with {rows} of {context:,} tokens, whose cache is "
        f"{share:.0%} of the bytes a step reads{verdict}"
    )
