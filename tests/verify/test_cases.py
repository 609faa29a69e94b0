"""The inputs every bundle is proven with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.verify.cases import build_cases


def test_prefill_decoding_a_ragged_batch_and_a_continued_text() -> None:
    sequence, ragged, continued = build_cases(272, 256)
    assert len(sequence.steps) == 1 + 16
    assert [s.input_ids.shape for s in sequence.steps] == [(1, 17), *[(1, 1)] * 16]
    assert [s.input_ids.shape[0] for s in ragged.steps] == [2, 2, 2]
    assert ragged.steps[0].attention_mask.sum(axis=1).tolist() == [11, 6]
    assert [s.input_ids.shape for s in continued.steps] == [(1, 7), (1, 5), (1, 1)]


@given(st.integers(1, 300), st.integers(2, 500))
def test_cases_fit_the_model(context: int, vocab_size: int) -> None:
    for case in build_cases(vocab_size, context):
        total = 0
        for step in case.steps:
            total += step.input_ids.shape[1]
            assert step.attention_mask.shape == (step.input_ids.shape[0], total)
            assert step.position_ids.shape == step.input_ids.shape
            assert 0 <= step.input_ids.min() <= step.input_ids.max() < vocab_size
            assert 0 <= step.position_ids.min() <= step.position_ids.max() < context
        assert total <= context


def test_positions_count_tokens_and_not_places() -> None:
    _, ragged, _ = build_cases(272, 256)
    assert ragged.steps[1].position_ids.ravel().tolist() == [11, 6]
    assert ragged.steps[2].position_ids.ravel().tolist() == [12, 7]


@pytest.mark.parametrize("tokens", [[5], [1, 2, 3], list(range(200))])
def test_a_texts_tokens_are_used(tokens: list[int]) -> None:
    first = build_cases(272, 256, tokens)[0].steps[0].input_ids.ravel()
    assert first.tolist() == np.resize(tokens, 17).tolist()


def test_the_same_cases_every_time() -> None:
    one, two = build_cases(272, 256), build_cases(272, 256)
    for a, b in zip(one, two, strict=True):
        for left, right in zip(a.steps, b.steps, strict=True):
            np.testing.assert_array_equal(left.input_ids, right.input_ids)
