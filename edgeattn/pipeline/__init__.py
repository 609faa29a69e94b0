"""The chain checkpoint -> model -> graph -> bundle as functions of a recipe."""

from edgeattn.pipeline.export import (
    ExportPlan,
    ExportReport,
    default_output,
    export,
    plan_export,
)
from edgeattn.pipeline.quantize import QuantizeReport, quantize_checkpoint
from edgeattn.pipeline.verify import verify_bundle

__all__ = [
    "ExportPlan",
    "ExportReport",
    "QuantizeReport",
    "default_output",
    "export",
    "plan_export",
    "quantize_checkpoint",
    "verify_bundle",
]
