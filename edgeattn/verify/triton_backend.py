"""The Triton kernels of a bundle's operators, on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import BundleError, MissingDependencyError
from edgeattn.ops import find_op
from edgeattn.ops.spec import OpSpec
from edgeattn.verify.compare import Agreement
from edgeattn.verify.operators import Sample, check_operators

Array = NDArray[np.generic]


def check_triton(samples: Sequence[Sample], *, device: str = "cuda") -> Agreement:
    """Compares the kernels with the reference on the inputs that the bundle keeps.

    Args:
        samples: of the bundle.
        device: where torch puts the tensors; "cpu" only under Triton's interpreter.

    Raises:
        BundleError: no node of the bundle has a kernel.
        MissingDependencyError: there is no GPU, or torch or Triton is not installed.
    """
    with_kernel = [sample for sample in samples if find_op(sample.op).triton]
    if not with_kernel:
        raise BundleError(
            expected="a bundle with operators that have a Triton kernel",
            came="none of its nodes has one",
            todo="verify it without --backend triton",
        )
    _require_triton(device)
    return check_operators(
        "triton", with_kernel, lambda *arguments: _run(*arguments, device=device)
    )


def _run(
    spec: OpSpec, inputs: Sequence[Array], attributes: Mapping[str, Any], *, device: str
) -> list[Array]:
    import torch

    kernel = spec.kernel()
    assert kernel is not None
    tensors = [torch.from_numpy(x).to(device) for x in inputs]
    result = kernel(*tensors, **attributes)
    outputs = result if isinstance(result, tuple) else (result,)
    return [y.float().cpu().numpy() for y in outputs]


def _require_triton(device: str) -> None:
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            expected="torch and Triton, for --backend triton",
            came=f"{' and '.join(missing)} cannot be imported",
            todo="pip install 'edgeattn[export,kernels]'",
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            expected="an NVIDIA GPU, for --backend triton",
            came="torch finds none",
            todo="run this on the machine with the GPU, or leave --backend out",
        )
