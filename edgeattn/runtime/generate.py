"""`generate` and `stream`: a prompt in, tokens and text out as they are chosen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeattn.bundle.bundle import TOKENIZER
from edgeattn.errors import UsageError
from edgeattn.runtime.prompt import check_token_ids, encode_prompt
from edgeattn.runtime.sampling import Sampling
from edgeattn.runtime.session import Session, State, Step
from edgeattn.runtime.text import TextStream

FinishReason = Literal["stop", "length", "context", "interrupted"]

# A long prompt goes in pieces: a graph that keeps the logits of all positions would otherwise need
# memory for prompt x vocabulary numbers.
PREFILL_PIECE = 512


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        id: its id.
        text: what it adds to the text, in whole characters. Where several tokens make one
            character, the last of them carries it, and they come together.
    """

    id: int
    text: str


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text: the continuation, without the prompt and without special tokens.
        token_ids: its tokens, without the one that ended it.
        prompt_tokens: tokens of the prompt.
        finish_reason: "stop" (a stop token), "length" (as many as asked for), "context" (no room
            left), or "interrupted" (Ctrl-C, or a stream not read to its end).
        prefill_seconds: for reading the prompt and choosing the first token.
        decode_steps: tokens chosen after that.
        decode_seconds: for running the model and choosing them, without the reader's own time.
        cache_bytes: memory that keys and values take at the end.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    prefill_seconds: float
    decode_steps: int
    decode_seconds: float
    cache_bytes: int

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Speed of reading the prompt, None when it was not read."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Speed of generating, None when there was no step after the prompt."""
        return self.decode_steps / self.decode_seconds if self.decode_steps else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            **asdict(self),
            "token_ids": list(self.token_ids),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def generate(
    session: Session,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    chat: bool = False,
    on_token: Callable[[Token], None] | None = None,
) -> Generation:
    """Continues a prompt.

    Ctrl-C ends it early with what was generated so far.

    Args:
        session: the model.
        prompt: a text, or token ids.
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token each time.
        top_k: most candidates per token; 0 is all.
        top_p: candidates together reach this probability; 1 is all.
        seed: the same seed gives the same text.
        stop_tokens: ids that end it, besides the bundle's own.
        chat: put the prompt through the chat template, as a user's message.
        on_token: called with each token; the texts join to `Generation.text`.

    Raises:
        RuntimeInputError: an empty prompt, one too long for the context, or ids out of range.
        UsageError: a number outside its range, or `chat` with token ids.
        BundleError: no tokenizer or chat template where one is needed.
    """
    tokens = stream(
        session,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=stop_tokens,
        chat=chat,
    )
    with contextlib.suppress(KeyboardInterrupt):
        for token in tokens:
            if on_token is not None:
                on_token(token)
    return tokens.result()


def stream(
    session: Session,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    chat: bool = False,
) -> TokenStream:
    """As `generate`, as an iterator of tokens; the model runs as they are asked for.

    Raises:
        RuntimeInputError: as `generate`, at once; unfit logits, while it is read.
        UsageError: as `generate`.
        BundleError: as `generate`.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UsageError(
            expected="at least 1 token to generate",
            came=f"it is {max_new_tokens}",
            todo="give more",
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompt_ids = encode_prompt(session, prompt, chat=chat)
    stops = frozenset((*session.eos_token_ids, *check_token_ids(session, stop_tokens)))
    return TokenStream(session, prompt_ids, sampling, max_new_tokens, stops)


class TokenStream(Iterator[Token]):
    """The tokens of one generation; made by `stream`."""

    def __init__(
        self,
        session: Session,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stops: frozenset[int],
    ) -> None:
        self._session, self._sampling, self._stops = session, sampling, stops
        self._prompt_ids, self._max_new_tokens = prompt_ids, max_new_tokens
        has_text = session.bundle.file(TOKENIZER) is not None
        self._text: TextStream | None = session.text.stream(prompt_ids) if has_text else None
        self._state: State | None = None
        self._new_id = np.empty((1, 1), np.int64)  # what a decode step reads
        self._held: list[int] = []
        self._given: list[Token] = []
        self._finish_reason: FinishReason = "interrupted"
        self._prefill_seconds = self._decode_seconds = 0.0
        self._decode_steps = 0
        self._tokens = self._generate()

    def __next__(self) -> Token:
        return next(self._tokens)

    def result(self) -> Generation:
        """What was generated so far."""
        return Generation(
            text="".join(token.text for token in self._given),
            token_ids=tuple(token.id for token in self._given),
            prompt_tokens=len(self._prompt_ids),
            finish_reason=self._finish_reason,
            prefill_seconds=self._prefill_seconds,
            decode_steps=self._decode_steps,
            decode_seconds=self._decode_seconds,
            cache_bytes=self._session.cache_bytes(self._state) if self._state else 0,
        )

    def _generate(self) -> Iterator[Token]:
        token_id = self._prefill()
        for count in range(1, self._max_new_tokens + 1):
            if token_id in self._stops:
                self._finish_reason = "stop"
                break
            for token in self._give(token_id):
                self._given.append(token)
                yield token
            if count == self._max_new_tokens:
                self._finish_reason = "length"
            elif self._state is not None and self._state.length == self._session.context:
                self._finish_reason = "context"
                break
            else:
                token_id = self._decode(token_id, count)
        for token in self._give_rest():
            self._given.append(token)
            yield token

    def _prefill(self) -> int:
        """Reads the prompt and chooses the first token."""
        started = time.perf_counter()
        for first in range(0, len(self._prompt_ids), PREFILL_PIECE):
            step = self._run(np.array([self._prompt_ids[first : first + PREFILL_PIECE]]))
        token_id = self._choose(step, 0)
        self._prefill_seconds = time.perf_counter() - started
        return token_id

    def _decode(self, token_id: int, index: int) -> int:
        """Reads one token and chooses the next."""
        started = time.perf_counter()
        self._new_id.fill(token_id)
        token_id = self._choose(self._run(self._new_id), index)
        self._decode_seconds += time.perf_counter() - started
        self._decode_steps += 1
        return token_id

    def _run(self, ids: NDArray[np.int64]) -> Step:
        step = self._session.run(ids, self._state)
        self._state = step.state
        return step

    def _choose(self, step: Step, index: int) -> int:
        if self._sampling.temperature == 0:
            return int(step.likeliest[0, -1])
        return self._sampling.pick(step.logits[0, -1], index)

    def _give(self, token_id: int) -> list[Token]:
        text = "" if self._text is None else self._text.push(token_id)
        if text is not None and not self._held:
            return [Token(token_id, text)]
        self._held.append(token_id)
        return [] if text is None else self._release(text)

    def _give_rest(self) -> list[Token]:
        return self._release(self._text.finish()) if self._held and self._text else []

    def _release(self, text: str) -> list[Token]:
        *before, last = self._held
        self._held = []
        return [*(Token(token_id, "") for token_id in before), Token(last, text)]
