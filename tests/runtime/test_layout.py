"""`Layout`: where tokens lie among the slots of the cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.runtime.layout import Layout


@given(st.integers(1, 3), st.integers(0, 5), st.integers(1, 4))
def test_without_padding_a_mask_says_what_none_says(batch, past, length):
    dense = Layout.dense(batch, past, length)
    told = Layout.of_mask(np.ones((batch, past + length), np.int64), length)
    np.testing.assert_array_equal(told.attention_mask, dense.attention_mask)
    np.testing.assert_array_equal(told.position_ids, dense.position_ids)
    assert dense.position_ids.tolist() == [list(range(past, past + length))] * batch
    assert dense.is_dense()


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.data())
def test_a_token_has_the_place_of_its_row_that_is_next(row, data):
    length = data.draw(st.integers(1, len(row)))
    layout = Layout.of_mask(np.array([row], np.int64), length)
    expected = [sum(row[:i]) for i in range(len(row))]  # tokens before each slot
    for slot in range(len(row) - length, len(row)):
        if row[slot]:
            assert layout.position_ids[0, slot - len(row) + length] == expected[slot]
    assert layout.is_dense() == all(row)


@pytest.mark.parametrize("field", ["attention_mask", "position_ids"])
def test_one_number_more_or_less_is_a_layout_of_its_own(field):
    layout = Layout.dense(2, 3, 2)
    getattr(layout, field)[1, -1] -= 1
    assert not layout.is_dense()
