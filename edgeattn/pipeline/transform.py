"""Checkpoint -> Model: the transforms of a recipe in their order."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeattn import __version__
from edgeattn.bundle import bundle as layout
from edgeattn.errors import MissingDependencyError, UsageError
from edgeattn.image_file import IMAGES
from edgeattn.pipeline.attention import require_attention, with_attention, without_variant
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.recover import training_windows, with_recovery
from edgeattn.pipeline.regroup import made_before, with_regrouped_heads
from edgeattn.planner.calibration import window_length
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import CALIBRATION_LENGTH, Recipe
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.hub import Outline
    from edgeattn.models.model import Model

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Transformed:
    """A model as the bundle shall hold it.

    Attributes:
        model: transformed and quantised.
        lowering: that was given, or the one without an attention variant that no layer takes.
        notes: what each transform reports, JSON-ready, by name.
    """

    model: Model
    lowering: Lowering
    notes: Mapping[str, Any] = field(default_factory=dict)


def open_checked(
    model: str | Path, check: Callable[[Outline], _Found], clock: Clock, *, offline: bool
) -> tuple[Checkpoint, _Found]:
    """Opens a checkpoint that passes a check, and what the check found.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id.
        check: raises what refuses the model; asked before a hub id is downloaded, and after.
        clock: for the stage.
        offline: take a hub id from the cache alone.
    """
    from edgeattn.models.hub import Outline, find_hub_id, open_model, read_outline

    clock.start("reading the checkpoint")
    if find_hub_id(model):
        check(read_outline(model, offline=offline))
    checkpoint = open_model(model, offline=offline, progress=clock.staged("downloading"))
    return checkpoint, check(Outline.of(checkpoint))


def require_inputs(recipe: Recipe) -> None:
    """Refuses a recipe whose texts are missing or not readable, or have no use, before any work.

    Raises:
        UsageError: saying what to pass.
        RuntimeInputError: a text that is not there, is no UTF-8, or empty.
    """
    if recipe.max_ppl_increase is not None:
        from edgeattn.verify.quality import parse_budget

        parse_budget(recipe.max_ppl_increase)
        if recipe.eval_text is None:
            raise UsageError(
                expected="a text on which the increase of perplexity is measured",
                came="--max-ppl-increase was given without one",
                todo="pass --eval-text FILE, another text than the calibration's",
            )
    if recipe.eval_text is not None and recipe.logits == "last":
        raise UsageError(
            expected="logits of every position, to measure quality",
            came="--logits last keeps those of the last one",
            todo="leave out --eval-text or --logits last",
        )
    require_attention(recipe)
    if recipe.needs_calibration and recipe.calibration is None:
        raise UsageError(
            expected=f"a text that {recipe.calibrated_part} can be calibrated on",
            came="none was given",
            todo="pass --calibration FILE, plain text of the kind the model will read "
            f"({recipe.calibration_windows} windows of {CALIBRATION_LENGTH} tokens)",
        )
    if recipe.rotations is not None and recipe.scheme.rotation == "none":
        raise UsageError(
            expected="a scheme that rotates, to use --rotations",
            came=f"scheme {recipe.scheme.label} does not",
            todo="choose w4a16-spinquant or w8a8-spinquant, or leave out --rotations",
        )
    calibration = recipe.calibration if recipe.needs_calibration else None
    for text in (calibration, recipe.finetune_text, recipe.eval_text):
        # Images are known to fit once the model is.
        if text is not None and Path(text).suffix != IMAGES:
            read_text(Path(text))


def transform(
    checkpoint: Checkpoint, recipe: Recipe, lowering: Lowering, work: Path, clock: Clock
) -> Transformed:
    """Applies the transforms of `recipe` in their order.

    Heads are regrouped and the model is trained before its weights are rotated and quantised;
    polynomials and routers come last, as they are measured on the model as it will be.

    Args:
        checkpoint: where the weights are.
        recipe: calibration text and rotations, where the scheme uses them.
        lowering: scheme, dtype and spelling of attention.
        work: folder for finished layers of a scheme that needs calibration, an earlier run's
            among them.
        clock: for the stages that take long.

    Raises:
        EdgeattnError: a text or a rotation that does not fit, or weights that cannot be quantised.
    """
    from edgeattn.models.model import TORCH_DTYPES, model_of
    from edgeattn.transforms.fuse import fuse_projections
    from edgeattn.transforms.quantize import quantize

    model = model_of(checkpoint)
    context = lowering.context or checkpoint.shape.max_context
    model = replace(model, shape=model.shape.within(context))
    windows, original = training_windows(checkpoint, recipe), model
    model, notes = with_regrouped_heads(checkpoint, model, recipe, lowering.context, work, clock)
    arguments = (windows, recipe, lowering, work, clock)
    model, about = with_recovery(checkpoint, original, model, *arguments)
    notes, plain = {**notes, **about}, model
    scheme, scale_dtype = lowering.scheme, TORCH_DTYPES[lowering.dtype]
    if scheme.needs_calibration or scheme.rotation != "none":
        model, about = _on_text(checkpoint, model, recipe, lowering, work, clock)
        notes = {**notes, **about}
    else:
        model = quantize(model, scheme, scale_dtype=scale_dtype)
    if scheme.weight_bits:
        notes = {**_quantized_before(checkpoint), **notes}
    model, about = with_attention(checkpoint, plain, model, recipe, lowering, work, clock)
    notes = {**notes, **about}
    if lowering.variant is not None and not model.shape.has_variants:
        notes["attention"] = f"no layer takes {lowering.variant}: all stay as they are"
        lowering = without_variant(recipe, lowering, model.shape)
    if lowering.attention == "group-query":
        model = fuse_projections(model)
        if not model.shape.fused:
            notes["projections"] = (
                "not stacked (q, k and v; gate and up), as some of them are kept at higher "
                "precision: decoding is a little slower"
            )
    return Transformed(model, lowering, notes)


def _on_text(
    checkpoint: Checkpoint,
    model: Model,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    from edgeattn.models.model import TORCH_DTYPES
    from edgeattn.pipeline.calibrated import CalibratedQuantizer

    windows, about = calibration_windows(checkpoint, recipe, lowering.context)
    made_from = {
        "edgeattn": __version__,
        "checkpoint": checkpoint.identity["fingerprint"],
        # In full: defaults may be others in another release.
        "scheme": lowering.scheme.to_dict(),
        "dtype": lowering.dtype,
        "context": lowering.context,
        "rotations": _sha256(recipe.rotations),
        **made_before(recipe),
        **about,
    }
    quantizer = CalibratedQuantizer(
        lowering.scheme, TORCH_DTYPES[lowering.dtype], windows, work, made_from, clock
    )
    rotations = Path(recipe.rotations) if recipe.rotations else None
    model, notes = quantizer.run(model, rotations)
    return model, {"calibration": about, **notes}


def _sha256(file: str | None) -> str | None:
    """What a file of rotations holds; a missing one is refused where it is read."""
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _quantized_before(checkpoint: Checkpoint) -> dict[str, str]:
    """A warning where the checkpoint's weights lie on a grid of fewer than 8 bits."""
    types = checkpoint.identity.get("tensor_types", {})
    low = sorted(name for name in types if name.startswith(("Q", "IQ")) and "8" not in name)
    if not low:
        return {}
    return {
        "warning": f"the checkpoint was quantised before ({', '.join(low)}): figures compare with "
        "its dequantised weights, not with the original model, and rounding to nearest on nearly "
        "the same grid loses less than it would on original weights, while a rotation leaves that "
        "grid, so never rotate it without GPTQ"
    }


