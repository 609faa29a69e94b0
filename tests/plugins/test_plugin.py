"""What the plugin tells TensorRT while a network is built, and what survives in an engine."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from edgeattn.engine.embed_cubins import TABLE_MARKER

CREATE = "create RecurrentLinearAttention"
INPUTS = (
    *("input q fp16 2x4x40x64", "input k fp16 2x2x40x64", "input v fp16 2x2x40x64"),
    *("input log_decay fp32 2x2x40x1", "input beta fp32 2x2x40"),
    *("input past_state fp32 2x2x64x64", "input past_normaliser fp32 2x2x64"),
)
OUTPUTS = (
    *("output y fp16 2x4x40x64", "output present_state fp32 2x2x64x64"),
    "output present_normaliser fp32 2x2x64",
)


def test_the_table_is_read_from_the_library_or_its_file(library: Any) -> None:
    table = json.loads(library.drive("table")["table"])
    content = library.path.read_bytes()
    marker = b"\0" + TABLE_MARKER.encode()
    assert content.count(marker) == 1
    start = content.index(marker) + len(marker)
    assert json.loads(content[start : content.index(b"\0", start)]) == table
    assert (table["abi"], table["arch"]) == (1, os.uname().machine)
    assert re.fullmatch(r"1\d\.\d+", table["tensorrt_headers"])
    assert table["triton"] == "3.7.1"
    assert re.fullmatch("[0-9a-f]{64}", table["kernels_sha256"])
    variant = {"dtype": "fp16", "constants": {"BLOCK": 64, "BLOCK_V": 64}, "sm": 120}
    assert {"kernel": "recurrent_linear_attention.decode", **variant} in table["variants"]


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ("delta=int:2", "expected delta and normalise of 0 or 1, but 2 came"),
        ("delta=int:1 normalise=int:1", "the delta rule without normaliser"),
        ("scale=float:-1", "finite scale and epsilon of at least 0, but -1"),
        ("epsilon=float:nan", "finite scale and epsilon of at least 0, but nan"),
        ("epsilon=float:inf", "finite scale and epsilon of at least 0, but inf"),
        ("scale=int:1", "expected attribute scale of RecurrentLinearAttention, but it is of"),
        ("delta=text:yes", "expected attribute delta of RecurrentLinearAttention, but it is of"),
        ("alpha=int:1", "expected attributes of RecurrentLinearAttention, but 'alpha' came"),
    ],
)
def test_bad_attributes_are_refused(library: Any, attributes: str, sentence: str) -> None:
    answers = library.drive(f"{CREATE} {attributes}")
    assert answers["create"] == "failed"
    assert sentence in answers.logged


def test_formats_are_linear_and_dtypes_those_with_kernels(library: Any) -> None:
    def supported(position: int, dtype: str, more: str = "", tensors: Any = INPUTS) -> str:
        command = f"format {position} {dtype} {more}"
        answer: str = library.drive(CREATE, *tensors, *OUTPUTS, command)["format"]
        return answer

    assert [supported(0, dtype) for dtype in ("fp16", "bf16", "fp32", "int8")] == [*"1100"]
    assert [supported(2, dtype) for dtype in ("fp16", "bf16")] == [*"10"]  # as q
    assert [supported(7, dtype) for dtype in ("fp16", "bf16")] == [*"10"]
    assert [supported(3, dtype) for dtype in ("fp32", "fp16")] == [*"10"]
    assert [supported(9, dtype) for dtype in ("fp32", "fp16")] == [*"10"]
    assert supported(0, "fp16", "chw32") == "0"
    assert supported(0, "fp16", tensors=INPUTS[:-1]) == "0"


def test_outputs_have_types_and_states_their_inputs(library: Any) -> None:
    answers = library.drive(CREATE, *INPUTS, *OUTPUTS, "types", "aliases", "configure")
    assert answers["types"] == "0 fp16 fp32 fp32"
    assert answers["aliases"].split() == ["-1", "5", "6"]
    assert answers["configure"] == "0"


def test_a_workspace_that_cannot_be_known_is_none_to_be_had(library: Any) -> None:
    answers = library.drive(CREATE, *INPUTS[1:], *OUTPUTS, "workspace")
    assert int(answers["workspace"]) == 2**64 - 1
    assert "expected 7 inputs, but 6 came" in answers.logged


def test_timings_are_kept_by_kernels_and_attributes(library: Any) -> None:
    answers = library.drive("table", CREATE, "timing", f"{CREATE} delta=int:1", "timing")
    first, second = answers.lines["timing"]
    hashed = json.loads(answers["table"])["kernels_sha256"]
    assert first == f"{hashed} delta=0 normalise=0 scale=0 epsilon=9.99999997e-07"
    assert second == first.replace("delta=0", "delta=1")


@pytest.mark.parametrize("copied", ["clone", "attach", "reload"])
def test_copies_and_engines_keep_the_attributes(library: Any, copied: str) -> None:
    create = f"{CREATE} delta=int:1 scale=float:0.7 epsilon=float:0.1"
    prepared = ("device", *INPUTS, *OUTPUTS)
    answers = library.drive(create, copied, *prepared, "shape", "enqueue", "timing")
    assert (answers[copied], answers["enqueue"]) == ("ok", "0")
    launch = answers.launches[-1].arguments
    assert (launch["delta"], launch["scale"], launch["epsilon"]) == (1, 0.7, 0.1)
    assert "delta=1" in answers["timing"]
