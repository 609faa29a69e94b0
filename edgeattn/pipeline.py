"""The chain checkpoint -> model -> graph -> bundle as one function of a recipe."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.bundle import bundle as layout
from edgeattn.bundle.genai import genai_config
from edgeattn.bundle.manifest import (
    SCHEMA_VERSION,
    Manifest,
    TargetRecord,
    VerificationRecord,
    tool_versions,
)
from edgeattn.bundle.writer import BundleWriter, open_writer
from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import BundleError, MissingDependencyError
from edgeattn.planner.estimate import Estimate, estimate
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe

if TYPE_CHECKING:
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.exporters.export import GraphReport
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.hub import Outline
    from edgeattn.models.model import Model
    from edgeattn.verify.golden import Golden
    from edgeattn.verify.verify import Verification

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What `export` did.

    Attributes:
        path: the bundle.
        lowering: what was decided.
        graph: nodes and bytes written.
        verification: the proof, None with `verify=False`.
        seconds: wall time by stage.
    """

    path: Path
    lowering: Lowering
    graph: GraphReport
    verification: Verification | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "bundle": str(self.path),
            "lowering": self.lowering.to_dict(),
            "nodes": self.graph.nodes,
            "weight_bytes": self.graph.weight_bytes,
            "verification": self.verification.to_dict() if self.verification else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


@dataclass(frozen=True)
class ExportPlan:
    """What `export` would do.

    Attributes:
        lowering: what was decided.
        estimate: sizes, and seconds by stage.
        free_bytes: of the disk that would hold the bundle.
    """

    lowering: Lowering
    estimate: Estimate
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the disk can hold the bundle."""
        return self.estimate.disk_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "lowering": self.lowering.to_dict(),
            **self.estimate.to_dict(),
            "free_bytes": self.free_bytes,
        }


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """`./<model>-<target>-<quant>`, and what else differs from the defaults."""
    from edgeattn.models.hub import model_name

    target = parse_target(recipe.target)
    parts = [model_name(model), target.device.name]
    if target.software.name != target.device.software.default:
        parts.append(target.software.name)
    parts.append(recipe.scheme.label.replace(":", "-").replace("=", ""))
    parts += [recipe.dtype] if recipe.dtype else []
    return Path("-".join(parts))


def plan_export(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    verify: bool = True,
) -> ExportPlan:
    """What `export` with the same arguments would do; writes nothing and needs no torch.

    Raises:
        EdgeattnError: a refusal. A disk that is too small is none: see `ExportPlan.fits`.
    """
    from edgeattn.models.hub import read_outline

    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    return _plan(lowering, read_outline(model, offline=offline), target, output, verify)


def export(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    offline: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Exports a checkpoint to a proven bundle; the bundle appears whole or not at all.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        recipe: what is asked for.
        output: where the bundle shall appear.
        offline: take a hub id from the cache alone.
        verify: prove the bundle before it appears; False is written into the manifest.
        force: replace a bundle at `output`.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal (nothing is written) or a failed proof (nothing is left behind).
    """
    from edgeattn.models.hub import Outline, find_hub_id, open_model, read_outline

    target = parse_target(recipe.target)
    lowering = plan_lowering(recipe, target)
    _require_export_extra()
    clock = _Clock(progress)
    with _rare_collections(), open_writer(output, force=force) as writer:
        clock.start("reading the checkpoint")
        if find_hub_id(model):  # what cannot be exported is refused before it is downloaded
            outline = read_outline(model, offline=offline)
            _check_disk(_plan(lowering, outline, target, output, verify), output)
        checkpoint = open_model(model, offline=offline, progress=clock.staged("downloading"))
        plan = _plan(lowering, Outline.of(checkpoint), target, output, verify)
        _check_disk(plan, output)
        return _export(checkpoint, recipe, target, plan.lowering, writer, output, verify, clock)


