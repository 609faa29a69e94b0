"""What a bundle says of itself: text files of the checkpoint, report and manifest."""

from __future__ import annotations

import json
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
from edgeattn.bundle.writer import BundleWriter
from edgeattn.devices.registry import Target
from edgeattn.encoder_shape import AnyShape
from edgeattn.planner.lowering import Lowering
from edgeattn.planner.memory import cache_bytes_per_token
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

if TYPE_CHECKING:
    from edgeattn.engine.plugins import PluginLibrary
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.encoder_checkpoint import EncoderCheckpoint
    from edgeattn.pipeline.export_report import ExportReport


def write_text_files(
    writer: BundleWriter, checkpoint: Checkpoint, lowering: Lowering, shape: ModelShape
) -> None:
    """Writes tokenizer, templates and configurations; the latter with the graph's own heads."""
    for name, content in checkpoint.text.items():
        writer.write(name, content)
    config, before = dict(checkpoint.config), checkpoint.shape
    if (shape.num_heads, shape.num_kv_heads) != (before.num_heads, before.num_kv_heads):
        config |= {
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
        }
    writer.write(layout.CONFIG, _json(config))
    writer.write(layout.GENERATION_CONFIG, _json(dict(checkpoint.generation_config)))
    if lowering.kv_cache == "static":
        return  # onnxruntime-genai has no name for write_indices
    genai = genai_config(
        shape,
        context=lowering.context or shape.max_context,
        shared_buffer=lowering.kv_cache == "shared-buffer",
        model_file=layout.MODEL,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
    )
    writer.write(layout.GENAI_CONFIG, _json(genai))


def write_encoder_text_files(writer: BundleWriter, checkpoint: EncoderCheckpoint) -> None:
    """Writes tokenizer or image preprocessing, and the configuration."""
    for name, content in checkpoint.text.items():
        writer.write(name, content)
    writer.write(layout.CONFIG, _json(dict(checkpoint.config)))


def write_report(
    writer: BundleWriter,
    checkpoint: Checkpoint | EncoderCheckpoint,
    recipe: Recipe,
    report: ExportReport,
    shape: AnyShape,
) -> None:
    """Writes report.json and its page; `shape` as for `write_manifest`."""
    from edgeattn.verify.report import report_html

    content = {
        "edgeattn": __version__,
        "model": checkpoint.name,
        "source": dict(checkpoint.identity),
        "shape": shape.to_dict(),
        "recipe": recipe.to_dict(),
        **{k: v for k, v in report.to_dict().items() if k != "bundle"},
        "bundle": report.path.name,
    }
    writer.write(layout.REPORT_JSON, _json(content))
    writer.write(layout.REPORT_HTML, report_html(content))


def bundle_sizes(
    checkpoint: Checkpoint | EncoderCheckpoint,
    lowering: Lowering,
    shape: AnyShape,
    weight_bytes: int,
    model_file: Path,
    plugins: PluginLibrary | None,
) -> dict[str, int]:
    """Bytes of the checkpoint, of what a device loads, and of a cache for the whole context.

    Args:
        checkpoint: source.
        lowering: how the cache is stored, and for how long a context.
        shape: of the model in the graph.
        weight_bytes: of the graph's external data.
        model_file: the graph.
        plugins: the library in the bundle.
    """
    found = {
        "checkpoint": sum(checkpoint.identity["files"].values()),
        "weights": weight_bytes,
        "graph": model_file.stat().st_size,
    }
    if plugins is not None:
        found["plugins"] = plugins.bytes
    if isinstance(shape, ModelShape):  # an encoder has no cache
        per_token = cache_bytes_per_token(shape, lowering)
        found["cache_per_token"] = per_token
        context = lowering.context or shape.max_context
        found["cache"] = per_token * context * lowering.batch
    return found


def write_manifest(
    writer: BundleWriter,
    checkpoint: Checkpoint | EncoderCheckpoint,
    recipe: Recipe,
    target: Target,
    report: ExportReport,
    shape: AnyShape,
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
