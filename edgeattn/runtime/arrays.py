"""Arrays of callers and of ONNX Runtime as numpy's, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeattn.errors import RuntimeInputError

# kDLCPU and kDLCUDAHost of dlpack.h: memory that the CPU reads.
_ON_CPU = (1, 3)


def as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """What a caller gave; a tensor that speaks DLPack lends its memory, as torch's on a CPU do.

    Args:
        name: of the argument.
        values: anything numpy takes, or a tensor.

    Raises:
        RuntimeInputError: a tensor on another device or one that takes gradients, or no array.
    """
    device = getattr(values, "__dlpack_device__", None)
    try:
        if device is None or isinstance(values, np.ndarray):
            return np.asarray(values)
        if device()[0] not in _ON_CPU:
            raise RuntimeInputError(
                expected=f"{name} in memory of the CPU",
                came="the tensor lies on another device",
                todo="pass tensor.cpu()",
            )
        return np.from_dlpack(values)  # type: ignore[arg-type]
    except (BufferError, RuntimeError) as error:
        # as torch says of a gradient, a sparse layout or bfloat16
        raise RuntimeInputError(
            expected=f"{name} as a dense tensor of a type that numpy knows, without gradient",
            came=f"its memory is not lent: {str(error).rstrip('.')}",
            todo="pass tensor.detach(), or .float() of a bfloat16",
        ) from error
    except ValueError as error:  # rows of different lengths
        raise RuntimeInputError(
            expected=f"{name} in rows of one length",
            came="they form no array",
            todo="pad them, and tell by attention_mask",
        ) from error


class _Lent:
    """numpy's view of memory whose owner it keeps alive, writable."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._owner = array
        about = array.__array_interface__
        self.__array_interface__ = {**about, "data": (about["data"][0], False)}


def of_value(value: Any) -> NDArray[Any]:
    """The memory of an output of ONNX Runtime on a CPU, ours from now on.

    Its DLPack is of a version that cannot say "writable", so numpy takes it for read-only.
    """
    return np.asarray(_Lent(np.from_dlpack(value)))
