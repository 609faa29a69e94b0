"""Windows of tokens cut from a text: what calibration and quality figures are computed on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeattn.errors import CheckpointError, RuntimeInputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# A word or sign unknown here and there is usual; a text in a foreign script is unknown throughout.
_MOST_UNKNOWN = 0.1
# Of how many windows one is held out, and how many at most.
_HELD_SHARE, _MOST_HELD = 8, 8


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, for manifests."""
    return hashlib.sha256(text.encode()).hexdigest()


def token_windows(
    text: str,
    tokenizer_json: bytes | str | None,
    *,
    windows: int,
    length: int,
    vocab_size: int,
    option: str = "--calibration-windows",
) -> Tensor:
    """Windows of consecutive tokens, one from the middle of each of equal stretches of the text.

    So few windows see all of a long text; a text just long enough is cut without gaps.

    Args:
        text: long enough for all windows.
        tokenizer_json: content of tokenizer.json, None for a checkpoint without.
        windows: how many.
        length: tokens of each.
        vocab_size: rows of the embedding.
        option: with which a user says how many windows.

    Returns:
        `[windows, length]` int64, in the order of the text.

    Raises:
        UsageError: `windows` or `length` is not positive.
        CheckpointError: no tokenizer, one that does not load, or ids beyond the embedding.
        RuntimeInputError: the text is too short, or full of what the tokenizer does not know.
    """
    for name, value in (("number of windows", windows), ("length of a window", length)):
        if value < 1:
            raise UsageError(
                expected=f"a {name} of at least 1", came=f"it is {value}", todo="give more"
            )
    ids = token_ids(text, tokenizer_json)
    if len(ids) < windows * length:
        raise RuntimeInputError(
            expected=f"a text of {windows} windows of {length} tokens",
            came=f"it has {len(ids)} tokens, enough for {len(ids) // length} windows",
            todo=_fewer_windows(len(ids) // length, option),
        )
    _check_vocabulary(max(ids), vocab_size)
    starts = _spread(len(ids), windows, length)
    return torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)


def split_windows(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to learn from and windows to judge by, the latter spread over the text.

    Raises:
        UsageError: there are fewer than two.
    """
    count = len(windows)
    if count < 2:
        raise UsageError(
            expected="at least 2 windows of calibration text, one of them to judge by",
            came=f"there is {count}" if count else "there is none",
            todo="take more windows or a longer text",
        )
    held = min(max(1, count // _HELD_SHARE), _MOST_HELD)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[[(2 * i + 1) * count // (2 * held) for i in range(held)]] = True
    return windows[~chosen], windows[chosen]


def _fewer_windows(enough: int, option: str) -> str:
    return f"pass a longer text{f' or {option} {enough}' if enough else ''}"


def token_ids(text: str, tokenizer_json: bytes | str | None) -> list[int]:
    """Ids of a text, without special tokens.

    Args:
        text: any text.
        tokenizer_json: content of tokenizer.json, None for a checkpoint without.

    Raises:
        CheckpointError: no tokenizer, or one that does not load.
        RuntimeInputError: the tokenizer does not know too much of the text.
    """
    tokenizer, content = _open_tokenizer(tokenizer_json)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    share = _unknown_share(encoding, _unknown_id(tokenizer, content))
    if share > _MOST_UNKNOWN:
        raise RuntimeInputError(
            expected="a text that the checkpoint's tokenizer can represent",
            came=f"{share:.0%} of its characters are unknown to it",
            todo="pass a text in a language and script of the model",
        )
    return list(encoding.ids)


def surrounding_ids(tokenizer_json: bytes | str | None) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that the tokenizer puts before and behind every text.

    Args:
        tokenizer_json: content of tokenizer.json, None for a checkpoint without.

    Raises:
        CheckpointError: no tokenizer, or one that does not load.
    """
    tokenizer = _open_tokenizer(tokenizer_json)[0]
    bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    start = next(i for i in starts if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _check_vocabulary(highest: int, vocab_size: int) -> None:
    if highest >= vocab_size:
        raise CheckpointError(
            expected=f"a tokenizer whose ids are below {vocab_size}, the size of the vocabulary",
            came=f"the text has token {highest}",
            todo="put the model's own tokenizer.json into the checkpoint",
        )


def _open_tokenizer(tokenizer_json: bytes | str | None) -> tuple[Tokenizer, bytes]:
    """The tokenizer, and its file as bytes."""
    if tokenizer_json is None:
        raise CheckpointError(
            expected="tokenizer.json in the checkpoint, to turn the text into tokens",
            came="the checkpoint has none",
            todo="put the model's tokenizer.json into the checkpoint",
        )
    content = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
    return _load_tokenizer(content), content


def _load_tokenizer(content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise CheckpointError(
            expected="a tokenizer.json that the tokenizers library reads",
            came=str(error),
            todo="repair the checkpoint's tokenizer.json",
        ) from error
    # Some checkpoints store the limits of their training, which would cut or fill every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _unknown_id(tokenizer: Tokenizer, content: bytes) -> int | None:
    """The id that stands for whatever the tokenizer does not know, None where it knows all."""
    # From the file: the library's objects name it for some kinds of model only.
    model: dict[str, Any] = json.loads(content)["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.token_to_id(token)


def _unknown_share(encoding: Encoding, unknown: int | None) -> float:
    """Share of the characters that became the unknown token.

    Not of the tokens: many tokenizers make one token of a whole unknown run.
    """
    ids: Sequence[int] = encoding.ids
    if unknown is None or unknown not in ids:
        return 0.0
    sizes = [end - begin for begin, end in encoding.offsets]
    unknown_size = sum(size for token, size in zip(ids, sizes, strict=True) if token == unknown)
    return unknown_size / max(1, sum(sizes))


def _spread(total: int, windows: int, length: int) -> list[int]:
    """First tokens of windows, each in the middle of its stretch of `total // windows` tokens."""
    margin = (total // windows - length) // 2
    return [i * total // windows + margin for i in range(windows)]
