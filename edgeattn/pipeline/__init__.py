"""The chain checkpoint -> model -> graph -> bundle as functions of a recipe."""

from edgeattn.pipeline.build import Built, build_bundle
from edgeattn.pipeline.build_plan import BuildRequest
from edgeattn.pipeline.export import default_output, export, plan_export
from edgeattn.pipeline.export_report import ExportPlan, ExportReport
from edgeattn.pipeline.quantize import QuantizeReport, quantize_checkpoint
from edgeattn.pipeline.remote_build import build_on
from edgeattn.pipeline.verify import verify_bundle

__all__ = [
    "BuildRequest",
    "Built",
    "ExportPlan",
    "ExportReport",
    "QuantizeReport",
    "build_bundle",
    "build_on",
    "default_output",
    "export",
    "plan_export",
    "quantize_checkpoint",
    "verify_bundle",
]
