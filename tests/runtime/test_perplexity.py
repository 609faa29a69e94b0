"""Perplexity against transformers' own loss, and texts that are too short."""

from __future__ import annotations

import math

import pytest

from edgeattn.errors import BundleError, RuntimeInputError, UsageError
from edgeattn.runtime import Session, perplexity


@pytest.fixture(scope="session")
def novel(shared_dir) -> str:
    path = shared_dir / "data" / "austen" / "pride_and_prejudice.txt"
    if not path.is_file():
        pytest.skip("no pride_and_prejudice.txt in shared/data/austen")
    return path.read_text("utf-8")


def test_equals_the_loss_of_transformers(stories, stories_hf, novel):
    import torch

    done = []
    found = perplexity(
        stories, novel, windows=3, length=100, progress=lambda *step: done.append(step)
    )
    ids = stories.text.encode(novel[2000:], add_special_tokens=False)[:300]
    windows = torch.tensor(ids).view(3, 100)
    with torch.no_grad():
        loss = stories_hf(windows, labels=windows).loss.item()
    assert found.nll == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found.windows, found.length, found.tokens) == (3, 100, 297)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert found.to_dict()["perplexity"] == found.perplexity


def test_the_default_protocol(stories, novel):
    assert perplexity(stories, novel).tokens == 12 * 511


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 tokens there, enough for 0 windows"),
        ("word " * 100, "enough for 0 windows"),
        ("x" * 2000, "0 tokens there"),
        ("Lily had a ball. " * 400, "enough for [1-9] windows"),
    ],
)
def test_short_texts_are_refused(stories, text, words):
    with pytest.raises(RuntimeInputError, match=words):
        perplexity(stories, text)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"windows": 0}, "number of windows of at least 1"),
        ({"length": 1}, "length of a window of at least 2"),
        ({"skip_characters": -1}, "at least 0"),
    ],
)
def test_wrong_numbers_are_refused(stories, numbers, words):
    with pytest.raises(UsageError, match=words):
        perplexity(stories, "text", **numbers)


def test_windows_longer_than_the_context(stories):
    with pytest.raises(RuntimeInputError, match=r"at most 512 tokens.*length is 513"):
        perplexity(stories, "text", length=513)


def test_a_graph_with_the_last_logits_only(changed_bundle):
    with pytest.raises(BundleError, match="last position only"):
        perplexity(Session.open(changed_bundle(logits="last")), "text")


@pytest.mark.slow
def test_smollm2_on_pride_and_prejudice(smollm2_gguf, novel, tmp_path):
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    export(smollm2_gguf, Recipe("cpu"), tmp_path / "bundle", verify=False)
    found = perplexity(Session.open(tmp_path / "bundle", exact=True), novel)
    assert found.perplexity == pytest.approx(24.907, abs=0.02)
