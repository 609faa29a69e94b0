"""Proving a bundle again, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeattn.bundle import bundle as layout
from edgeattn.errors import BundleError, UsageError, unknown_name
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.proven import golden_file, require_source, require_uncalibrated
from edgeattn.pipeline.transform import proof_tokens, require_export_extra, transform
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.devices.probe import Probe
    from edgeattn.engine.record import Engine
    from edgeattn.verify.tensorrt_backend import AnyGolden
    from edgeattn.verify.verify import Verification


BACKENDS = ("onnxruntime", "tensorrt", "triton")


def verify_bundle(
    path: Path,
    *,
    checkpoint: str | Path | None = None,
    offline: bool = False,
    tensorrt: bool = True,
    backend: str = "onnxruntime",
    engine: Path | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Verification:
    """Proves a bundle again against golden vectors or the checkpoint.

    Args:
        path: the bundle.
        checkpoint: compare with torch on it (see `export`); None uses the golden vectors.
        offline: take a hub id from the cache alone.
        tensorrt: also parse and build with TensorRT-RTX where the target has a TensorRT.
        backend: "onnxruntime" for the graph, "tensorrt" for an engine on this machine's GPU, or
            "triton" for the kernels of its operators alone.
        engine: with backend "tensorrt", which; None takes the newest that runs here.
        provider: with backend "onnxruntime", where it runs: "cpu", "cuda" or "tensorrt".
        progress: called with (stage, done, total).

    Raises:
        BundleError: the bundle is damaged, or has no golden vectors and no checkpoint was given.
        UsageError: an unknown backend, or an engine for another one.
        EdgeattnError: no engine runs here.
    """
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.bundle.graph import read_graph
    from edgeattn.pipeline.plugins import library_for_check
    from edgeattn.verify.encoder import check_encoder
    from edgeattn.verify.encoder_golden import EncoderGolden
    from edgeattn.verify.verify import check

    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if engine is not None and backend != "tensorrt":
        raise _other_backend("--engine", "tensorrt", backend)
    if provider != "cpu" and backend != "onnxruntime":
        raise _other_backend("--provider", "onnxruntime", backend)
    bundle = Bundle.open(path)
    read_graph(bundle)
    if backend == "triton":
        return _verify_triton(bundle)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    if backend == "tensorrt":
        # whether an engine runs here is known before a checkpoint is read
        chosen, found = _engine_of(bundle, engine)
        golden = _golden_of(bundle, lowering, checkpoint, offline, progress)
        return _verify_engine(chosen, bundle, golden, found, progress)
    golden = _golden_of(bundle, lowering, checkpoint, offline, progress)
    library = library_for_check(bundle.model_file, lowering.rtx_sm) if tensorrt else None
    if isinstance(golden, EncoderGolden):
        return check_encoder(
            bundle.model_file,
            golden,
            lowering,
            bundle.encoder_shape,
            tensorrt=tensorrt,
            provider=provider,
            plugin_library=library,
            progress=progress,
        )
    return check(
        bundle.model_file,
        golden,
        lowering,
        bundle.shape,
        tensorrt=tensorrt,
        provider=provider,
        plugin_library=library,
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


def _other_backend(option: str, backend: str, came: str) -> UsageError:
    return UsageError(
        expected=f"{option} together with --backend {backend}",
        came=f"the backend is {came}",
        todo=f"pass --backend {backend}, or leave out {option}",
    )


def _engine_of(bundle: Bundle, named: Path | None) -> tuple[Engine, Probe]:
    from edgeattn.devices.probe import probe
    from edgeattn.engine.record import choose_engine

    found = probe()
    return choose_engine(bundle, found, named), found


def _verify_engine(
    engine: Engine, bundle: Bundle, golden: AnyGolden, found: Probe, progress: Progress | None
) -> Verification:
    """Runs an engine even where it passed before: that is what was asked for."""
    from edgeattn.pipeline.selftest import run_and_store
    from edgeattn.verify.verify import Verification

    _, checked = run_and_store(engine, bundle, golden, found, progress)
    return Verification((checked.agreement,), None, checked.left_out)


def _golden_of(
    bundle: Bundle,
    lowering: Lowering,
    checkpoint: str | Path | None,
    offline: bool,
    progress: Progress | None,
) -> AnyGolden:
    from edgeattn.verify.golden import Golden
    from edgeattn.verify.verify import record_golden

    if bundle.is_encoder:
        from edgeattn.pipeline.verify_encoder import encoder_golden_of

        return encoder_golden_of(bundle, lowering, checkpoint, offline, progress)
    if checkpoint is None:
        return Golden.load(golden_file(bundle, layout.GOLDEN))
    from edgeattn.models.hub import open_model

    recipe = Recipe.from_dict(bundle.manifest.recipe)
    require_uncalibrated(recipe)
    require_export_extra()
    clock = Clock(progress)
    opened = open_model(checkpoint, offline=offline, progress=clock.staged("downloading"))
    require_source(bundle, opened.identity, checkpoint)
    tokens = proof_tokens(opened)
    model = transform(opened, recipe, lowering, bundle.path, clock).model
    return record_golden(model, lowering, tokens=tokens, progress=progress)
