"""What can be checked of a bundle's graph without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from edgeattn.bundle.bundle import MODEL, Bundle
from edgeattn.errors import BundleError

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import ModelProto, TensorProto


def read_graph(bundle: Bundle) -> ModelProto:
    """The graph of a bundle, its weights left on disk.

    Raises:
        BundleError: the file is no ONNX, or reads weights from outside the bundle's own files
            (older runtimes follow such a path).
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(bundle.model_file, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise BundleError(
            expected=f"an ONNX graph in {bundle.model_file}",
            came="it does not parse",
            todo="export the bundle again",
        ) from error
    for tensor in _tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in bundle.manifest.files:
                raise BundleError(
                    expected=f"{MODEL} to read weights from the bundle's own files",
                    came=f"{tensor.name} comes from '{entry.value}'",
                    todo="do not use this bundle before you know where it comes from",
                )
    return proto


def external_files(proto: ModelProto) -> tuple[str, ...]:
    """The files that hold a graph's weights, by path inside the bundle."""
    entries = (entry for tensor in _tensors(proto) for entry in tensor.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor of a graph, wherever it sits: initialisers, attributes, subgraphs, functions."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        yield cast("TensorProto", message)
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if isinstance(value, Sequence) else [value]:
                yield from _tensors(part)
