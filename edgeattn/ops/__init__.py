"""Custom operators of the ONNX domain `edgeattn`: one file per operator, each with its `SPEC`.

To add one, write its file. Importing this loads no torch and no onnx.
"""

from __future__ import annotations

import importlib
import pkgutil

from edgeattn.errors import unknown_name
from edgeattn.ops.spec import OpSpec

# The modules here that are no operators.
_PARTS = (
    "cpp_header",
    "fft_rope_body",
    "fft_rope_kernels",
    "fft_rope_masks",
    "function",
    "kernel_widths",
    "polynomial_sums",
    "spec",
    "spec_problems",
    "torch_ops",
)


def _specs() -> tuple[OpSpec, ...]:
    names = sorted({module.name for module in pkgutil.iter_modules(__path__)}.difference(_PARTS))
    return tuple(importlib.import_module(f"{__name__}.{name}").SPEC for name in names)


ALL_OPS: tuple[OpSpec, ...] = _specs()
_BY_NAME = {spec.name: spec for spec in ALL_OPS}


def find_op(name: str) -> OpSpec:
    """The operator called `name`, as in ONNX.

    Raises:
        UsageError: there is none; the sentence names near ones.
    """
    if name not in _BY_NAME:
        raise unknown_name("operator", name, _BY_NAME)
    return _BY_NAME[name]
