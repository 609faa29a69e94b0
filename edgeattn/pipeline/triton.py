"""A model of a Triton Inference Server repository from a bundle.

The layout and config.pbtxt are those of Triton's documentation ("Model Repository", "Model
Configuration", "Implicit State Management"), for its backends onnxruntime and tensorrt.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from edgeattn.bundle.bundle import MODEL, Bundle
from edgeattn.bundle.graph import external_files, read_graph
from edgeattn.bundle.writer import Kind, open_writer
from edgeattn.engine.record import Engine, read_engine, read_engines, require_sound
from edgeattn.errors import BundleError, LoweringError, UsageError

TritonBackend = Literal["onnxruntime", "tensorrt"]
CONFIG = "config.pbtxt"
_KIND = Kind("Triton model", CONFIG)
_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_PAST, _PRESENT = "past_key_values.", "present."
_TYPES: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True)
class TritonModel:
    """What was written.

    Attributes:
        path: REPOSITORY/NAME.
        backend: of Triton.
        plugins: the plugin library that tritonserver must be started with; None needs none.
        keeps_cache: whether Triton keeps a decoder's cache; else its client carries it.
    """

    path: Path
    backend: TritonBackend
    plugins: Path | None
    keeps_cache: bool


@dataclass(frozen=True)
class _Value:
    """An input or output; -1 is any size, and the batch is left out."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def write_triton_model(
    bundle: Bundle,
    repository: Path,
    *,
    name: str | None = None,
    engine: Path | None = None,
    force: bool = False,
) -> TritonModel:
    """Writes REPOSITORY/NAME: config.pbtxt and one version of the model.

    A bundle for ONNX Runtime gives its graph, one for TensorRT an engine that was built for the
    server's GPU. Files are linked where the disk allows it, else copied.

    Args:
        bundle: an opened bundle.
        repository: folder of Triton's models, made where it is not there.
        name: of the model; None takes the bundle's.
        engine: a file of the bundle; None for its newest.
        force: replace a model of that name.

    Raises:
        BundleError: the place is in use, there is no engine, or it is not sound.
        LoweringError: Triton cannot run the engine.
        UsageError: a name that Triton does not take, or an engine for ONNX Runtime.
    """
    name = _checked_name(name or bundle.path.resolve().name)
    chosen = _engine(bundle, engine)
    proto = read_graph(bundle)
    graph = proto.graph
    keeps_cache = any(value.name == "write_indices" for value in graph.input)
    backend: TritonBackend = "onnxruntime" if chosen is None else "tensorrt"
    with open_writer(repository / name, force=force, kind=_KIND) as writer:
        version = writer.path / _VERSION
        version.mkdir()
        plugins = _place_files(bundle, proto, chosen, version)
        profiles = 0 if chosen is None else len(chosen.record.profiles)
        text = _config(
            name, backend, graph, _rows(bundle), keeps_cache=keeps_cache, profiles=profiles
        )
        (writer.path / CONFIG).write_text(text, encoding="utf-8")
        writer.commit()
    path = repository / name
    found = None if plugins is None else path / _VERSION / plugins
    return TritonModel(path, backend, found, keeps_cache)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(
            expected="a model's name of letters, digits, dots, dashes and underscores",
            came=f"it is '{name}'",
            todo="choose another with --name",
        )
    return name


def _engine(bundle: Bundle, named: Path | None) -> Engine | None:
    """The engine that Triton loads, None where it loads the graph."""
    if bundle.manifest.target.flavour == "onnxruntime":
        if named is not None:
            raise UsageError(
                expected="--engine with a bundle for TensorRT",
                came=f"{bundle.path} is for {bundle.manifest.target.name}",
                todo="leave out --engine",
            )
        return None
    engines = read_engines(bundle) if named is None else (read_engine(named),)
    if not engines:
        raise BundleError(
            expected=f"an engine of {bundle.path} for Triton's TensorRT",
            came="there is none",
            todo="build one on the server's GPU with edgeattn build, or export for target cpu",
        )
    (engine, *_) = engines
    require_sound(engine, bundle)
    if engine.record.flavour != "tensorrt" or engine.record.stripped:
        what = "has no weights" if engine.record.stripped else "is of TensorRT-RTX"
        raise LoweringError(
            expected="an engine of TensorRT with its weights, which Triton runs",
            came=f"{engine.path.name} {what}",
            todo="build another: edgeattn build --flavour tensorrt, without --strip-weights",
        )
    return engine


