"""Proving an encoder's bundle again, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.bundle import bundle as layout
from edgeattn.errors import UsageError
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.export_encoder import encoder_tokens, transform_encoder
from edgeattn.pipeline.plugins import library_for_check
from edgeattn.pipeline.proven import golden_file, require_source
from edgeattn.pipeline.transform import require_export_extra
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.verify.encoder_golden import EncoderGolden
    from edgeattn.verify.verify import Verification


def verify_encoder_bundle(
    bundle: Bundle,
    lowering: Lowering,
    *,
    backend: str,
    checkpoint: str | Path | None,
    offline: bool,
    tensorrt: bool,
    provider: str,
    progress: Progress | None,
) -> Verification:
    """Proves a bundle again; see `edgeattn.pipeline.verify.verify_bundle` for the arguments."""
    from edgeattn.verify.encoder import check_encoder

    if backend != "onnxruntime":
        raise UsageError(
            expected="--backend onnxruntime for an encoder",
            came=f"it is {backend}",
            todo="leave --backend out",
        )
    golden = _golden_of(bundle, lowering, checkpoint, offline, progress)
    return check_encoder(
        bundle.model_file,
        golden,
        lowering,
        bundle.encoder_shape,
        tensorrt=tensorrt,
        provider=provider,
        plugin_library=library_for_check(bundle.model_file, lowering.rtx_sm) if tensorrt else None,
        progress=progress,
    )


def _golden_of(
    bundle: Bundle,
    lowering: Lowering,
    checkpoint: str | Path | None,
    offline: bool,
    progress: Progress | None,
) -> EncoderGolden:
    from edgeattn.verify.encoder_golden import EncoderGolden

    if checkpoint is None:
        return EncoderGolden.load(golden_file(bundle, layout.GOLDEN_ENCODER))
    if lowering.variant is not None:
        raise UsageError(
            expected="a bundle whose weights follow from the checkpoint alone",
            came=f"{lowering.variant} learned its own on a text or on images",
            todo="verify it without --checkpoint, against the golden vectors in the bundle",
        )
    from edgeattn.models.encoder_checkpoint import open_encoder
    from edgeattn.verify.encoder import record_encoder_golden

    require_export_extra()
    clock = Clock(progress)
    opened = open_encoder(
        checkpoint,
        task=bundle.encoder_shape.task,
        offline=offline,
        progress=clock.staged("downloading"),
    )
    require_source(bundle, opened.identity, checkpoint)
    recipe = Recipe.from_dict(bundle.manifest.recipe)
    model, _ = transform_encoder(opened, recipe, lowering, bundle.path, clock)
    return record_encoder_golden(model, lowering, tokens=encoder_tokens(opened), progress=progress)
