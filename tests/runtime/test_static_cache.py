"""A trained model with a static cache: constant memory, and the logits of the growing cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeattn.errors import RuntimeInputError
from edgeattn.runtime import Session, generate

CONTEXT, BUCKET = 512, 128
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def static(export_stories: Callable[..., Path]) -> Session:
    return Session.open(export_stories(kv_cache="static", context=CONTEXT), exact=True)


@pytest.fixture(scope="module")
def ids(stories: Session, story: str) -> np.ndarray:
    """A generated story of the whole context, `[1, CONTEXT]`."""
    prompt = stories.text.encode(story)
    tokens = generate(
        stories, prompt, max_new_tokens=CONTEXT - len(prompt), temperature=0.8, seed=1
    ).token_ids
    row = np.resize(np.array([*prompt, *tokens], np.int64), CONTEXT)
    return row[None]


def test_every_step_of_a_whole_context(static: Session, stories: Session, ids: np.ndarray) -> None:
    """512 steps: logits of the growing cache at each, memory constant within each bucket."""
    per_token = stories.cache_bytes(stories.run(ids[:, :1]).state)
    ours = theirs = None
    for place in range(CONTEXT):
        found = static.run(ids[:, place : place + 1], ours)
        expected = stories.run(ids[:, place : place + 1], theirs)
        ours, theirs = found.state, expected.state
        np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
        bucket = -(-(place + 1) // BUCKET) * BUCKET
        assert static.cache_bytes(ours) == per_token * bucket
        assert stories.cache_bytes(theirs) == per_token * (place + 1)
    with pytest.raises(RuntimeInputError, match="at most 512 tokens"):
        static.run([[1]], ours)


def test_memory_is_constant_from_the_first_step_on(
    static: Session, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole capacity at once: 512 steps in one and the same memory."""
    monkeypatch.setattr("edgeattn.runtime.in_place._BUCKET", CONTEXT)
    state, places = None, set()
    for place in range(CONTEXT):
        state = static.run(ids[:, place : place + 1], state).state
        places.add(tuple(array.ctypes.data for array in state._cache.tensors().values()))
    assert len(places) == 1
    shape = static.bundle.shape
    assert static.cache_bytes(state) == 2 * shape.num_layers * shape.kv_size * CONTEXT * 4


def test_ragged_rows_that_pause_branch_and_continue(
    static: Session, stories: Session, ids: np.ndarray
) -> None:
    rows = np.stack([ids[0, :150], ids[0, 200:350]])
    mask = np.ones_like(rows)
    mask[1, 90:] = 0
    found = []
    for session in (static, stories):
        first = session.run(rows, attention_mask=mask)
        pause = session.run([[9], [0]], first.state, attention_mask=[[1], [0]])
        ahead = session.run(ids[0, :300].reshape(2, 150), pause.state)
        other = session.run([[30, 31, 32], [33, 34, 0]], pause.state, attention_mask=TWO)
        last = session.run([[35], [36]], other.state)
        found.append([first.logits[mask == 1], pause.logits[0], ahead.logits])
        found[-1] += [other.logits[TWO == 1], last.logits]
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


TWO = np.array([[1, 1, 1], [1, 1, 0]])


def test_a_text(static: Session, stories: Session, story: str) -> None:
    ours = generate(static, story, max_new_tokens=200)
    assert ours.text == generate(stories, story, max_new_tokens=200).text
    assert ours.cache_bytes == 2 * BUCKET * static.bundle.shape.num_layers * 2 * 32 * 4
