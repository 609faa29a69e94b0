"""What a bundle was proven with: its golden vectors, its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.errors import BundleError, UsageError

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.recipe import Recipe


def golden_file(bundle: Bundle, name: str) -> Path:
    """The file of a bundle's golden vectors.

    Raises:
        BundleError: it has none.
    """
    file = bundle.file(name)
    if file is None:
        raise BundleError(
            expected=f"golden vectors in {bundle.path}",
            came="it was exported with --no-verify and has none",
            todo="pass --checkpoint MODEL, or export it again with verification",
        )
    return file


def require_uncalibrated(recipe: Recipe) -> None:
    """Refuses to make a model of a bundle's recipe again whose weights were chosen on a text.

    Raises:
        UsageError: some were.
    """
    if recipe.needs_calibration:
        raise UsageError(
            expected="a bundle whose weights follow from the checkpoint alone",
            came=f"{recipe.calibrated_part} chose some on a calibration text",
            todo="verify it without --checkpoint, against the golden vectors in the bundle",
        )


def require_source(bundle: Bundle, identity: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuses a checkpoint that a bundle was not exported from.

    Args:
        bundle: of the manifest.
        identity: of the checkpoint.
        checkpoint: what the user calls it.

    Raises:
        BundleError: it is another one.
    """
    if identity["fingerprint"] != bundle.manifest.source.get("fingerprint"):
        raise BundleError(
            expected=f"the checkpoint that {bundle.path} was exported from",
            came=f"{checkpoint} is another one",
            todo=f"pass the checkpoint named {_source_name(bundle.manifest.source)}",
        )


def _source_name(source: Mapping[str, Any]) -> str:
    """What the checkpoint of a bundle is called; of the hub's, what fetches it again."""
    return "{hub_id}@{commit}".format(**source) if "hub_id" in source else str(source.get("name"))
