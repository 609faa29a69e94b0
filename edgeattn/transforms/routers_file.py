"""Head routers on disk: one safetensors file that says which model, text and density they are for.

Tensors are `layers.N.router_weight` `[hidden, H]` and `layers.N.router_bias` `[H]`, fp32. The
metadata's "routers" is JSON: "version", "made_from", and "layers" with slots, recall and, where it
is known, how often each head is active.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgeattn.attention import HeadSparseRequest
from edgeattn.calibration.work import write_tensors
from edgeattn.errors import UsageError
from edgeattn.shape import ModelShape
from edgeattn.transforms.head_density import num_units
from edgeattn.transforms.head_router import HeadRouter
from edgeattn.transforms.sparsify import RoutedLayer, Routers

VERSION = 1
_KEY = "routers"
_ADVICE = "pass routers that `edgeattn calibrate` made for this model and this --attention"


def asked_for(request: HeadSparseRequest) -> dict[str, str]:
    """What routers depend on of a request, JSON-ready."""
    return {"density": str(request.density), "unit": request.unit, "layers": request.layers}


def save_routers(path: Path, routers: Routers, made_from: Mapping[str, Any]) -> None:
    """Writes routers.

    Args:
        path: appears whole or not at all.
        routers: of one model.
        made_from: JSON-ready values: the "checkpoint" by its digest, what was `asked_for`, and
            whatever else is to be noted.

    Raises:
        BundleError: the disk refuses.
    """
    tensors, layers = dict[str, Tensor](), dict[str, Any]()
    for index, routed in routers.layers.items():
        weight, bias = _names(index)
        tensors[weight] = routed.router.weight.contiguous()
        tensors[bias] = routed.router.bias.contiguous()
        layers[str(index)] = {"slots": routed.slots, "recall": routed.recall}
        if routed.active:
            layers[str(index)]["active"] = list(routed.active)
    about = {"version": VERSION, "made_from": dict(made_from), "layers": layers}
    write_tensors(path, tensors, {_KEY: json.dumps(about, sort_keys=True)})


def load_routers(
    path: Path, shape: ModelShape, checkpoint: str, request: HeadSparseRequest
) -> tuple[Routers, dict[str, Any]]:
    """Reads what `save_routers` wrote.

    Args:
        path: the file.
        shape: of the model.
        checkpoint: its digest.
        request: what is asked for.

    Returns:
        The routers, and what they were made from.

    Raises:
        UsageError: no such file, none of routers, of another model or request, or damaged.
    """
    about, tensors = _read(path)
    made_from, layers = about["made_from"], about["layers"]
    if made_from.get("checkpoint") != checkpoint:
        raise _refusal(f"routers of this model in {path}", "they are of another checkpoint")
    for key, value in asked_for(request).items():
        if made_from.get(key) != value:
            came = f"they are of {key}={made_from.get(key)}"
            raise _refusal(f"routers of {key}={value} in {path}", came)
    units = num_units(shape, request)
    found = {
        int(name): _layer(path, int(name), values, tensors, shape, units)
        for name, values in layers.items()
    }
    return Routers(dict(sorted(found.items())), units, request.unit == "groups"), made_from


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, its outline checked, and all tensors that it names."""
    if not path.is_file():
        raise _refusal(f"a file {path}", "there is none")
    try:
        with safe_open(path, "pt") as file:
            about = _outline(path, (file.metadata() or {}).get(_KEY))
            held = set(file.keys())
            wanted = {name for index in about["layers"] for name in _names(int(index))}
            if held != wanted:
                came = f"{len(wanted - held)} are missing and {len(held - wanted)} unknown"
                raise _refusal(f"the tensors of {len(about['layers'])} routers in {path}", came)
            return about, {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        came = f"it does not read ({error})"
        raise _refusal(f"a safetensors file at {path}", came) from error


def _outline(path: Path, noted: str | None) -> dict[str, Any]:
    try:
        about = json.loads(noted or "")
        version, made_from, layers = about["version"], about["made_from"], about["layers"]
        known = isinstance(made_from, dict) and all(name.isdecimal() for name in layers)
        named = known and all(isinstance(values, dict) for values in layers.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        version, named = None, False
    if not named or version is None:
        raise _refusal(f"head routers in {path}", "the file does not say that it holds any")
    if version != VERSION:
        raise _refusal(f"version {VERSION} of router files in {path}", f"it is of {version}")
    return {"made_from": made_from, "layers": layers}


def _layer(
    path: Path,
    index: int,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    units: int,
) -> RoutedLayer:
    slots, recall = values.get("slots"), values.get("recall")
    if index < shape.num_layers and shape.layer_kind(index).window is not None:
        raise _refusal(
            f"routers in {path} of layers that see all keys",
            f"layer {index} sees a sliding window of them",
        )
    if index >= shape.num_layers or type(slots) is not int or not 1 <= slots <= units:
        raise _refusal(
            f"routers of {shape.num_layers} layers with up to {units} slots in {path}",
            f"there are {slots} slots in layer {index}",
        )
    if not isinstance(recall, float | int) or not 0 <= recall <= 1:
        raise _refusal(f"the recall of layer {index} in {path}", f"it is {recall}")
    active = values.get("active") or []
    shares = isinstance(active, list) and all(
        isinstance(share, float | int) and 0 <= share <= 1 for share in active
    )
    if not shares or len(active) not in (0, shape.num_heads):
        raise _refusal(
            f"shares of {shape.num_heads} heads of layer {index} in {path}", f"they are {active}"
        )
    wanted = ((shape.hidden_size, shape.num_heads), (shape.num_heads,))
    for name, size in zip(_names(index), wanted, strict=True):
        tensor = tensors[name]
        if tensor.shape != size or tensor.dtype != torch.float32:
            came = f"it is {str(tensor.dtype).removeprefix('torch.')} of {list(tensor.shape)}"
            raise _refusal(f"{name} in {path} of {list(size)} in float32", came)
        if not tensor.isfinite().all():
            raise _refusal(f"finite numbers in {name} in {path}", "there is NaN or infinity")
    weight, bias = (tensors[name] for name in _names(index))
    return RoutedLayer(HeadRouter(weight, bias), slots, float(recall), tuple(active))


def _names(index: int) -> tuple[str, str]:
    return f"layers.{index}.router_weight", f"layers.{index}.router_bias"


def _refusal(expected: str, came: str) -> UsageError:
    return UsageError(expected=expected, came=came, todo=_ADVICE)
