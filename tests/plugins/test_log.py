"""One library tells the logger of every TensorRT, whichever headers it was compiled against."""

from __future__ import annotations

from typing import Any

import pytest

WRONG = "create RecurrentLinearAttention delta=int:2"
SENTENCE = "edgeattn: RecurrentLinearAttention: "


@pytest.mark.parametrize(
    ("layout", "version"),
    [(10, 100300), (10, 101401), (11, 110000), (11, 110100), (11, 10600), (11, 10701)],
)
def test_the_logger_of_a_known_tensorrt(library: Any, layout: int, version: int) -> None:
    """Not all have the layout of the headers that the library is compiled against."""
    answers = library.drive(WRONG, tensorrt=(layout, version))
    assert answers["create"] == "failed"
    assert answers.logged.startswith(f"1 {SENTENCE}")
    assert not answers.stderr


@pytest.mark.parametrize("layout", [10, 11])
@pytest.mark.parametrize("version", [0, 90300, 10500])
def test_the_logger_of_another_is_left_alone(library: Any, layout: int, version: int) -> None:
    answers = library.drive(WRONG, tensorrt=(layout, version))
    assert answers["create"] == "failed"
    assert not answers.logged
    assert answers.stderr.startswith(SENTENCE)
