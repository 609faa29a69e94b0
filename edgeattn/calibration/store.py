"""Quantised layers on disk, written as they are finished, so that stopped work goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgeattn.bundle.whole_file import write_text
from edgeattn.calibration.work import WorkFolder, write_tensors
from edgeattn.errors import UsageError
from edgeattn.models.families import LM_HEAD
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat

# In the place of a layer: the LM head, where it is quantised like a linear layer.
HEAD: Literal["lm_head"] = "lm_head"
Layer = int | Literal["lm_head"]


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer as it was quantised.

    Attributes:
        weight: integers and scales.
        input_scale: of static int8 activations; None where the input stays floating point.
    """

    weight: QuantizedTensor
    input_scale: float | None = None


class LayerStore:
    """A folder with one safetensors file per finished layer.

    Args:
        folder: of unfinished work, made when the first layer is written.
        made_from: JSON-ready values that say what the layers depend on: checkpoint, scheme, text.
        part: folder within it, where one command makes several sets of layers.

    Raises:
        UsageError: the folder holds layers made from something else.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any], part: str = "") -> None:
        self._work = WorkFolder(folder, made_from)
        self._folder = folder / part

    def has(self, layer: Layer) -> bool:
        """Whether a layer is finished."""
        return self._file(layer).exists()

    def write(
        self,
        layer: Layer,
        linears: Mapping[str, StoredLinear],
        cache_scales: tuple[float, float] | None = None,
    ) -> None:
        """Stores a finished layer; the file appears whole or not at all.

        Args:
            layer: its number, or `HEAD`.
            linears: by name.
            cache_scales: of keys and of values in an int8 cache.
        """
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, linear in linears.items():
            tensors[f"{name}.qdata"] = linear.weight.qdata.contiguous()
            tensors[f"{name}.scale"] = linear.weight.scale.contiguous()
            about[name] = {
                "bits": linear.weight.format.bits,
                "group_size": linear.weight.format.group_size,
                "input_scale": linear.input_scale,
            }
        metadata = {"layer": json.dumps({"linears": about, "cache_scales": cache_scales})}
        self._begin()
        write_tensors(self._file(layer), tensors, metadata)

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON-ready result that is made once and then read from the folder."""
        file = self._folder / f"{name}.json"
        if not file.exists():
            result = json.dumps(make())
            self._begin()
            write_text(file, result)
        return json.loads(file.read_text("utf-8"))

    def read(self, layer: Layer) -> dict[str, StoredLinear]:
        """All linear layers of a finished layer."""
        return {name: self._read(layer, name) for name in self._about(layer)}

    def weight(self, parameter: str) -> QuantizedTensor | None:
        """A quantised weight by the parameter's name; None where it is none of a linear layer."""
        place = self._place(parameter)
        if place is None or place[1] not in self._about(place[0]):
            return None
        return self._read(*place).weight

    def format(self, parameter: str) -> WeightFormat | None:
        """The format of `weight`."""
        place = self._place(parameter)
        if place is None:
            return None
        about = self._about(place[0]).get(place[1])
        return None if about is None else WeightFormat(about["bits"], about["group_size"])

    def input_scales(self, layer: Layer) -> dict[str, float]:
        """Scales of static int8 activations by linear layer."""
        scales = {name: about["input_scale"] for name, about in self._about(layer).items()}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def cache_scales(self, layer: int) -> tuple[float, float] | None:
        """Scales of keys and of values in an int8 cache; None where it is floating point."""
        found = self._metadata(layer, "cache_scales")
        return None if found is None else (float(found[0]), float(found[1]))

    def _begin(self) -> None:
        """Only here, so that a model refused before anything is finished leaves nothing behind."""
        self._work.begin()
        self._folder.mkdir(exist_ok=True)

    def _place(self, parameter: str) -> tuple[Layer, str] | None:
        """Layer and linear layer of a weight's name; None where it is none of the store's."""
        if parameter == LM_HEAD:
            return (HEAD, HEAD) if self.has(HEAD) else None
        if not parameter.endswith("_proj.weight"):
            return None
        _, layer, name = parameter.removesuffix(".weight").split(".", 2)
        return int(layer), name

    def _read(self, layer: Layer, name: str) -> StoredLinear:
        about = self._about(layer)[name]
        with safe_open(self._file(layer), "pt") as file:
            qdata, scale = file.get_tensor(f"{name}.qdata"), file.get_tensor(f"{name}.scale")
        format = WeightFormat(about["bits"], about["group_size"])
        return StoredLinear(QuantizedTensor(qdata, scale, format), about["input_scale"])

    def _about(self, layer: Layer) -> dict[str, Any]:
        found: dict[str, Any] = self._metadata(layer, "linears")
        return found

    def _metadata(self, layer: Layer, key: str) -> Any:
        try:
            with safe_open(self._file(layer), "pt") as file:
                return json.loads((file.metadata() or {})["layer"])[key]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                expected=f"finished layers in {self._folder}",
                came=f"{self._file(layer).name} does not read ({error})",
                todo="delete the folder and start again",
            ) from error

    def _file(self, layer: Layer) -> Path:
        name = layer if isinstance(layer, str) else f"layer-{layer:04d}"
        return self._folder / f"{name}.safetensors"
