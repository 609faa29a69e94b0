"""What an encoder's bundle is proven against again; `edgeattn.pipeline.verify` does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.bundle import bundle as layout
from edgeattn.errors import UsageError
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.export_encoder import encoder_tokens, transform_encoder
from edgeattn.pipeline.proven import golden_file, require_source, require_uncalibrated
from edgeattn.pipeline.transform import require_export_extra
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.verify.encoder_golden import EncoderGolden


def encoder_golden_of(
    bundle: Bundle,
    lowering: Lowering,
    checkpoint: str | Path | None,
    offline: bool,
    progress: Progress | None,
) -> EncoderGolden:
    """What a bundle's encoder must reproduce: golden vectors, or the checkpoint run anew.

    Args:
        bundle: of an encoder.
        lowering: its own.
        checkpoint: see `edgeattn.pipeline.verify.verify_bundle`.
        offline: likewise.
        progress: called with (stage, done, total).

    Raises:
        BundleError: there are no golden vectors, or the checkpoint is another one.
        UsageError: some weights were chosen or learned on a text.
    """
    from edgeattn.verify.encoder_golden import EncoderGolden

    if checkpoint is None:
        return EncoderGolden.load(golden_file(bundle, layout.GOLDEN_ENCODER))
    from edgeattn.models.encoder_checkpoint import open_encoder
    from edgeattn.verify.encoder import record_encoder_golden

    recipe = Recipe.from_dict(bundle.manifest.recipe)
    require_uncalibrated(recipe)
    if lowering.variant is not None:
        raise UsageError(
            expected="a bundle whose weights follow from the checkpoint alone",
            came=f"{lowering.variant} learned its own on a text or on images",
            todo="verify it without --checkpoint, against the golden vectors in the bundle",
        )
    require_export_extra()
    clock = Clock(progress)
    opened = open_encoder(
        checkpoint,
        task=bundle.encoder_shape.task,
        offline=offline,
        progress=clock.staged("downloading"),
    )
    require_source(bundle, opened.identity, checkpoint)
    model, _ = transform_encoder(opened, recipe, lowering, bundle.path, clock)
    return record_encoder_golden(model, lowering, tokens=encoder_tokens(opened), progress=progress)
