"""`export --finetune-text`: the training that makes up for what attention has lost.

It comes behind regrouping and before rotating and quantising. An attention variant is in the
forward pass while the model is trained, with tables that are measured on the model as it is then;
behind training the variant is dropped, and measured anew on the model as it will be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.attention import FftRopeRequest, HeadSparseRequest
from edgeattn.bundle import bundle as layout
from edgeattn.errors import RuntimeInputError
from edgeattn.pipeline.attention import with_attention
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.regroup import made_before
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.model import Model

# Of the work folder.
_PART, _TRAINING = "recovery", "training.safetensors"
# Of the report.
_NOTES = "recovery training"
# Fewer windows to train on would be learned by heart.
_FEWEST_WINDOWS = 16
_HELD_WINDOWS = 8


def with_recovery(
    checkpoint: Checkpoint,
    original: Model,
    model: Model,
    windows: Tensor | None,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    """The model, trained where the recipe says so, and notes; its attention is what it was.

    Args:
        checkpoint: with tokenizer and fingerprint.
        original: of the checkpoint, in floating point.
        model: the same with the recipe's numbers of heads.
        windows: from `training_windows`.
        recipe: names texts, steps and the attention variant.
        lowering: for the context.
        work: folder of unfinished work.
        clock: for stages and progress.

    Raises:
        EdgeattnError: a text that does not fit, or work of another recipe.
    """
    from edgeattn.calibration.work import WorkFolder

    if windows is None:
        return model, {}
    work = work / _PART
    made_from = _made_from(checkpoint, recipe, lowering.context)
    folder = WorkFolder(work, made_from)
    student = model
    if isinstance(recipe.attention_request, FftRopeRequest | HeadSparseRequest):
        student, _ = with_attention(checkpoint, model, model, recipe, lowering, work, clock)
        if recipe.group_query is None and not student.shape.has_variants:
            return model, {_NOTES: _skipped(recipe.attention_request.label)}
    folder.begin()
    file = folder.path / _TRAINING
    trained, notes = _recovered(original, student, windows, recipe, file, made_from, clock)
    return replace(model, weights=trained.weights), {_NOTES: notes}


def _skipped(variant: str) -> dict[str, Any]:
    return {
        "learned": False,
        "verdict": f"skipped, as no layer takes {variant} and so nothing was lost",
    }


def _made_from(checkpoint: Checkpoint, recipe: Recipe, context: int | None) -> dict[str, Any]:
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.pipeline.transform import calibration_windows

    about = {}
    if recipe.calibration is not None and recipe.needs_calibration:
        about = calibration_windows(checkpoint, recipe, context)[1]
    return {
        "edgeattn": __version__,
        "checkpoint": checkpoint_digest(checkpoint),
        "context": context,
        **about,
        **made_before(recipe),
    }


def training_windows(checkpoint: Checkpoint, recipe: Recipe) -> Tensor | None:
    """As many windows of the training text as the steps can use; None where nothing is trained.

    Args:
        checkpoint: with the tokenizer.
        recipe: names the text.

    Raises:
        RuntimeInputError: the text is too short.
        MissingDependencyError: the machine's GPUs cannot be used together.
    """
    from edgeattn.calibration.windows import token_ids, token_windows
    from edgeattn.transforms.recover import STEP_TOKENS, WINDOW_LENGTH
    from edgeattn.transforms.spread import training_devices

    if recipe.finetune_text is None:
        return None
    training_devices()  # refused before heads are compared, which takes minutes
    assert recipe.finetune_steps is not None
    text, tokenizer = read_text(Path(recipe.finetune_text)), checkpoint.text.get(layout.TOKENIZER)
    length = min(WINDOW_LENGTH, checkpoint.shape.max_context)
    enough = len(token_ids(text, tokenizer)) // length
    if enough < _FEWEST_WINDOWS:
        raise RuntimeInputError(
            expected=f"a training text of at least {_FEWEST_WINDOWS} windows of {length} tokens",
            came=f"{recipe.finetune_text} is enough for {enough}",
            todo="pass a longer text with --finetune-text",
        )
    used = recipe.finetune_steps * max(1, STEP_TOKENS // length) + _HELD_WINDOWS
    return token_windows(
        text,
        tokenizer,
        windows=min(enough, max(used, _FEWEST_WINDOWS)),
        length=length,
        vocab_size=checkpoint.shape.vocab_size,
    )


def _recovered(
    original: Model,
    student: Model,
    windows: Tensor,
    recipe: Recipe,
    file: Path,
    made_from: Mapping[str, Any],
    clock: Clock,
) -> tuple[Model, dict[str, Any]]:
    from edgeattn.transforms.descent import LEARNING_RATE
    from edgeattn.transforms.recover import recover
    from edgeattn.transforms.spread import training_devices

    assert recipe.finetune_text is not None
    assert recipe.finetune_steps is not None
    clock.start(_NOTES)
    trained, report = recover(
        original,
        student,
        windows,
        steps=recipe.finetune_steps,
        state_file=file,
        made_from=made_from,
        learning_rate=recipe.finetune_lr or LEARNING_RATE,
        progress=clock.count,
        devices=training_devices(),
    )
    return trained, {"text": Path(recipe.finetune_text).name, **report.to_dict()}
