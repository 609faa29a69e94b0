"""Sizes an engine is built for: by dimension, in the shapes of every input, within the bundle's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeattn.engine.profiles import (
    DecoderProfile,
    Range,
    check_profile,
    decoder_profiles,
    input_shapes,
    with_sizes,
)
from edgeattn.errors import BundleError, EdgeattnError, LoweringError, UsageError

LIMITS = {"context": 1024, "batch": 2}


@given(context=st.integers(1, 5000), batch=st.integers(1, 8), separate=st.booleans())
def test_every_step_of_a_decoder_is_in_some_profile(
    context: int, batch: int, separate: bool
) -> None:
    """A prompt in pieces of 512, then token by token to the end of the context."""
    profiles = decoder_profiles(context, batch, separate=separate)
    pieces = [(done, min(512, context - done)) for done in range(0, context, 512)]
    steps = [(past, 1) for past in {0, context // 2, context - 1}]
    for past, new in pieces + steps:
        assert any(
            p.past.low <= past <= p.past.high and p.length.low <= new <= p.length.high
            for p in profiles
        ), (past, new)
    for profile in (*profiles, check_profile(context, batch)):
        assert profile.batch.sizes == (1, 1, batch)
        for past, new, total in zip(
            profile.past.sizes, profile.length.sizes, profile.total.sizes, strict=True
        ):
            assert past + new == total


def graph(path: Path, **inputs: list[int | str]) -> Path:
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in inputs.items()]
    node = helper.make_node("Identity", [next(iter(inputs))], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    onnx.save(helper.make_model(helper.make_graph([node], "g", values, [output])), path)
    return path


def test_shapes_follow_from_the_names_of_dimensions(tmp_path: Path) -> None:
    """Of a growing cache and of a static one, whose sizes are fixed."""
    profile = DecoderProfile("any", Range(1, 1, 2), Range(1, 1, 8), Range(0, 3, 5))
    model = graph(
        tmp_path / "model.onnx",
        input_ids=["batch_size", "sequence_length"],
        attention_mask=["batch_size", "total_sequence_length"],
        past=["batch_size", 3, "past_sequence_length", 64],
        static=["batch_size", 3, 100, 64],
    )
    assert input_shapes(model, profile) == {
        "input_ids": ((1, 1), (1, 1), (2, 8)),
        "attention_mask": ((1, 1), (1, 4), (2, 13)),
        "past": ((1, 3, 0, 64), (1, 3, 3, 64), (2, 3, 5, 64)),
        "static": ((1, 3, 100, 64), (1, 3, 100, 64), (2, 3, 100, 64)),
    }


def test_a_dimension_of_another_name_is_refused(tmp_path: Path) -> None:
    model = graph(tmp_path / "model.onnx", x=["batch_size", "surprise"])
    with pytest.raises(BundleError, match="x has one named 'surprise'"):
        input_shapes(model, check_profile(16, 1))


@pytest.mark.parametrize(
    ("asked", "prefill", "decode"),
    [
        (["batch_size=1:2:2"], ("1:2:2", "1:512:512"), ("1:2:2", "1:1:1")),
        (["sequence_length=1:64:128"], ("1:1:2", "1:64:128"), ("1:1:2", "1:1:1")),
        (["decode.sequence_length=1:1:4"], ("1:1:2", "1:512:512"), ("1:1:2", "1:1:4")),
        (
            ["prefill.batch_size=1:1:1", "batch_size=2:2:2"],
            ("2:2:2", "1:512:512"),
            ("2:2:2", "1:1:1"),
        ),
    ],
)
def test_a_user_s_sizes_take_the_place_of_ours(
    asked: list[str], prefill: tuple[str, str], decode: tuple[str, str]
) -> None:
    profiles = with_sizes(decoder_profiles(**LIMITS, separate=True), asked, **LIMITS)
    found = [(str(profile.batch), str(profile.length)) for profile in profiles]
    assert found == [prefill, decode]


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ("batch_size", UsageError, "'batch_size' was given: write for example"),
        ("batch_size=1:2", UsageError, "'batch_size=1:2' was given"),
        ("batch_size=1:-1:2", UsageError, "was given"),
        ("batch_size=2:1:2", UsageError, "they are 2:1:2"),
        ("rows=1:1:1", UsageError, "batch_size"),
        ("input_ids=1:1:1", UsageError, "dimension of the graph's inputs"),
        ("warmup.batch_size=1:1:1", UsageError, "prefill"),
        ("batch_size=1:1:3", LoweringError, "1 to 2 rows in profile prefill.* it has 1:1:3"),
        ("batch_size=0:1:1", LoweringError, "1 to 2 rows"),
        ("sequence_length=1:1:1025", LoweringError, "1 to 1024 new tokens"),
        ("sequence_length=0:1:1", LoweringError, "1 to 1024 new tokens"),
        ("past_sequence_length=0:0:1024", LoweringError, "0 to 1023 tokens in the cache"),
    ],
)
def test_sizes_the_bundle_does_not_take(asked: str, error: type[EdgeattnError], words: str) -> None:
    with pytest.raises(error, match=words):
        with_sizes(decoder_profiles(**LIMITS, separate=True), [asked], **LIMITS)


@pytest.mark.parametrize("target", ["jetson-orin", "jetson-orin@jetpack6.2", "rtx-4090", "cpu"])
def test_our_graphs_name_their_dimensions(export_tiny: Callable[..., Path], target: str) -> None:
    model = export_tiny(target) / "model.onnx"
    shapes = input_shapes(model, check_profile(256, 3))
    declared = {v.name: v.type.tensor_type.shape.dim for v in onnx.load(model).graph.input}
    assert shapes.keys() == declared.keys()
    for name, triple in shapes.items():
        for place, dimension in enumerate(declared[name]):
            sizes = {shape[place] for shape in triple}
            assert dimension.HasField("dim_value") == (
                len(sizes) == 1 and not re.search("length|batch", dimension.dim_param)
            )