def _rows(bundle: Bundle) -> int:
    """Rows that may run together."""
    batch = bundle.manifest.lowering.get("batch")
    return batch if isinstance(batch, int) and batch >= 1 else 1


def _place_files(
    bundle: Bundle, proto: onnx.ModelProto, engine: Engine | None, folder: Path
) -> str | None:
    """Puts the model into its version; returns the plugin library's name, if it needs one."""
    if engine is None:
        for name in (MODEL, *external_files(proto)):
            _place(bundle.path / name, folder / name)
        return None
    _place(engine.path, folder / "model.plan")
    if engine.record.plugins is None:
        return None
    library = bundle.path / engine.record.plugins.file
    _place(library, folder / library.name)
    return library.name


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _config(
    name: str,
    backend: TritonBackend,
    graph: onnx.GraphProto,
    rows: int,
    *,
    keeps_cache: bool,
    profiles: int,
) -> str:
    inputs, outputs = _values(graph.input), _values(graph.output)
    lines = [f'name: "{name}"', f'backend: "{backend}"']
    if backend == "tensorrt":
        lines.append('default_model_filename: "model.plan"')
    lines.append(f"max_batch_size: {rows}")
    if profiles > 1:  # else Triton takes the first alone
        named = ", ".join(f'"{index}"' for index in range(profiles))
        lines.append(f"instance_group [ {{ kind: KIND_GPU profile: [ {named} ] }} ]")
    states = [v for v in inputs if keeps_cache and v.name.startswith(_PAST)]
    kept = {v.name for v in states} | {_present(v) for v in states}
    lines += [_tensor("input", value) for value in inputs if value.name not in kept]
    lines += [_tensor("output", value) for value in outputs if value.name not in kept]
    if states:
        lines.append("sequence_batching {")
        lines += [_state(value) for value in states]
        lines.append("}")
    elif rows > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _values(values: Iterable[onnx.ValueInfoProto]) -> list[_Value]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        batch, *sizes = tensor.shape.dim
        if not batch.dim_param or tensor.elem_type not in _TYPES:
            raise LoweringError(
                expected="tensors that begin with the batch, of types that Triton knows",
                came=f"{value.name} is none",
                todo="export the bundle again with this edgeattn",
            )
        dims = tuple(-1 if size.dim_param else size.dim_value for size in sizes)
        found.append(_Value(value.name, _TYPES[tensor.elem_type], dims))
    return found


def _present(past: _Value) -> str:
    return _PRESENT + past.name.removeprefix(_PAST)


def _tensor(kind: str, value: _Value) -> str:
    # A tensor of nothing but the batch has one number a row, which Triton must be told so.
    shape = f"dims: {_list(value.dims)}" if value.dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{kind} [ {{ name: "{value.name}" data_type: {value.data_type} {shape} }} ]'


def _state(past: _Value) -> str:
    """A static cache, which Triton keeps, in one piece of memory, and begins with zeros."""
    dims = f"data_type: {past.data_type} dims: {_list(past.dims)}"
    return (
        f'  state [ {{ input_name: "{past.name}" output_name: "{_present(past)}" {dims}\n'
        "            use_same_buffer_for_input_output: true\n"
        f'            initial_state [ {{ name: "empty" {dims} zero_data: true }} ] }} ]'
    )


def _list(dims: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, dims))} ]"