def _plan(
    lowering: Lowering, outline: Outline, target: Target, output: Path, verify: bool
) -> ExportPlan:
    from edgeattn.engine.tensorrt_rtx import is_available

    lowering = fit_lowering(lowering, outline.shape, target)
    expected = estimate(
        outline.shape,
        lowering,
        text_bytes=outline.text_bytes,
        verify=verify,
        tensorrt=is_available(),
    )
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    return ExportPlan(lowering, expected, shutil.disk_usage(place).free)


def _check_disk(plan: ExportPlan, output: Path) -> None:
    if not plan.fits:
        raise BundleError(
            expected=f"{plan.estimate.disk_bytes / 1e6:,.1f} MB of free disk for {output}",
            came=f"{plan.free_bytes / 1e6:,.1f} MB are free",
            todo="free some space or choose another folder with -o",
        )


def _export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target,
    lowering: Lowering,
    writer: BundleWriter,
    output: Path,
    verify: bool,
    clock: _Clock,
) -> ExportReport:
    from edgeattn.exporters.export import export_graph
    from edgeattn.verify.verify import prove

    tokens = _proof_tokens(checkpoint)
    model = _transform(checkpoint, lowering)
    clock.start("writing the graph")
    graph = export_graph(
        model,
        lowering,
        writer.path / layout.MODEL,
        writer.path / layout.WEIGHTS,
        progress=clock.count,
    )
    writer.note_hash(layout.WEIGHTS, graph.weight_bytes, graph.weight_sha256)
    _write_text_files(writer, checkpoint, lowering)
    verification = None
    if verify:
        clock.start("proving the bundle")
        verification = prove(
            model,
            lowering,
            writer.path / layout.MODEL,
            writer.path / layout.GOLDEN,
            tokens=tokens,
            progress=clock.progress,
        )
    clock.stop()
    report = ExportReport(output, lowering, graph, verification, clock.seconds)
    _write_report(writer, checkpoint, recipe, report)
    _write_manifest(writer, checkpoint, recipe, target, report)
    writer.commit()
    return report


