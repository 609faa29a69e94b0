"""Custom operators of the ONNX domain `edgeattn`: one file per operator, each with its `SPEC`.

To add one, write its file and list its SPEC here. Importing this loads no torch and no onnx.
"""

from __future__ import annotations

from edgeattn.errors import unknown_name
from edgeattn.ops import hadamard_transform, recurrent_linear_attention
from edgeattn.ops.spec import OpSpec

ALL_OPS: tuple[OpSpec, ...] = (hadamard_transform.SPEC, recurrent_linear_attention.SPEC)
_BY_NAME = {spec.name: spec for spec in ALL_OPS}


def find_op(name: str) -> OpSpec:
    """The operator called `name`, as in ONNX.

    Raises:
        UsageError: there is none; the sentence names near ones.
    """
    if name not in _BY_NAME:
        raise unknown_name("operator", name, _BY_NAME)
    return _BY_NAME[name]
