"""Checks of a written graph that need no runtime."""

from __future__ import annotations

from pathlib import Path

from edgeattn.errors import ProofError


def check_graph(model_file: Path) -> None:
    """Runs onnx's checker with shape inference on a file and its external data.

    Raises:
        ProofError: the file is no valid ONNX.
    """
    import onnx

    try:
        onnx.checker.check_model(str(model_file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ProofError(
            expected="the exported graph to be valid ONNX",
            came=f"the checker says: {first}",
            todo="report this graph with the checkpoint's name",
        ) from error
