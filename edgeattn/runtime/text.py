"""`Text`: a bundle's tokenizer and chat template, and text from tokens as they come."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeattn.bundle.bundle import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, Bundle
from edgeattn.errors import BundleError, MissingDependencyError, RuntimeInputError
from edgeattn.runtime.chat import render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# A character is at most 4 bytes, so at most 4 tokens; what is unfinished after more never will be.
_MOST_HELD_BACK = 4
# Tokens of the prompt that a stream starts from; most decoders look back at one.
_CONTEXT = 6


@dataclass(frozen=True, eq=False)
class Text:
    """Text to tokens and back, exactly as tokenizer.json says.

    Attributes:
        tokenizer: the tokenizer, with truncation and padding off.
        chat_template: Jinja source, None when the bundle has none.
        special_tokens: `bos_token`, `eos_token` and the like, as templates name them.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    _pieces: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, bundle: Bundle) -> Text:
        """Reads the tokenizer of a bundle.

        Raises:
            BundleError: it has no tokenizer, or one that does not load.
            MissingDependencyError: tokenizers is not installed.
        """
        config = bundle.json(TOKENIZER_CONFIG)
        tokens = {key: _token(value) for key, value in config.items() if key.endswith("_token")}
        return cls(
            _load_tokenizer(bundle),
            _chat_template(bundle, config),
            {key: value for key, value in tokens.items() if value is not None},
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: add what tokenizer.json adds by itself, as a token of beginning.

        Raises:
            RuntimeInputError: the text is no Unicode text (it holds half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RuntimeInputError(
                expected="a Unicode text",
                came=f"character {error.start} is half of a surrogate pair",
                todo="pass the text in UTF-8",
            ) from error
        encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def piece(self, token_id: int) -> str | None:
        """The text of a token wherever it stands; None where that depends on those around it.

        Right after a run of the model the tokenizer's tables are in no cache: to decode a token
        takes twenty times as long as to look up what it gave before.
        """
        if not self._is_context_free:
            return None
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self.decode([token_id])
            if _REPLACEMENT in piece:  # a part of a character
                return None
            self._pieces[token_id] = piece
        return piece

    def is_byte(self, token_id: int) -> bool:
        """Whether it is a byte of a character that the vocabulary lacks, as "<0xE2>"."""
        token = self.tokenizer.id_to_token(int(token_id))
        return token is not None and _BYTE.fullmatch(token) is not None

    @cached_property
    def _is_context_free(self) -> bool:
        """Whether the text of tokens is their bytes put together."""
        from tokenizers.decoders import ByteLevel

        return isinstance(self.tokenizer.decoder, ByteLevel)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, ready for the model's answer.

        It holds its own special tokens: encode it with `add_special_tokens=False`.

        Args:
            messages: each with "role" ("system", "user" or "assistant") and "content".

        Raises:
            BundleError: the bundle has no chat template.
            RuntimeInputError: the template refuses the messages or does not work.
        """
        if self.chat_template is None:
            raise BundleError(
                expected="a chat template in the bundle",
                came="the checkpoint had none",
                todo="leave --chat out, or add chat_template.jinja to the checkpoint and export",
            )
        variables = {"messages": [dict(m) for m in messages], "add_generation_prompt": True}
        return render(self.chat_template, {**self.special_tokens, **variables})

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """A decoder of tokens that follow `prompt_ids`."""
        return TextStream(self, prompt_ids)


class TextStream:
    """Turns tokens into pieces of text as they come; the pieces are whole characters.

    A token may end within a character. Its text is held back until the rest has come.
    """

    def __init__(self, text: Text, prompt_ids: Sequence[int]) -> None:
        self._text = text
        # The text of a token depends on the one before: some decoders drop a leading space.
        start = max(0, len(prompt_ids) - _CONTEXT)
        while start > 0 and text.is_byte(prompt_ids[start]):  # a part of a character spoils a run
            start -= 1
        self._known = list(prompt_ids[start:])
        self._known_text = text.decode(self._known)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str | None:
        """The text that `token_id` completes, None while a character is unfinished."""
        if not self._pending:
            piece = self._text.piece(token_id)
            if piece is not None:
                self._known, self._known_text = [token_id], piece
                return piece
        self._pending.append(token_id)
        whole = self._text.decode(self._known + self._pending)
        is_unfinished = whole.endswith(_REPLACEMENT) and whole != self._known_text
        if is_unfinished and len(self._pending) <= _MOST_HELD_BACK:
            return None
        return self._release(whole)

    def finish(self) -> str:
        """What is still held back, with a replacement character for unfinished ones."""
        return self._release(self._text.decode(self._known + self._pending))

    def _release(self, whole: str) -> str:
        """What the pending tokens add to the text; `whole` is that of the known ones and them."""
        pending, self._pending = self._pending, []
        if whole.startswith(self._known_text):
            piece, known = whole[len(self._known_text) :], self._known + pending
        else:
            # Byte tokens: an unfinished character spoils the whole ones right before it.
            piece = whole = self._text.decode(pending)
            known = pending
        # Only special tokens gave no text; they need not become the context of the next.
        if piece:
            if len(known) > _CONTEXT:
                known, whole = pending, self._text.decode(pending)
            self._known, self._known_text = known, whole
        return piece


def _load_tokenizer(bundle: Bundle) -> Tokenizer:
    file = bundle.file(TOKENIZER)
    if file is None:
        raise BundleError(
            expected=f"{TOKENIZER} in {bundle.path}",
            came="the checkpoint had no tokenizer",
            todo="export from a checkpoint with one, or pass token ids from Python",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            expected="the tokenizers package",
            came=f"it cannot be imported ({error})",
            todo="pip install tokenizers",
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise BundleError(
            expected=f"a tokenizer in {file}",
            came=f"it does not load ({error})",
            todo="upgrade tokenizers or export the bundle again",
        ) from error
    # Some checkpoints store the limits of their training, which would cut or fill every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_template(bundle: Bundle, config: Mapping[str, Any]) -> str | None:
    file = bundle.file(CHAT_TEMPLATE)
    if file is not None:
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(
                expected=f"UTF-8 in {file}", came=str(error), todo="export the bundle again"
            ) from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token(value: object) -> str | None:
    """A special token, which tokenizer_config.json stores as a text or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
