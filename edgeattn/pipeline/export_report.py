"""What `export` would do, and what it did."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.errors import BundleError
from edgeattn.planner.estimate import Estimate
from edgeattn.planner.lowering import Lowering

if TYPE_CHECKING:
    from edgeattn.engine.plugins import PluginLibrary
    from edgeattn.exporters.export import GraphReport
    from edgeattn.verify.quality import Quality
    from edgeattn.verify.verify import Verification


@dataclass(frozen=True)
class ExportReport:
    """What `export` did.

    Attributes:
        path: the bundle.
        lowering: what was decided.
        graph: nodes and bytes written.
        verification: the proof, None with `verify=False`.
        quality: on the recipe's evaluation text, None without one.
        transforms: what each transform reports, JSON-ready.
        seconds: wall time by stage.
        plugins: the plugin library in the bundle, None where the graph needs none.
        layers: what each layer became, JSON-ready.
        sizes: bytes of what takes room, by name.
        costs: predicted memory and speed against the context, of an encoder operations and time;
            JSON-ready.
        reads_text: whether it takes tokens, and so wants a tokenizer.
    """

    path: Path
    lowering: Lowering
    graph: GraphReport
    verification: Verification | None
    quality: Quality | None
    transforms: Mapping[str, Any]
    seconds: dict[str, float]
    plugins: PluginLibrary | None = None
    layers: Sequence[Mapping[str, Any]] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    costs: Sequence[Mapping[str, Any]] = ()
    reads_text: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "bundle": str(self.path),
            "lowering": self.lowering.to_dict(),
            "nodes": self.graph.nodes,
            "weight_bytes": self.graph.weight_bytes,
            "quality": self.quality.to_dict() if self.quality else None,
            "transforms": dict(self.transforms),
            "verification": self.verification.to_dict() if self.verification else None,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "plugins": self.plugins.to_dict() if self.plugins else None,
            "layers": list(self.layers),
            "sizes": dict(self.sizes),
            "costs": list(self.costs),
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


def free_bytes(output: Path) -> int:
    """Of the disk that would hold the bundle."""
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def fitting(plan: ExportPlan, output: Path) -> Lowering:
    """What the plan decided, where the disk can hold it.

    Raises:
        BundleError: it cannot.
    """
    if not plan.fits:
        raise BundleError(
            expected=f"{plan.estimate.disk_bytes / 1e6:,.1f} MB of free disk for {output}",
            came=f"{plan.free_bytes / 1e6:,.1f} MB are free",
            todo="free some space or choose another folder with -o",
        )
    return plan.lowering
