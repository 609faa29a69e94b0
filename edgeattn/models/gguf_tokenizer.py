"""The tokenizer inside a GGUF file, rebuilt as the files Hugging Face keeps beside a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeattn.errors import CheckpointError
from edgeattn.models.gguf_header import Metadata
from edgeattn.models.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_SPECIAL_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
}
# What llama.cpp assumes for a SentencePiece vocabulary that does not say.
_SENTENCEPIECE_IDS = {"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer_files(metadata: Metadata, vocab_size: int, max_context: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja.

    Args:
        metadata: the file's metadata.
        vocab_size: rows of the embedding; every token needs one.
        max_context: tokens the model was trained for.

    Raises:
        CheckpointError: the vocabulary is inconsistent, or of a kind edgeattn cannot rebuild.
    """
    if not _has_tokenizer(metadata):
        return {}
    vocabulary = _Vocabulary.read(metadata, vocab_size)
    tokenizer, adds_bos = _build(metadata, vocabulary)
    ids = special_token_ids(metadata)
    _add_tokens(tokenizer, vocabulary, set(ids.values()))
    ends = {
        "add_bos_token": metadata.flag(_PREFIX + "add_bos_token", adds_bos),
        "add_eos_token": metadata.flag(_PREFIX + "add_eos_token", False),
    }
    _add_post_processor(tokenizer, vocabulary, ids, ends)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): vocabulary.tokens[i] for key, i in ids.items()},
        **ends,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_context,
    }
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }
    if "tokenizer.chat_template" in metadata.values:
        files["chat_template.jinja"] = metadata.text("tokenizer.chat_template").encode()
    return files


def special_token_ids(metadata: Metadata) -> dict[str, int]:
    """The ids of BOS, EOS, unknown and padding that the file names, by config.json's keys.

    Raises:
        CheckpointError: an id is not one of the vocabulary's.
    """
    if not _has_tokenizer(metadata):
        return {}
    count = len(metadata.strings(_PREFIX + "tokens"))
    sentencepiece = metadata.text(_PREFIX + "model") == "llama"
    defaults = _SENTENCEPIECE_IDS if sentencepiece else {}
    ids = {}
    for name, key in _SPECIAL_KEYS.items():
        found = metadata.integer(_PREFIX + key, defaults.get(name, -1))
        if found >= count or (found < 0 and _PREFIX + key in metadata.values):
            raise _inconsistent(f"{_PREFIX}{key} below {count}", f"it is {found}")
        if found >= 0:
            ids[name] = found
    return ids


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens by id and their types (1 where the file gives none)."""

    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def read(cls, metadata: Metadata, vocab_size: int) -> _Vocabulary:
        tokens = metadata.strings(_PREFIX + "tokens")
        types = metadata.integers(_PREFIX + "token_type", [_NORMAL] * len(tokens))
        if not 0 < len(tokens) <= vocab_size:
            raise _inconsistent(
                f"at most one token for each of the {vocab_size} rows of the embedding",
                f"there are {len(tokens)}",
            )
        if len(types) != len(tokens):
            raise _inconsistent(f"{len(tokens)} token types", f"there are {len(types)}")
        if len(set(tokens)) != len(tokens):
            raise _inconsistent("every token once", "some token occurs twice")
        return cls(tokens, types)

    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def _has_tokenizer(metadata: Metadata) -> bool:
    return metadata.text(_PREFIX + "model", "none") not in ("none", "no_vocab")


def _build(metadata: Metadata, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer without added tokens, and whether its kind begins texts with BOS."""
    model = metadata.text(_PREFIX + "model")
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        return _byte_level(metadata, vocabulary, pre), pre.adds_bos
    if model == "llama":
        return _sentencepiece(metadata, vocabulary), True
    raise CheckpointError(
        expected="a tokenizer of model gpt2 or llama in the GGUF file",
        came=f"its tokenizer.ggml.model is '{model}'",
        todo="pass the model's Hugging Face directory instead",
    )


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text(_PREFIX + "pre", "missing")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            expected=f"a pre-tokenizer among {', '.join(PRE_TOKENIZERS)}",
            came=f"the GGUF file's tokenizer.ggml.pre is '{name}'",
            todo="pass the model's Hugging Face directory instead",
        )
    return PRE_TOKENIZERS[name]


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary, pre: PreTokenizer) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = vocabulary.ids()
    merges = _split_merges(metadata.strings(_PREFIX + "merges"), ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    add_space = metadata.flag(_PREFIX + "add_space_prefix", False)
    if add_space and steps:  # the library would put a blank before every piece
        raise _inconsistent("no add_space_prefix, as with this pre-tokenizer", "it is set")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_space, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merges(lines: Sequence[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise _inconsistent(
                "merges of two tokens to a third", f"there is the merge {line[:60]!r}"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.tokens[special_token_ids(metadata)["unk_token_id"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges_from_scores(vocabulary, metadata.numbers(_PREFIX + "scores")),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape: list[Any] = [normalizers.Replace(" ", _SPACE)]
    unescape: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.flag(_PREFIX + "add_space_prefix", True):
        escape.insert(0, normalizers.Prepend(_SPACE))
        unescape.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(escape)
    tokenizer.decoder = decoders.Sequence(unescape)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest: every split of every token.

    Among the splits of one token the longer left part goes first, as in Hugging Face's conversion.
    """
    if len(scores) != len(vocabulary.tokens):
        raise _inconsistent(f"{len(vocabulary.tokens)} token scores", f"there are {len(scores)}")
    normal = {t: i for i, t in enumerate(vocabulary.tokens) if vocabulary.types[i] == _NORMAL}
    merges = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-scores[i], -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda m: m[:2])]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, named: set[int]) -> None:
    """Tokens that are matched in the text before anything is split; all keep their ids."""
    from tokenizers import AddedToken

    special, plain = [], []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_CONTROL, _UNKNOWN) or i in named:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(
    tokenizer: Tokenizer,
    vocabulary: _Vocabulary,
    ids: Mapping[str, int],
    ends: Mapping[str, bool],
) -> None:
    from tokenizers.processors import TemplateProcessing

    placed = [key for key in ("bos", "eos") if ends[f"add_{key}_token"]]
    special = []
    for key in placed:
        if f"{key}_token_id" not in ids:
            raise _inconsistent(f"a {key.upper()} token to add to each text", "none is named")
        i = ids[f"{key}_token_id"]
        # The template calls them bos and eos: in its syntax a token's own text may mean something.
        special.append({"id": key, "ids": [i], "tokens": [vocabulary.tokens[i]]})
    if not placed:
        return
    bos, eos = [k for k in placed if k == "bos"], [k for k in placed if k == "eos"]
    first = [*bos, "$A", *eos]
    second = [f"{piece}:1" for piece in (*bos, "$B", *eos)]
    tokenizer.post_processor = TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=special
    )


def _inconsistent(expected: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{expected} in the GGUF file's tokenizer",
        came=came,
        todo="download the file again or pass the model's Hugging Face directory",
    )
