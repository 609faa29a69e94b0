"""Packing of int4 against onnx's own."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.quant.packing import pack_int4, unpack_int4

nibbles = st.lists(st.integers(-8, 7), min_size=1, max_size=200)


@given(nibbles)
def test_round_trip(values: list[int]) -> None:
    packed = pack_int4(torch.tensor(values, dtype=torch.int8))
    assert packed.numel() == (len(values) + 1) // 2
    assert unpack_int4(packed, len(values)).tolist() == values


@given(nibbles)
def test_onnx_reads_what_we_pack(values: list[int]) -> None:
    packed = pack_int4(torch.tensor(values, dtype=torch.int8)).numpy()
    tensor = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=[len(values)], raw_data=packed.tobytes()
    )
    assert onnx.numpy_helper.to_array(tensor).astype(np.int8).tolist() == values
