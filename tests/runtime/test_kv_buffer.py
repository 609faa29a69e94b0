"""Caches that are written in place, against the same model with a cache that grows by copying.

Two graphs do that: GroupQueryAttention, and TensorScatter into a static cache.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgeattn.runtime import Session

ROW = [7, 81, 3, 200, 14, 99, 5, 41, 260]
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=["shared-buffer", "static"])
def pair(
    request: pytest.FixtureRequest, export_tiny: Callable[..., Path]
) -> tuple[Session, Session]:
    """The same weights: cache in place, and joined."""
    found, asked = [], {"kv_cache": "static"} if request.param == "static" else {}
    for target, form, fields in (
        ("cpu", request.param, asked),
        ("jetson-orin@jetpack6.2", "concat", {}),
    ):
        session = Session.open(export_tiny(target, dtype="fp32", **fields), exact=True)
        assert session.bundle.manifest.lowering["kv_cache"] == form
        found.append(session)
    return found[0], found[1]


def test_every_way_to_cut_a_text_gives_the_same(pair: tuple[Session, Session]) -> None:
    ours, joined = pair
    expected = joined.run([ROW]).logits[0]
    for cuts in ([9], [1, 8], [4, 1, 4], [5, 1, 1, 1, 1], [1] * 9):
        state, logits, begin = None, [], 0
        for length in cuts:
            step = ours.run([ROW[begin : begin + length]], state)
            state, begin = step.state, begin + length
            logits.append(step.logits[0])
        np.testing.assert_allclose(np.concatenate(logits), expected, atol=TOLERANCE)


def test_ragged_rows_that_pause_and_continue(pair: tuple[Session, Session]) -> None:
    """Padding after the prompt, a step for one row alone, then several tokens for both."""
    ids, mask = np.array([ROW, [*ROW[:4], 0, 0, 0, 0, 0]]), np.ones((2, 9), np.int64)
    mask[1, 4:] = 0
    steps = []
    for session in pair:
        first = session.run(ids, attention_mask=mask)
        pause = session.run([[9], [0]], first.state, attention_mask=[[1], [0]])
        again = session.run([[30, 31, 32], [33, 34, 0]], pause.state, attention_mask=TWO)
        last = session.run([[35], [36]], again.state)
        steps.append((first, pause, again, last))
    valid = (mask == 1, np.array([[True], [False]]), TWO == 1, np.ones((2, 1), bool))
    for found, expected, places in zip(*steps, valid, strict=True):
        difference = np.abs(found.logits[places] - expected.logits[places])
        assert difference.max() < TOLERANCE


TWO = np.array([[1, 1, 1], [1, 1, 0]])


def test_an_older_state_is_copied_and_stays_valid(pair: tuple[Session, Session]) -> None:
    ours, joined = pair
    start = ours.run([ROW])
    left, right = ours.run([[1]], start.state), ours.run([[2]], start.state)
    reference = joined.run([ROW])
    for token, state in ((1, left.state), (2, right.state), (1, left.state)):
        branch = joined.run([[token]], reference.state)
        expected = joined.run([[50]], branch.state).logits
        np.testing.assert_allclose(ours.run([[50]], state).logits, expected, atol=TOLERANCE)


def test_a_buffer_grows_up_to_the_context(pair: tuple[Session, Session]) -> None:
    ours, joined = pair
    shape = ours.bundle.shape
    per_token = shape.num_layers * 2 * shape.kv_size * 4
    ids = np.random.default_rng(0).integers(0, 272, (1, 256))
    state, capacities = None, []
    for begin, end in ((0, 9), (9, 100), (100, 101), (101, 255), (255, 256)):
        step = ours.run(ids[:, begin:end], state)
        state = step.state
        capacities.append(ours.cache_bytes(state) // per_token)
    is_static = ours.bundle.manifest.lowering["kv_cache"] == "static"
    assert capacities == ([128, 128, 128, 256, 256] if is_static else [80, 224, 224, 256, 256])
    np.testing.assert_allclose(step.logits[0], joined.run(ids).logits[0, -1:], atol=TOLERANCE)


def test_threads_branch_off_one_state(pair: tuple[Session, Session]) -> None:
    ours, _ = pair
    start = ours.run([ROW]).state
    expected = [ours.run([[token]], start).logits for token in range(16)]

    def work(token: int) -> np.ndarray:
        step = ours.run([[token]], start)
        ours.run([[3]], step.state)
        return step.logits

    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(work, range(16)), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_a_buffer_goes_with_its_last_state(pair: tuple[Session, Session]) -> None:
    """At once, not when Python next searches for cycles: a long text leaves many behind."""
    ours, _ = pair
    gc.disable()
    try:
        state = ours.run([ROW]).state
        buffer = weakref.ref(state._cache.buffer)
        state = ours.run([[1] * 200], state).state
        assert buffer() is None
        buffer = weakref.ref(state._cache.buffer)
        del state
        assert buffer() is None
    finally:
        gc.enable()


def test_one_row_pauses_within_several_tokens(pair: tuple[Session, Session]) -> None:
    """Two places of padding behind one token: the row goes on behind its token."""
    steps = []
    for session in pair:
        first = session.run([ROW])
        padded = session.run([[30, 0, 0]], first.state, attention_mask=[[1, 0, 0]])
        steps.append((padded.logits[0, 0], session.run([[31]], padded.state).logits[0, 0]))
    np.testing.assert_allclose(*steps, atol=TOLERANCE)


def test_logits_stay_as_long_as_a_view_of_them_is_held(pair: tuple[Session, Session]) -> None:
    """Their memory is used again, but not while somebody looks at it."""
    ours, joined = pair
    state, reference = ours.run([ROW]).state, joined.run([ROW]).state
    held, expected = [], []
    for token in (1, 2, 3, 4):
        step, wanted = ours.run([[token]], state), joined.run([[token]], reference)
        state, reference = step.state, wanted.state
        held.append(step.logits[0, -1][1:].reshape(-1, 1))
        expected.append(wanted.logits[0, -1, 1:, None])
        del step
    np.testing.assert_allclose(held, expected, atol=TOLERANCE)


def test_the_memory_of_logits_is_used_again(pair: tuple[Session, Session]) -> None:
    ours, _ = pair
    state, places = ours.run([ROW]).state, set()
    for token in range(6):
        step = ours.run([[token]], state)
        state = step.state
        places.add(step.logits.ctypes.data)
    assert len(places) == 2
