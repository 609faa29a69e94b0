"""What can be checked of a bundle's graph without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeattn.bundle.bundle import MODEL, Bundle
from edgeattn.errors import BundleError

if TYPE_CHECKING:
    from onnx import ModelProto


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
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in bundle.manifest.files:
                raise BundleError(
                    expected=f"{MODEL} to read weights from the bundle's own files",
                    came=f"{tensor.name} comes from '{entry.value}'",
                    todo="do not use this bundle before you know where it comes from",
                )
    return proto