def verify_bundle(
    path: Path,
    *,
    checkpoint: str | Path | None = None,
    offline: bool = False,
    tensorrt: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Proves a bundle again against golden vectors or the checkpoint.

    Args:
        path: the bundle.
        checkpoint: compare with torch on it (see `export`); None uses the golden vectors.
        offline: take a hub id from the cache alone.
        tensorrt: also parse and build with TensorRT-RTX where the target has a TensorRT.
        progress: called with (stage, done, total).

    Raises:
        BundleError: the bundle is damaged, or has no golden vectors and no checkpoint was given.
    """
    from edgeattn.bundle.bundle import Bundle
    from edgeattn.bundle.graph import read_graph
    from edgeattn.verify.verify import check

    bundle = Bundle.open(path)
    read_graph(bundle)
    lowering = Lowering.from_dict(bundle.manifest.lowering)
    golden = _golden_of(bundle, lowering, checkpoint, offline, progress)
    return check(
        bundle.model_file,
        golden,
        lowering,
        bundle.shape,
        tensorrt=tensorrt,
        progress=progress,
    )


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

    _require_export_extra()
    clock = _Clock(progress)
    opened = open_model(checkpoint, offline=offline, progress=clock.staged("downloading"))
    if opened.identity["fingerprint"] != bundle.manifest.source.get("fingerprint"):
        raise BundleError(
            expected=f"the checkpoint that {bundle.path} was exported from",
            came=f"{checkpoint} is another one",
            todo=f"pass the checkpoint named {_source_name(bundle.manifest.source)}",
        )
    tokens = _proof_tokens(opened)
    return record_golden(_transform(opened, lowering), lowering, tokens=tokens, progress=progress)


def _source_name(source: Mapping[str, Any]) -> str:
    """What the checkpoint of a bundle is called; of the hub's, what fetches it again."""
    return "{hub_id}@{commit}".format(**source) if "hub_id" in source else str(source.get("name"))


def _transform(checkpoint: Checkpoint, lowering: Lowering) -> Model:
    """Checkpoint -> Model, through the transforms of the recipe."""
    from edgeattn.models.model import TORCH_DTYPES, model_of
    from edgeattn.transforms.fuse import fuse_projections
    from edgeattn.transforms.quantize import quantize

    model = model_of(checkpoint)
    context = lowering.context or checkpoint.shape.max_context
    model = replace(model, shape=model.shape.within(context))
    model = quantize(model, lowering.scheme, scale_dtype=TORCH_DTYPES[lowering.dtype])
    return fuse_projections(model) if lowering.attention == "group-query" else model


def _proof_tokens(checkpoint: Checkpoint) -> list[int] | None:
    from edgeattn.verify.cases import text_tokens

    return text_tokens(checkpoint.text.get(layout.TOKENIZER), checkpoint.shape.vocab_size)


def _write_text_files(writer: BundleWriter, checkpoint: Checkpoint, lowering: Lowering) -> None:
    for name, content in checkpoint.text.items():
        writer.write(name, content)
    writer.write(layout.CONFIG, _json(dict(checkpoint.config)))
    writer.write(layout.GENERATION_CONFIG, _json(dict(checkpoint.generation_config)))
    genai = genai_config(
        checkpoint.shape,
        context=lowering.context or checkpoint.shape.max_context,
        shared_buffer=lowering.kv_cache == "shared-buffer",
        model_file=layout.MODEL,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
    )
    writer.write(layout.GENAI_CONFIG, _json(genai))


def _write_report(
    writer: BundleWriter, checkpoint: Checkpoint, recipe: Recipe, report: ExportReport
) -> None:
    from edgeattn.verify.report import report_html

    content = {
        "edgeattn": __version__,
        "model": checkpoint.name,
        "source": dict(checkpoint.identity),
        "shape": checkpoint.shape.to_dict(),
        "recipe": recipe.to_dict(),
        **{k: v for k, v in report.to_dict().items() if k != "bundle"},
        "bundle": report.path.name,
    }
    writer.write(layout.REPORT_JSON, _json(content))
    writer.write(layout.REPORT_HTML, report_html(content))


def _write_manifest(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target,
    report: ExportReport,
) -> None:
    verification = report.verification
    tensorrt = verification.tensorrt if verification else None
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tools=tool_versions(),
        source={"name": checkpoint.name, **checkpoint.identity},
        recipe=recipe.to_dict(),
        lowering=report.lowering.to_dict(),
        shape=checkpoint.shape.to_dict(),
        target=TargetRecord(
            name=target.name,
            flavour=target.flavour,
            sm=target.device.sm,
            software_version=target.software.stack.version,
        ),
        plugin_abi=None,
        verification=VerificationRecord(
            status="passed" if verification else "skipped",
            backends=tuple(a.backend for a in verification.agreements) if verification else (),
            tensorrt=_tensorrt_status(tensorrt.status if tensorrt else None),
        ),
        files=writer.files(),
    )
    writer.write(layout.MANIFEST, manifest.to_json())


def _tensorrt_status(status: str | None) -> Any:
    return status if status is not None else "not applicable"


def _require_export_extra() -> None:
    missing = []
    for module in ("torch", "onnx_ir", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            missing.append(module)
    if missing:
        raise MissingDependencyError(
            expected="the packages that export needs",
            came=f"{', '.join(missing)} cannot be imported",
            todo="pip install 'edgeattn[export,ort]'",
        )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Looks for garbage less often.

    Importing and running torch's exporter makes millions of objects that live to the end; searching
    them every 700 allocations was measured at a fifth of an export's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Clock:
    """Wall seconds per stage, and the current stage's progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self._stage = ""
        self._began = 0.0

    def start(self, stage: str) -> None:
        self.stop()
        self._stage, self._began = stage, time.perf_counter()
        self.count(0, 1)

    def stop(self) -> None:
        if self._stage:
            self.seconds[self._stage] = time.perf_counter() - self._began
            self._stage = ""

    def count(self, done: int, total: int) -> None:
        if self.progress:
            self.progress(self._stage, done, total)

    def staged(self, stage: str) -> Callable[[int, int], None]:
        """A counter of a stage that may not happen: it starts when first counted."""

        def count(done: int, total: int) -> None:
            if self._stage != stage:
                self.start(stage)
            self.count(done, total)

        return count
