"""Pre-tokenizers of byte-level vocabularies by the name GGUF gives them, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte pairs are merged.

    Attributes:
        split: expression whose matches become pieces, None for GPT-2's own.
        digits: every numeric character is a piece of its own, before anything else.
        nfc: text is first brought to Unicode normal form C.
        ignore_merges: a piece that is a token as a whole is taken without merging.
        adds_bos: a sequence begins with BOS unless the file says otherwise.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


def _cl100k(digits: str) -> str:
    """The expression of Llama 3 and Qwen 2, which differ in how many digits make a piece."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = PreTokenizer()
_STARCODER = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(_cl100k(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)

# `tokenizer.ggml.pre` -> the pre-tokenizer in the tokenizer.json that name was given to. Only names
# whose original is known: a wrong guess gives ids that are almost right.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "refact": _STARCODER,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(_cl100k(r"\p{N}"), nfc=True),
}
