"""Packing of 4-bit integers as ONNX and TensorRT store them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """Packs int8 values in [-8, 7], in row-major order, two per byte, low nibble first.

    Source: ONNX TensorProto, INT4 data. An odd count leaves the last high nibble zero.

    Returns:
        `[ceil(n / 2)]` uint8.
    """
    flat = values.reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    nibbles = flat.view(torch.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_int4`: `[count]` int8 values."""
    signed = packed.view(torch.int8)
    low = (signed << 4) >> 4
    high = signed >> 4
    return torch.stack((low, high), dim=1).reshape(-1)[:count]
