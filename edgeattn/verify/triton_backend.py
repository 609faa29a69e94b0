"""The Triton kernels of a bundle's operators, on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import BundleError, MissingDependencyError
from edgeattn.ops import find_op
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
    return check_operators("triton", with_kernel, lambda sample: _run(sample, device))


def _run(sample: Sample, device: str) -> list[Array]:
    import torch

    spec = find_op(sample.op)
    kernel = spec.kernel()
    assert kernel is not None
    tensors = [torch.from_numpy(x).to(device) for x in sample.inputs]
    if sample.dtype == "bf16":  # which numpy keeps as fp32
        tensors = [
            x.bfloat16() if "bf16" in tensor.dtypes and x.is_floating_point() else x
            for tensor, x in zip(spec.inputs, tensors, strict=True)
        ]
    result = kernel(*tensors, **sample.attributes)
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
