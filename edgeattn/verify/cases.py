"""What is run to compare two implementations.

Prefill and teacher-forced decoding, a ragged batch, and several tokens at once after a past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import CheckpointError

PREFILL_TOKENS = 17
DECODE_STEPS = 16
_TEXT = (
    "A bridge is proven by the load it carries, and a model by the tokens it predicts: "
    "the same numbers must come out of every runtime, on 2 cores or 2048, or one is wrong."
)
RAGGED_LENGTHS = (11, 6)
RAGGED_STEPS = 2
# Where the median token of a row decides, more than its prefill has.
MANY_RAGGED_STEPS = max(RAGGED_LENGTHS) + 1
# Where the steps of a text that comes in pieces end.
CONTINUED_ENDS = (7, 12, 13)


@dataclass(frozen=True)
class StepInputs:
    """Inputs of one forward pass, without the cache.

    Attributes:
        input_ids: `[B, T]` int64.
        attention_mask: `[B, P + T]` int64, 1 at valid places.
        position_ids: `[B, T]` int64.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    position_ids: NDArray[np.int64]

    @property
    def new_mask(self) -> NDArray[np.bool_]:
        """`[B, T]`: which of the new tokens are no padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].astype(bool)


@dataclass(frozen=True)
class Case:
    """A prefill and the decode steps after it; each implementation carries its own cache."""

    name: str
    steps: tuple[StepInputs, ...]


def build_cases(
    vocab_size: int,
    context: int,
    tokens: Sequence[int] | None = None,
    *,
    exact: int = 0,
    ragged_steps: int = RAGGED_STEPS,
) -> tuple[Case, ...]:
    """The cases every bundle is verified with.

    Args:
        vocab_size: ids are below it.
        context: most tokens of a sequence; shorter contexts get shorter cases.
        tokens: ids of a text, repeated as needed; without them ids are drawn with a fixed seed.
        exact: keys that polynomial attention treats exactly, so that the sequence goes beyond.
        ragged_steps: decode steps of the ragged case, at most.
    """
    half = max(1, context // 2)
    prefill = min(PREFILL_TOKENS + exact, max(half, context - DECODE_STEPS) if exact else half)
    steps = min(DECODE_STEPS, context - prefill)
    ragged_steps = min(ragged_steps, max(RAGGED_STEPS, context - max(RAGGED_LENGTHS)))
    ids = _token_ids(vocab_size, prefill + steps + sum(RAGGED_LENGTHS) + 2 * ragged_steps, tokens)
    sequence, rest = ids[: prefill + steps], ids[prefill + steps :]
    ends = range(prefill, prefill + steps + 1)
    cases = [_case("sequence", sequence[None, :], np.array([prefill]), ends)]
    if max(RAGGED_LENGTHS) + RAGGED_STEPS <= context:
        cases.append(_ragged_case(rest, ragged_steps))
    if CONTINUED_ENDS[-1] <= context:
        row = rest[None, : CONTINUED_ENDS[-1]]
        cases.append(_case("continued", row, np.array([CONTINUED_ENDS[0]]), CONTINUED_ENDS))
    return tuple(cases)


def text_tokens(tokenizer_json: bytes | None, vocab_size: int) -> list[int] | None:
    """Ids of the text the proof runs, None without a tokenizer.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: ids beyond the embedding are left out.

    Raises:
        CheckpointError: the tokenizers library does not read the file.
    """
    if tokenizer_json is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise CheckpointError(
            expected="a tokenizer.json that the tokenizers library reads",
            came=str(error),
            todo="repair the checkpoint's tokenizer.json or remove it",
        ) from error
    ids: list[int] = tokenizer.encode(_TEXT, add_special_tokens=False).ids
    return [i for i in ids if i < vocab_size] or None


def _token_ids(vocab_size: int, count: int, tokens: Sequence[int] | None) -> NDArray[np.int64]:
    if tokens:
        return np.resize(np.asarray(tokens, dtype=np.int64), count)
    return np.random.default_rng(0).integers(0, vocab_size, count, dtype=np.int64)


def _ragged_case(ids: NDArray[np.int64], steps: int) -> Case:
    """Two rows of different length, padded on the right; then both grow by a token per step."""
    longest, rows = max(RAGGED_LENGTHS), []
    for row, length in enumerate(RAGGED_LENGTHS):
        # A padding id that also occurs as a token: an implementation may not tell them by value.
        start = sum(RAGGED_LENGTHS[:row]) + row * steps
        own = ids[start : start + length + steps]
        padding = np.full(longest - length, ids[0])
        rows.append(np.concatenate((own[:length], padding, own[length:])))
    ends = range(longest, longest + steps + 1)
    return _case("ragged", np.stack(rows), np.array(RAGGED_LENGTHS), ends)


def _case(
    name: str, ids: NDArray[np.int64], lengths: NDArray[np.int64], ends: Sequence[int]
) -> Case:
    """Splits `ids` `[B, places]` into steps.

    Args:
        name: of the case.
        ids: tokens, rows shorter than the longest padded on the right of the prefill.
        lengths: `[B]` valid tokens of each row's prefill.
        ends: where each step ends, the prefill's first.
    """
    prefill = ends[0]
    mask = np.ones_like(ids)
    mask[:, :prefill] = np.arange(prefill) < lengths[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    steps = []
    for begin, end in zip((0, *ends[:-1]), ends, strict=True):
        new = slice(begin, end)
        steps.append(StepInputs(ids[:, new], mask[:, :end], positions[:, new]))
    return Case(name, tuple(steps))
