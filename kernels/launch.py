"""From a call of an operator to the tensors its kernels work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
from torch import Tensor

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.spec import OpSpec
from edgeattn.ops.torch_ops import check_inputs


def check_call(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Inputs, contiguous, and new outputs of an operator by name.

    Raises:
        RuntimeInputError: shapes, dtypes or attributes do not fit, or the tensors are on no GPU.
    """
    shapes = check_inputs(spec, inputs, attributes)
    if inputs[0].device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeInputError(
            expected=f"tensors on an NVIDIA GPU for the kernels of {spec.name}",
            came=f"they are on {inputs[0].device}",
            todo='move them there, or call the operator with impl="reference"',
        )
    names = [tensor.name for tensor in spec.inputs]
    tensors = dict(zip(names, (x.contiguous() for x in inputs), strict=True))
    dtypes = {t.variable: x.dtype for t, x in zip(spec.inputs, inputs, strict=True)}
    for output, shape in zip(spec.outputs, shapes, strict=True):
        tensors[output.name] = inputs[0].new_empty(shape, dtype=dtypes[output.variable])
    return tensors
