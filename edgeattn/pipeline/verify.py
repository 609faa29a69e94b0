"""Proving a bundle again, here and now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.bundle import bundle as layout
from edgeattn.errors import BundleError, UsageError, unknown_name
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.transform import proof_tokens, require_export_extra, transform
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.verify.golden import Golden
    from edgeattn.verify.verify import Verification


BACKENDS = ("onnxruntime", "triton")


def verify_bundle(
    path: Path,
    *,
    checkpoint: str | Path | None = None,
    offline: bool = False,
    tensorrt: bool = True,
    backend: str = "onnxruntime",
    progress: Progress | None = None,
) -> Verification:
    """Proves a bundle again against golden vectors or the checkpoint.

    Args:
        path: the bundle.
        checkpoint: compare with torch on it (see `export`); None uses the golden vectors.
        offline: take a hub id from the cache alone.
        tensorrt: also parse and build with TensorRT-RTX where the target has a TensorRT.
        backend: "onnxruntime" for the graph, or "triton" for the kernels of its operators alone.
        progress: called with (stage, done, total).

    Raises:
        BundleError: the bundle is damaged, or has no golden vectors and no checkpoint was given.
    """
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.bundle.graph import read_graph
    from edgeattn.pipeline.plugins import library_for_check
    from edgeattn.verify.verify import check

    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    bundle = Bundle.open(path)
    read_graph(bundle)
    if backend == "triton":
        return _verify_triton(bundle)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    golden = _golden_of(bundle, lowering, checkpoint, offline, progress)
    return check(
        bundle.model_file,
        golden,
        lowering,
        bundle.shape,
        tensorrt=tensorrt,
        plugin_library=library_for_check(bundle.model_file, lowering.rtx_sm) if tensorrt else None,
        progress=progress,
    )


def _verify_triton(bundle: Bundle) -> Verification:
    from edgeattn.verify.operators import load_samples
    from edgeattn.verify.triton_backend import check_triton
    from edgeattn.verify.verify import Verification

    file = bundle.file(layout.GOLDEN_OPERATORS)
    if file is None:
        raise BundleError(
            expected=f"samples of edgeattn's operators in {bundle.path}",
            came="it has none: its graph holds no such node, or it was exported with --no-verify",
            todo="verify it without --backend triton",
        )
    return Verification((check_triton(load_samples(file)),), None)


def _golden_of(
    bundle: Bundle,
    lowering: Lowering,
    checkpoint: str | Path | None,
    offline: bool,
    progress: Progress | None,
) -> Golden:
    from edgeattn.verify.golden import Golden
    from edgeattn.verify.verify import record_golden

    if checkpoint is None:
        file = bundle.file(layout.GOLDEN)
        if file is None:
            raise BundleError(
                expected=f"golden vectors in {bundle.path}",
                came="it was exported with --no-verify and has none",
                todo="pass --checkpoint MODEL, or export it again with verification",
            )
        return Golden.load(file)
    from edgeattn.models.hub import open_model

    recipe = Recipe.from_dict(bundle.manifest.recipe)
    if recipe.needs_calibration:
        chosen = lowering.scheme.label if lowering.scheme.needs_calibration else lowering.variant
        raise UsageError(
            expected="a bundle whose weights follow from the checkpoint alone",
            came=f"{chosen} chose some on a calibration text",
            todo="verify it without --checkpoint, against the golden vectors in the bundle",
        )
    require_export_extra()
    clock = Clock(progress)
    opened = open_model(checkpoint, offline=offline, progress=clock.staged("downloading"))
    if opened.identity["fingerprint"] != bundle.manifest.source.get("fingerprint"):
        raise BundleError(
            expected=f"the checkpoint that {bundle.path} was exported from",
            came=f"{checkpoint} is another one",
            todo=f"pass the checkpoint named {_source_name(bundle.manifest.source)}",
        )
    tokens = proof_tokens(opened)
    model = transform(opened, recipe, lowering, bundle.path, clock).model
    return record_golden(model, lowering, tokens=tokens, progress=progress)


def _source_name(source: Mapping[str, Any]) -> str:
    """What the checkpoint of a bundle is called; of the hub's, what fetches it again."""
    return "{hub_id}@{commit}".format(**source) if "hub_id" in source else str(source.get("name"))
