"""A prompt, in text or token ids, becomes checked token ids."""

from __future__ import annotations

from collections.abc import Sequence

from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.runtime.arrays import as_array
from edgeattn.runtime.session import Session


def encode_prompt(session: Session, prompt: str | Sequence[int], *, chat: bool) -> list[int]:
    """Token ids of a prompt, as `generate` takes it.

    Args:
        session: the model.
        prompt: a text, or token ids.
        chat: put the text through the chat template, as a user's message.

    Raises:
        RuntimeInputError: an empty prompt, one too long for the context, or ids out of range.
        UsageError: `chat` with token ids.
        BundleError: no tokenizer or chat template where one is needed.
    """
    if not isinstance(prompt, str):
        if chat:
            raise UsageError(
                expected="a text to put through the chat template",
                came="token ids came",
                todo="pass a text, or leave chat out",
            )
        ids = check_token_ids(session, prompt)
    elif chat:
        conversation = session.text.chat([{"role": "user", "content": prompt}])
        # The template wrote the special tokens; the tokenizer would add its own once more.
        ids = session.text.encode(conversation, add_special_tokens=False)
    else:
        ids = session.text.encode(prompt)
    if not ids:
        raise RuntimeInputError(
            expected="a prompt of at least one token",
            came="it is empty",
            todo="pass a text (this tokenizer adds no token of beginning)",
        )
    if len(ids) > session.context:
        raise RuntimeInputError(
            expected=f"a prompt of at most {session.context} tokens, the context of the bundle",
            came=f"it has {len(ids)}",
            todo="shorten it, or export with a larger --context if the model knows one",
        )
    return ids


def check_token_ids(session: Session, values: Sequence[int]) -> list[int]:
    """The ids as a list.

    Raises:
        RuntimeInputError: they are no whole numbers, or outside the vocabulary.
    """
    array = as_array("token ids", values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise RuntimeInputError(
            expected="token ids as one row of whole numbers",
            came=f"an array of {array.dtype} of shape {list(array.shape)} came",
            todo="pass a list of ids",
        )
    ids: list[int] = array.tolist()
    for token_id in ids:
        if not 0 <= token_id < session.vocab_size:
            raise RuntimeInputError(
                expected=f"token ids from 0 to {session.vocab_size - 1}",
                came=f"there is {token_id}",
                todo="use the bundle's own tokenizer",
            )
    return ids
