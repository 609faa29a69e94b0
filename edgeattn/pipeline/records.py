"""What a bundle says of itself: text files of the checkpoint, report and manifest."""

from __future__ import annotations

import json
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
from edgeattn.bundle.writer import BundleWriter
from edgeattn.devices.registry import Target
from edgeattn.planner.lowering import Lowering
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.pipeline.export import ExportReport


def write_text_files(writer: BundleWriter, checkpoint: Checkpoint, lowering: Lowering) -> None:
    """Writes tokenizer, templates and configurations."""
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


def write_report(
    writer: BundleWriter, checkpoint: Checkpoint, recipe: Recipe, report: ExportReport
) -> None:
    """Writes report.json and its page."""
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


def write_manifest(
    writer: BundleWriter,
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target,
    report: ExportReport,
    shape: ModelShape,
) -> None:
    """Writes manifest.json, the last file, with the hashes of all others.

    Args:
        writer: of the bundle.
        checkpoint: source.
        recipe: what was asked.
        target: for what.
        report: what was done.
        shape: of the model in the graph, which a transform may have changed.
    """
    verification = report.verification
    tensorrt = verification.tensorrt if verification else None
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tools=tool_versions(),
        source={"name": checkpoint.name, **checkpoint.identity},
        recipe=recipe.to_dict(),
        lowering=report.lowering.to_dict(),
        shape=shape.to_dict(),
        target=TargetRecord(
            name=target.name,
            flavour=target.flavour,
            sm=target.device.sm,
            software_version=target.software.stack.version,
        ),
        plugin_abi=report.plugins.abi if report.plugins else None,
        verification=VerificationRecord(
            status="passed" if verification else "skipped",
            backends=tuple(a.backend for a in verification.agreements) if verification else (),
            tensorrt=_tensorrt_status(tensorrt.status if tensorrt else None),
        ),
        quality=report.quality.to_dict() if report.quality else None,
        files=writer.files(),
    )
    writer.write(layout.MANIFEST, manifest.to_json())


def _tensorrt_status(status: str | None) -> Any:
    return status if status is not None else "not applicable"


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
