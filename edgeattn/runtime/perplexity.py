"""Perplexity of a text: how surprised the exported model is by each of its tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.errors import BundleError, RuntimeInputError, UsageError
from edgeattn.runtime.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows of logits turned to fp64 at once: 64 x 150 thousand entries are 77 MB.
_ROWS = 64
# Windows that are decoded side by side.
_DECODED_ROWS = 12


@dataclass(frozen=True)
class Evaluation:
    """Perplexity and how it was measured.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood per predicted token, in nats.
        windows: stretches of text that were read, each from an empty cache.
        length: tokens of each.
        tokens: tokens that were predicted: windows x (length - 1).
        seconds: for running the model.
    """

    perplexity: float
    nll: float
    windows: int
    length: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def perplexity(
    session: Session,
    text: str,
    *,
    windows: int = 12,
    length: int = 512,
    skip_characters: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures perplexity on consecutive windows of a text.

    The text after `skip_characters` is tokenised without special tokens and cut into windows; the
    tokens 2 to `length` of each are predicted from those before them in the window. A bundle that
    leaves out heads while decoding reads token by token, all others a window at once. Open the
    session with `exact=True` to measure the weights rather than ONNX Runtime's fast int8 mode.

    Args:
        session: the model.
        text: long enough for all windows.
        windows: how many.
        length: tokens of each.
        skip_characters: left out at the start, where books have titles and licences.
        progress: called with (windows done, windows) after each.

    Raises:
        RuntimeInputError: the text is too short, or the windows exceed the context.
        UsageError: a number is too small.
        BundleError: no tokenizer, or a graph that yields the logits of the last position only.
    """
    _check_session(session, length)
    rows = consecutive_windows(
        lambda part: session.text.encode(part, add_special_tokens=False),
        text,
        windows=windows,
        length=length,
        skip_characters=skip_characters,
    )
    started = time.perf_counter()
    at_once = _DECODED_ROWS if session.is_sparse_in_decoding else 1
    total = 0.0
    for first in range(0, windows, at_once):
        some = rows[first : first + at_once]
        if session.is_sparse_in_decoding:
            total += _decoded_negative_log_likelihood(session, some)
        else:
            total += _negative_log_likelihood(session.run(some).logits[0], some[0])
        if progress:
            progress(first + len(some), windows)
    tokens = windows * (length - 1)
    nll = total / tokens
    return Evaluation(
        perplexity=float(np.exp(np.float64(nll))),
        nll=nll,
        windows=windows,
        length=length,
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def consecutive_windows(
    encode: Callable[[str], Sequence[int]],
    text: str,
    *,
    windows: int,
    length: int,
    skip_characters: int,
    todo: str = "take a longer text, or fewer or shorter windows",
) -> NDArray[np.int64]:
    """The first windows of a text, one after the other, `[windows, length]`.

    Args:
        encode: from text to token ids.
        text: long enough for all windows.
        windows: how many.
        length: tokens of each.
        skip_characters: left out at the start.
        todo: what a refusal of a short text advises.

    Raises:
        RuntimeInputError: the text is too short.
        UsageError: a number is too small.
    """
    _check_numbers(windows, length, skip_characters)
    ids = encode(text[skip_characters:])
    if len(ids) < windows * length:
        raise RuntimeInputError(
            expected=f"a text of {windows} windows of {length} tokens "
            f"after its first {skip_characters} characters",
            came=f"it has {len(ids)} tokens there, enough for {len(ids) // length} windows",
            todo=todo,
        )
    return np.array(ids[: windows * length], np.int64).reshape(windows, length)


def _negative_log_likelihood(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> float:
    """Sum over the tokens after the first; logits `[T, V]`, ids `[T]`."""
    parts = []
    for first in range(0, len(ids) - 1, _ROWS):
        rows = logits[first : min(first + _ROWS, len(ids) - 1)].astype(np.float64)
        targets = ids[first + 1 : first + 1 + len(rows)]
        chosen = rows[np.arange(len(rows)), targets]
        highest = rows.max(axis=1)
        rows -= highest[:, None]
        np.exp(rows, out=rows)
        parts.append(float((highest + np.log(rows.sum(axis=1)) - chosen).sum()))
    return math.fsum(parts)


def _decoded_negative_log_likelihood(session: Session, rows: NDArray[np.int64]) -> float:
    """Sum over the tokens after the first of each row `[N, L]`, read one by one.

    So that heads are left out as they are in generating: several tokens at once have all of them.
    """
    parts, state = [], None
    for place in range(rows.shape[1] - 1):
        step = session.run(rows[:, place : place + 1], state)
        state = step.state
        pairs = zip(step.logits, rows[:, place : place + 2], strict=True)
        parts += [_negative_log_likelihood(logits, ids) for logits, ids in pairs]
    return math.fsum(parts)


def _check_numbers(windows: int, length: int, skip_characters: int) -> None:
    for name, value, least in (
        ("number of windows", windows, 1),
        ("length of a window", length, 2),
        ("number of characters to skip", skip_characters, 0),
    ):
        if value < least:
            raise UsageError(
                expected=f"a {name} of at least {least}", came=f"it is {value}", todo="give more"
            )


def _check_session(session: Session, length: int) -> None:
    if session.last_logits_only:
        raise BundleError(
            expected="a bundle that yields the logits of every position",
            came="this one was exported with those of the last position only",
            todo='export it with logits = "all" to measure perplexity',
        )
    if length > session.context:
        raise RuntimeInputError(
            expected=f"windows of at most {session.context} tokens, the context of the bundle",
            came=f"the length is {length}",
            todo="give shorter windows",
        )
