"""`export --attention lion`: an encoder of linear attention, distilled on a text or on images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.attention import LionRequest
from edgeattn.bundle import bundle as layout
from edgeattn.encoder_shape import EncoderShape, PatchInput, TokenInput
from edgeattn.errors import RuntimeInputError
from edgeattn.image_file import read_images
from edgeattn.pipeline.clock import Clock
from edgeattn.recipe import Recipe
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from edgeattn.models.encoder_checkpoint import EncoderCheckpoint
    from edgeattn.models.encoder_model import EncoderModel
    from edgeattn.transforms.linearize import Agreement, LinearizeReport, Material

# Of the work folder.
_PART, _TRAINING = "lion", "training.safetensors"
# Tokens of a window, at most, and rows to judge by; fewer rows would be learned by heart.
_WINDOW_LENGTH, _HELD_ROWS, _FEWEST_ROWS = 256, 8, 16


def require_material(recipe: Recipe, shape: EncoderShape) -> None:
    """Refuses a text or images to train on that cannot be read, before any work.

    Raises:
        RuntimeInputError: they are not there, or no text or images of the encoder.
    """
    if recipe.finetune_text is None:
        return
    if isinstance(shape.input, PatchInput):
        read_images(Path(recipe.finetune_text), shape.input)
    else:
        read_text(Path(recipe.finetune_text))


def linearized(
    checkpoint: EncoderCheckpoint, model: EncoderModel, recipe: Recipe, work: Path, clock: Clock
) -> tuple[EncoderModel, dict[str, Any]]:
    """The encoder with the attention the recipe asks for, and what to note of it.

    Args:
        checkpoint: with tokenizer and fingerprint.
        model: of the checkpoint, neither rotated nor quantised.
        recipe: names variant, text and steps.
        work: folder of unfinished work.
        clock: for stages and progress.

    Raises:
        EdgeattnError: a text or images that do not fit, or work of another recipe.
    """
    request = recipe.attention_request
    if not isinstance(request, LionRequest):
        return model, {}
    import torch

    from edgeattn.calibration.work import WorkFolder
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.transforms.descent import LEARNING_RATE
    from edgeattn.transforms.linearize import linearize

    assert recipe.finetune_text is not None
    assert recipe.finetune_steps is not None
    material = _material(checkpoint, recipe.finetune_text, recipe.finetune_steps)
    made_from = {
        "edgeattn": __version__,
        "checkpoint": checkpoint_digest(checkpoint),
        "task": model.shape.task,
        "attention": request.label,
        "rows": hashlib.sha256(material.rows.numpy().tobytes()).hexdigest(),
        "special tokens": [material.before, material.behind],
    }
    folder = WorkFolder(
        work / _PART,
        {**made_from, "steps": recipe.finetune_steps, "learning_rate": recipe.finetune_lr},
    )
    clock.start("distilling linear attention")
    folder.begin()
    trained, report = linearize(
        model,
        request,
        material,
        steps=recipe.finetune_steps,
        state_file=folder.path / _TRAINING,
        made_from=made_from,
        learning_rate=recipe.finetune_lr or LEARNING_RATE,
        progress=clock.count,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return trained, {"linear attention": _about(request, recipe.finetune_text, report)}


def _material(checkpoint: EncoderCheckpoint, file: str, steps: int) -> Material:
    """As many rows of text or images as the steps can use.

    Raises:
        RuntimeInputError: there are too few.
    """
    import torch

    from edgeattn.calibration.windows import surrounding_ids, token_ids, token_windows
    from edgeattn.transforms.linearize import PARTS, STEP_TOKENS, Material

    read = checkpoint.shape.input
    if isinstance(read, PatchInput):
        images = torch.from_numpy(read_images(Path(file), read))
        _require_rows(len(images), "images", file)
        return Material(images)
    text, tokenizer = read_text(Path(file)), checkpoint.text.get(layout.TOKENIZER)
    before, behind = map(tuple, surrounding_ids(tokenizer))
    length = _window_length(read, len(before) + len(behind), max(PARTS))
    enough = len(token_ids(text, tokenizer)) // length
    _require_rows(enough, f"windows of {length} tokens", file)
    used = steps * max(1, STEP_TOKENS // length) + _HELD_ROWS
    rows = token_windows(
        text,
        tokenizer,
        windows=min(enough, max(used, _FEWEST_ROWS)),
        length=length,
        vocab_size=read.vocab_size,
    )
    return Material(rows, before, behind)


def _window_length(read: TokenInput, special: int, parts: int) -> int:
    """Tokens of a window, a multiple of `parts`, which leaves room for special tokens."""
    room = min(_WINDOW_LENGTH, read.max_positions - special)
    if room < parts:
        raise RuntimeInputError(
            expected=f"an encoder that reads at least {parts} tokens beside {special} special ones",
            came=f"it reads {read.max_positions}",
            todo="leave out --attention",
        )
    return room - room % parts


def _require_rows(found: int, what: str, file: str) -> None:
    if found < _FEWEST_ROWS:
        raise RuntimeInputError(
            expected=f"at least {_FEWEST_ROWS} {what} to train on",
            came=f"{file} has {found}",
            todo="pass more with --finetune-text",
        )


def _about(request: LionRequest, file: str, report: LinearizeReport) -> dict[str, Any]:
    """What the report says of the distillation."""
    before, after = report.before, report.after
    alone = {
        f"layer {index} alone": f"relative error of what it adds {end:.1%}, untrained {start:.1%}"
        for index, (start, end) in enumerate(zip(before.layers, after.layers, strict=True))
    }
    return {
        "variant": f"LION-{request.variant.upper()}, {request.layer.feature_map} features",
        "trained on": f"{Path(file).name}: {report.steps} steps, rate {report.learning_rate:g}",
        "agreement with the original": _words(after),
        "before training": _words(before),
        **alone,
        "seconds per step": round(report.seconds_per_step, 3),
        "before": [asdict(before)],
        "after": [asdict(after)],
        "losses": [{"step": n, "loss": loss} for n, loss in enumerate(report.losses, start=1)],
    }


def _words(found: Agreement) -> str:
    """How an encoder agrees, on rows it has not learned on."""
    same = "" if found.same_class is None else f", same class {found.same_class:.1%}"
    return f"cosine {found.cosine:.4f}, relative error {found.error:.1%}{same}"
