"""Tokenizers, streams of characters, and chat templates, the hostile ones included."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import BundleError, MissingDependencyError, RuntimeInputError
from edgeattn.runtime import Text

END = "<|end|>"


def byte_text() -> Text:
    """A tokenizer of single bytes: every character outside ASCII takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return Text(tokenizer, None, {})


BYTES = byte_text()


def chat_text(template: str) -> Text:
    return Text(BYTES.tokenizer, template, {"bos_token": "<s>", "eos_token": "</s>"})


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.booleans())
def test_pieces_join_to_the_text(text, with_prompt):
    stream = BYTES.stream(BYTES.encode("é" if with_prompt else ""))
    pieces = [stream.push(token) for token in BYTES.encode(text)]
    assert "".join(piece or "" for piece in pieces) + stream.finish() == text


def test_unfinished_characters_are_held_back():
    stream = BYTES.stream()
    assert [stream.push(i) for i in BYTES.encode("a€b")] == ["a", None, None, "€", "b"]
    assert stream.finish() == ""
    for token in BYTES.encode("😀")[:3]:
        assert stream.push(token) is None
    assert stream.finish().startswith("\ufffd")


@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_tokens_give_text(ids):
    """Bytes that are no UTF-8 come out as replacement characters and never pile up."""
    stream = BYTES.stream()
    for token in ids:
        stream.push(token)
        assert len(stream._pending) <= 4
    stream.finish().encode()


def test_parts_of_a_character_that_others_part_never_join():
    first, *rest = BYTES.encode("€")
    stream = BYTES.stream([first])
    pieces = [stream.push(token) or "" for token in (*BYTES.encode("ab"), first)]
    pieces += [stream.push(token) or "" for token in (*BYTES.encode("a"), *rest)]
    assert "".join(pieces) + stream.finish() == "ab\ufffda\ufffd\ufffd"


def test_only_a_decoder_of_bytes_has_pieces_of_their_own(stories):
    assert BYTES.piece(BYTES.encode("a")[0]) == BYTES.piece(BYTES.encode("a")[0]) == "a"
    assert BYTES.piece(BYTES.encode("€")[0]) is None
    assert BYTES.piece(BYTES.tokenizer.token_to_id(END)) == ""
    assert stories.text.piece(stories.text.encode("She")[-1]) is None


def test_special_tokens_give_no_text():
    stream = BYTES.stream()
    end = BYTES.tokenizer.token_to_id(END)
    assert [stream.push(i) for i in (*BYTES.encode("a"), end, *BYTES.encode("b"))] == ["a", "", "b"]


def test_a_stream_keeps_the_space_after_the_prompt(stories, story):
    """The decoder of this tokenizer strips the space a text begins with."""
    text = stories.text
    prompt, following = text.encode(story), text.encode("She ran.", add_special_tokens=False)
    stream = text.stream(prompt)
    assert "".join(stream.push(i) or "" for i in following) + stream.finish() == " She ran."
    assert text.decode(following) == "She ran."


@pytest.mark.parametrize("prompt", ["\U0001f468\U0001f469", "Hi \U00020bb7\U00020bb7\U00020bb7"])
def test_a_stream_behind_characters_in_bytes(stories, prompt):
    """The tokenizer lacks them; a prompt that is cut within one spoils what follows."""
    text = stories.text
    ids = text.encode(prompt)
    space, *new = text.encode("\U0001f600", add_special_tokens=False)
    assert not text.is_byte(space)
    assert all(map(text.is_byte, new))
    stream = text.stream(ids)
    pieces = [piece for token in new if (piece := stream.push(token))]
    whole = text.decode([*ids, *new])
    assert "\ufffd" not in whole
    assert "".join(pieces) + stream.finish() == whole[len(text.decode(ids)) :]


def test_ids_of_any_kind_have_a_text(stories):
    ids = stories.text.encode("Once upon a time")
    for kind in (tuple(ids), np.array(ids), iter(ids), dict.fromkeys(ids)):
        assert stories.text.decode(kind) == stories.text.decode(ids)


def test_encode_follows_tokenizer_json(stories):
    assert stories.text.encode("") == [1]
    assert stories.text.encode("a")[0] == 1
    assert stories.text.encode("a", add_special_tokens=False) == stories.text.encode("a")[1:]


def test_stored_truncation_and_padding_are_ignored(changed_bundle, stories_bundle):
    stored = json.loads((stories_bundle / "tokenizer.json").read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    stored["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    text = Text.open(Bundle.open(changed_bundle({"tokenizer.json": json.dumps(stored).encode()})))
    assert 4 < len(text.encode("one two three four")) < 64


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RuntimeInputError, match="character 1 is half of a surrogate pair"):
        BYTES.encode("a\ud83d")


def test_no_tokenizer(changed_bundle):
    with pytest.raises(BundleError, match="the checkpoint had no tokenizer"):
        Text.open(Bundle.open(changed_bundle({"tokenizer.json": None})))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(changed_bundle, content):
    with pytest.raises(BundleError, match="it does not load"):
        Text.open(Bundle.open(changed_bundle({"tokenizer.json": content})))


@pytest.mark.parametrize("module", ["tokenizers", "jinja2"])
def test_a_missing_package(stories, stories_bundle, monkeypatch, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {module}"):
        Text.open(Bundle.open(stories_bundle)) if module == "tokenizers" else chat_text("").chat([])


TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
[{{ message['role'] }}] {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}[assistant] {% endif %}
"""


def test_chat_equals_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": "Be kind."}, *user(" Hi <b>! ")]
    (expected,), _ = render_jinja_template(
        [messages],
        chat_template=TEMPLATE,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert chat_text(TEMPLATE).chat(messages) == expected
    assert expected == "<s>[user] Hi <b>!</s>\n[assistant] "


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é<"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "é<"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{{ unknown_variable }}{{ tools is none }}", "True"),
    ],
)
def test_what_templates_may_use(template, rendered):
    assert chat_text(template).chat(user("é<")) == rendered


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "it says: roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.absent.further }}", "UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_failing_templates_are_sentences(template, words):
    with pytest.raises(RuntimeInputError, match=words):
        chat_text(template).chat(user("Hi"))


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": b"A", "tokenizer_config.json": b'{"chat_template": "B"}'}, "A"),
        ({"tokenizer_config.json": b'{"chat_template": "B"}'}, "B"),
        (
            {
                "tokenizer_config.json": b'{"chat_template": ['
                b'{"name": "tool_use", "template": "C"}, {"name": "default", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": b'{"bos_token": {"content": "<s>"}, "eos_token": null}'}, None),
    ],
)
def test_where_the_template_comes_from(changed_bundle, files, template):
    text = Text.open(Bundle.open(changed_bundle(files)))
    assert text.chat_template == template
    if template is None:
        assert text.special_tokens == {"bos_token": "<s>"}
        with pytest.raises(BundleError, match="a chat template"):
            text.chat(user("Hi"))


def test_a_template_that_is_no_utf8(changed_bundle):
    bundle = Bundle.open(changed_bundle({"chat_template.jinja": b"\xff"}))
    with pytest.raises(BundleError, match=r"UTF-8 in .*chat_template\.jinja"):
        Text.open(bundle)
