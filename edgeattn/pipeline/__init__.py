"""The chain checkpoint -> model -> graph -> bundle as functions of a recipe."""

from edgeattn.pipeline.export import (
    ExportPlan,
    ExportReport,
    default_output,
    export,
    plan_export,
)
from edgeattn.pipeline.verify import verify_bundle

__all__ = [
    "ExportPlan",
    "ExportReport",
    "default_output",
    "export",
    "plan_export",
    "verify_bundle",
]
