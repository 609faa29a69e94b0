"""Rotation and quantising of an encoder on a text or images; `calibrated` has the decoder's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.bundle import bundle as layout
from edgeattn.encoder_shape import PatchInput
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.regroup import made_before
from edgeattn.planner.calibration import window_length
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.encoder_checkpoint import EncoderCheckpoint
    from edgeattn.models.encoder_model import EncoderModel

# Windows, and tokens of each, on which a rotated encoder is compared with the original one.
_EQUIVALENCE_WINDOWS, _EQUIVALENCE_LENGTH = 1, 64


def quantize_encoder_on_text(
    checkpoint: EncoderCheckpoint,
    model: EncoderModel,
    recipe: Recipe,
    lowering: Lowering,
    work: Path,
    clock: Clock,
) -> tuple[EncoderModel, dict[str, Any]]:
    """The encoder as a calibrated scheme rotates and rounds it, and notes, JSON-ready.

    Args:
        checkpoint: with the tokenizer.
        model: in floating point.
        recipe: names the calibration text or images.
        lowering: scheme, dtype and context.
        work: folder where finished layers wait for the rest, an earlier run's among them.
        clock: for stages and progress.

    Raises:
        EdgeattnError: a text that does not do, unfinished work of another command, or what cannot
            be quantised.
    """
    from edgeattn.calibration.store import LayerStore
    from edgeattn.models.model import TORCH_DTYPES
    from edgeattn.transforms.calibrate import quantize_on_text
    from edgeattn.transforms.rotate_encoder import (
        check_encoder_equivalence,
        encoder_rotations,
        rotate_encoder,
    )

    scheme = lowering.scheme
    windows, about = _windows(checkpoint, recipe, lowering)
    made_from = {
        "edgeattn": __version__,
        "checkpoint": checkpoint.identity["fingerprint"],
        # In full: defaults may be others in another release.
        "scheme": scheme.to_dict(),
        "dtype": lowering.dtype,
        "context": lowering.context,
        **made_before(recipe),
        **about,
    }
    store = LayerStore(work, made_from, "layers")
    notes: dict[str, Any] = {"calibration": about}
    if scheme.rotation != "none":
        clock.start("rotating")
        rotations = encoder_rotations(model.shape, online=scheme.online)
        rotated = rotate_encoder(model, rotations)
        sample = windows[:_EQUIVALENCE_WINDOWS]
        if sample.dim() == 2:
            sample = sample[:, :_EQUIVALENCE_LENGTH]
        found = check_encoder_equivalence(model, rotated, sample)
        notes["rotation"] = {**rotations.to_dict(), **found}
        model = rotated
    clock.start("quantising layer by layer")
    quantized = quantize_on_text(
        model,
        scheme,
        windows,
        store,
        scale_dtype=TORCH_DTYPES[lowering.dtype],
        progress=clock.count,
    )
    return quantized, notes


def _windows(
    checkpoint: EncoderCheckpoint, recipe: Recipe, lowering: Lowering
) -> tuple[Tensor, dict[str, Any]]:
    from edgeattn.calibration.encoder_windows import encoder_text_windows, image_windows

    assert recipe.calibration is not None
    file, shape = Path(recipe.calibration), checkpoint.shape
    if isinstance(shape.input, PatchInput):
        return image_windows(file, shape.input, windows=recipe.calibration_windows)
    return encoder_text_windows(
        file,
        checkpoint.text.get(layout.TOKENIZER),
        shape.input,
        windows=recipe.calibration_windows,
        length=window_length(shape, lowering.context),
    )
