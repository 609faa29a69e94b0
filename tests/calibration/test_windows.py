"""Windows cut from texts: where they lie, and every text and tokenizer that is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from edgeattn.calibration.windows import surrounding_ids, text_sha256, token_ids, token_windows
from edgeattn.errors import CheckpointError, RuntimeInputError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.text_file import read_text

COUNTED = 4096


def counting_tokenizer() -> bytes:
    """A word that is a number becomes the token of that number."""
    vocabulary = {str(i): i for i in range(COUNTED)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": COUNTED}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


COUNTING = counting_tokenizer()


def cut(text: str, **changed: Any) -> torch.Tensor:
    settings = {"windows": 2, "length": 3, "vocab_size": COUNTED + 1, **changed}
    return token_windows(text, COUNTING, **settings)


def numbers(count: int) -> str:
    return " ".join(map(str, range(count)))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2000))
def test_windows_are_consecutive_apart_and_spread_evenly(windows, length, spare):
    total = windows * length + spare
    found = cut(numbers(total), windows=windows, length=length)
    assert found.shape == (windows, length)
    assert found.dtype == torch.int64
    starts = found[:, 0]
    assert torch.equal(found, starts[:, None] + torch.arange(length))  # ids are places here
    assert starts[0] >= 0
    assert found[-1, -1] < total
    steps = starts.diff().tolist()
    assert all(step >= length for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    # As much is left out before the first window as after the last, up to rounding.
    before, after = int(starts[0]), total - 1 - int(found[-1, -1])
    assert abs(before - after) <= 2
    assert before <= spare // windows


def test_a_text_of_just_enough_tokens_is_cut_without_gaps():
    assert cut(numbers(6)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_novel_is_seen_from_beginning_to_end(stories260k: Path, shared_dir: Path) -> None:
    checkpoint = open_checkpoint(stories260k)
    tokenizer = checkpoint.text["tokenizer.json"]
    novel = read_text(shared_dir / "data" / "austen" / "emma.txt")
    found = token_windows(
        novel, tokenizer, windows=32, length=128, vocab_size=checkpoint.shape.vocab_size
    )
    decode = Tokenizer.from_buffer(tokenizer).decode
    places = [novel.index(decode(row.tolist()).strip()[20:80]) for row in found]
    assert places == sorted(places)
    assert places[0] < len(novel) / 32
    assert places[-1] > len(novel) * 31 / 32


def test_the_tokens_are_those_of_transformers(smollm2_gguf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    content = open_checkpoint(smollm2_gguf).text["tokenizer.json"]
    text = "Emma Woodhouse, handsome, clever, and rich — with 21 years …\n\n  the world."
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_buffer(content))
    wanted = hf(text, add_special_tokens=False)["input_ids"]
    found = token_windows(text, content, windows=1, length=len(wanted), vocab_size=49152)
    assert found.tolist() == [wanted]
    assert token_ids(text, content.decode()) == wanted  # content as text


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("<s> $A </s> </s>", (["<s>"], ["</s>", "</s>"])),
        ("$A </s>", ([], ["</s>"])),
        ("<s> $A", (["<s>"], [])),
        (None, ([], [])),
    ],
)
def test_special_tokens_frame_a_text(
    template: str | None, expected: tuple[list[str], list[str]]
) -> None:
    tokenizer = Tokenizer.from_buffer(COUNTING)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(ids.items())
        )
    wanted = tuple([ids[name] for name in part] for part in expected)
    assert surrounding_ids(tokenizer.to_str()) == wanted


def test_no_special_tokens_and_no_stored_limits() -> None:
    tokenizer = Tokenizer.from_buffer(COUNTING)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100, pad_id=7)
    stored = json.loads(tokenizer.to_str())
    stored["post_processor"] = {
        "type": "BertProcessing",
        "sep": ["<s>", COUNTED + 1],
        "cls": ["<s>", COUNTED + 1],
    }
    assert token_ids(numbers(50), json.dumps(stored)) == list(range(50))


@pytest.mark.parametrize(
    ("text", "enough"), [("", 0), ("1 2", 0), (numbers(3), 1), (numbers(5), 1)]
)
def test_a_short_text_is_refused(text: str, enough: int) -> None:
    option = f" or --calibration-windows {enough}" if enough else ""
    words = rf"2 windows of 3 .* enough for {enough} windows: pass a longer text{option}$"
    with pytest.raises(RuntimeInputError, match=words):
        cut(text)


@pytest.mark.parametrize("name", ["windows", "length"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="of at least 1, but it is 0"):
        cut(numbers(6), **{name: 0})


def test_a_checkpoint_without_tokenizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json in the checkpoint.*has none"):
        token_windows("text", None, windows=1, length=1, vocab_size=8)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", "[]"])
def test_a_broken_tokenizer_is_refused(content: bytes | str) -> None:
    with pytest.raises(CheckpointError, match="that the tokenizers library reads"):
        token_windows("text", content, windows=1, length=1, vocab_size=8)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"ids are below 5,.* has token 5"):
        cut(numbers(6), vocab_size=5)
    assert cut(numbers(6), vocab_size=6).max() == 5


UNKNOWING = {
    "wordlevel": models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"),
    "wordpiece": models.WordPiece({"?": 0, "a": 1, "b": 2}, unk_token="?"),
    "bpe": models.BPE({"?": 0, "a": 1, "b": 2, " ": 3}, [], unk_token="?"),
    "bpe, runs fused": models.BPE(
        {"?": 0, "a": 1, "b": 2, " ": 3}, [], unk_token="?", fuse_unk=True
    ),
    "unigram": models.Unigram([("?", 0.0), ("a", -1.0), ("b", -1.0), (" ", -1.0)], 0, False),
}


@pytest.mark.parametrize("kind", UNKNOWING)
def test_a_text_of_unknown_signs_is_refused(kind: str) -> None:
    tokenizer = Tokenizer(UNKNOWING[kind])
    if kind.startswith("word"):
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    content = tokenizer.to_str()
    few, many = "a b " * 100 + "橋 橋橋", "a b " * 20 + "橋梁" * 20
    assert 0 in token_ids(few, content)
    with pytest.raises(RuntimeInputError, match=r"[345]\d% of its characters are unknown"):
        token_windows(many, content, windows=1, length=8, vocab_size=8)


def test_what_has_no_unknown_token_takes_any_text(tiny_checkpoint: Path) -> None:
    tokenizer = open_checkpoint(tiny_checkpoint).text["tokenizer.json"]
    assert len(token_ids("橋" * 50, tokenizer)) == 150


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "book").write_text("Größe\n", "utf-8")
    text = read_text(tmp_path / "book")
    assert text == "Größe\n"
    assert text_sha256(text) == hashlib.sha256("Größe\n".encode()).hexdigest()


def test_the_texts_of_a_folder_are_joined_by_name(tmp_path: Path) -> None:
    for name, content in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "no"), ("10.txt", "0")):
        (tmp_path / name).write_text(content)
    (tmp_path / "d.txt").mkdir()
    assert read_text(tmp_path) == "0\none\ntwo"


def refused(path: Path, words: str) -> None:
    with pytest.raises(RuntimeInputError, match=words) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert re.fullmatch(r"expected [^:]+, but .+: .+", str(caught.value))


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "cannot be read .No such file")


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    refused(tmp_path, r"\*\.txt files in .* has none")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
def test_bytes_of_another_encoding_are_refused(tmp_path: Path, encoding: str) -> None:
    content = "0123 Brücke" if encoding == "latin-1" else "0123 桥梁"
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    refused(tmp_path / "a.txt", r"UTF-8 in .*a\.txt, but byte \d+ does not fit")
    refused(tmp_path, r"UTF-8 in .*a\.txt, but byte \d+ does not fit")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    refused(tmp_path / "a.txt", "it is empty")
    refused(tmp_path, "it is empty")