def calibration_windows(
    checkpoint: Checkpoint, recipe: Recipe, context: int | None
) -> tuple[Tensor, dict[str, Any]]:
    """The token windows of the recipe's calibration text, and what to note of it.

    Args:
        checkpoint: with the tokenizer.
        recipe: names the text and the number of windows.
        context: no window is longer; None takes the checkpoint's own.

    Raises:
        UsageError: there is no text.
        RuntimeInputError: it is not readable, or too short.
        CheckpointError: the checkpoint has no tokenizer.
    """
    from edgeattn.calibration.windows import text_sha256, token_windows

    require_inputs(recipe)
    assert recipe.calibration is not None
    text = read_text(Path(recipe.calibration))
    windows = token_windows(
        text,
        checkpoint.text.get(layout.TOKENIZER),
        windows=recipe.calibration_windows,
        length=window_length(checkpoint.shape, context),
        vocab_size=checkpoint.shape.vocab_size,
    )
    return windows, {
        "text": Path(recipe.calibration).name,
        "text_sha256": text_sha256(text),
        "windows": windows.shape[0],
        "length": windows.shape[1],
    }


def proof_tokens(checkpoint: Checkpoint) -> list[int] | None:
    """Ids of the text the proof runs, None without a tokenizer."""
    from edgeattn.verify.cases import text_tokens

    return text_tokens(checkpoint.text.get(layout.TOKENIZER), checkpoint.shape.vocab_size)


def require_export_extra() -> None:
    """Refuses to start without the packages of `edgeattn[export,ort]`.

    Raises:
        MissingDependencyError: naming what is missing.
    """
    modules = ("torch", "onnx_ir", "onnxscript", "onnxruntime")
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            expected="the packages that export needs",
            came=f"{', '.join(missing)} cannot be imported",
            todo="pip install 'edgeattn[export,ort]'",
        )


def require_torch(what: str) -> None:
    """Refuses to start without torch.

    Args:
        what: needs it, as a noun.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(
            expected=f"torch, which {what} needs",
            came="it cannot be imported",
            todo="pip install 'edgeattn[export]'",
        )
