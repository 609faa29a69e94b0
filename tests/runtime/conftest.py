"""Bundles of a small trained model, sessions on them, and bundles that somebody changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeattn.runtime import Session

STORY = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="session")
def story() -> str:
    return STORY


@pytest.fixture(scope="session")
def stories_bundle(export_stories) -> Path:
    """fp32, logits of every position."""
    return export_stories()


@pytest.fixture(scope="session")
def stories(stories_bundle) -> Session:
    return Session.open(stories_bundle, exact=True)


@pytest.fixture(scope="session")
def stories_hf(stories260k):
    """The same model in transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(stories260k).eval()


@pytest.fixture
def changed_bundle(changed, stories_bundle) -> Callable[..., Path]:
    """A function that copies the bundle with other files and another lowering, hashes kept true."""
    manifest = json.loads((stories_bundle / "manifest.json").read_text())

    def change(files: dict[str, bytes | None] | None = None, **lowering: Any) -> Path:
        return changed(stories_bundle, files, lowering={**manifest["lowering"], **lowering})

    return change
