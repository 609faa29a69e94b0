"""Packed caches against a loop, and layers with a variant against softmax attention."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeattn.models.packed_keys import PackedKeys, delayed, in_time, pack_keys


def step(past: list[int], new: list[int], padding: int, window: int | None) -> PackedKeys:
    """The keys of a step, of rows with such numbers of past and new tokens."""
    places, length = max(past) + padding, max(1, *new)
    mask = torch.zeros(len(past), places + length, dtype=torch.int64)
    for row, (before, behind) in enumerate(zip(past, new, strict=True)):
        mask[row, :before] = 1
        mask[row, places : places + behind] = 1
    return pack_keys(mask, length, window)


ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 2), st.sampled_from([None, 1, 3]))
def test_cache_and_masks_by_a_loop(
    rows: list[tuple[int, int]], padding: int, window: int | None
) -> None:
    past, new = ([row[i] for row in rows] for i in (0, 1))
    keys = step(past, new, padding, window)
    batch, _, length, total = keys.mask.shape
    old = torch.arange(batch * 2 * (total - length) * 2.0).reshape(batch, 2, total - length, 2)
    fresh = -1 - torch.arange(batch * 2 * length * 2.0).reshape(batch, 2, length, 2)
    joined = keys.join(old, fresh)
    for row, (before, behind) in enumerate(rows):
        assert int(keys.count[row]) == before + behind
        wanted = torch.cat((old[row, :, :before], fresh[row, :, :behind]), dim=1)
        assert torch.equal(joined[row, :, : before + behind], wanted)
        for token in range(behind):
            own = before + token
            first = 0 if window is None else max(0, own - window + 1)
            seen = torch.zeros(total, dtype=torch.bool)
            seen[first : own + 1] = True
            assert torch.equal(keys.mask[row, 0, token], seen)
    assert keys.mask.any(-1).all()  # no row sees nothing, of padding neither


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 2), st.booleans())
def test_rows_stand_where_operators_expect_them(
    rows: list[tuple[int, int]], padding: int, from_front: bool
) -> None:
    """Row i of T is at position count - T + i, or, from the front, at i if that is negative."""
    past, new = ([row[i] for row in rows] for i in (0, 1))
    keys = step(past, new, padding, None)
    length = keys.mask.shape[2]
    queries = torch.arange(float(len(rows) * length)).reshape(len(rows), 1, length, 1)
    delay = torch.minimum(keys.past, keys.padding) if from_front else keys.padding
    later = delayed(queries, delay)
    back = in_time(later, delay)
    for row, (before, behind) in enumerate(rows):
        first = before + behind - length
        first = max(first, 0) if from_front else first
        for token in range(behind):
            assert torch.equal(later[row, :, before + token - first], queries[row, :, token])
            assert torch.equal(back[row, :, token], queries[row, :, token])


def test_a_cache_slot_by_slot_is_another() -> None:
    """Joined by concatenation, a row's keys would have a gap where its padding was."""
    keys = step([3, 1], [1, 1], 0, None)
    old: Tensor = torch.zeros(2, 1, 3, 1)
    fresh = torch.ones(2, 1, 1, 1)
    assert keys.join(old, fresh).flatten(1).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
