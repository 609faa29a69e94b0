"""Generation against transformers, why it ends, and what it refuses."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from edgeattn.errors import BundleError, RuntimeInputError, UsageError
from edgeattn.runtime import Session, Token, generate, stream
from edgeattn.runtime import session as session_module


def hf_greedy(model, ids, count):
    import torch

    done = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return tuple(done[0, len(ids) :].tolist())


def test_greedy_equals_transformers(stories, stories_hf, story):
    tokens = []
    found = generate(stories, story, max_new_tokens=100, on_token=tokens.append)
    prompt = stories.text.encode(story)
    assert found.token_ids == hf_greedy(stories_hf, prompt, 100)
    assert found.text.startswith(" She loved to play outside in the park.")
    assert story + found.text == stories.text.decode([*prompt, *found.token_ids])
    assert "".join(token.text for token in tokens) == found.text
    assert tuple(token.id for token in tokens) == found.token_ids
    assert (found.prompt_tokens, found.finish_reason) == (len(prompt), "length")
    assert found.decode_steps == 99


def test_figures(stories, story):
    found = generate(stories, story, max_new_tokens=3)
    assert found.prefill_tokens_per_second == found.prompt_tokens / found.prefill_seconds
    assert found.decode_tokens_per_second == 2 / found.decode_seconds
    values = found.to_dict()
    assert values["token_ids"] == list(found.token_ids)
    assert values["decode_tokens_per_second"] == found.decode_tokens_per_second
    assert generate(stories, story, max_new_tokens=1).decode_tokens_per_second is None


def test_a_long_prompt_goes_in_pieces(stories, story, monkeypatch):
    whole = generate(stories, story, max_new_tokens=20)
    # the package's attribute of that name is the function
    module = importlib.import_module("edgeattn.runtime.generate")
    monkeypatch.setattr(module, "PREFILL_PIECE", 3)
    assert generate(stories, story, max_new_tokens=20).token_ids == whole.token_ids


def test_token_ids_as_prompt(stories, story):
    expected = generate(stories, story, max_new_tokens=5)
    ids = stories.text.encode(story)
    assert generate(stories, ids, max_new_tokens=5).token_ids == expected.token_ids
    assert generate(stories, np.array(ids), max_new_tokens=5).text == expected.text


def test_stop_tokens(stories, story):
    free = generate(stories, story, max_new_tokens=30)
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    found = generate(stories, story, max_new_tokens=30, stop_tokens=[stop])
    assert (found.token_ids, found.finish_reason) == (free.token_ids[:first], "stop")
    assert free.text.startswith(found.text)


def test_the_bundles_own_stop_token(changed_bundle, stories, story):
    free = generate(stories, story, max_new_tokens=10)
    eos = free.token_ids[4]
    bundle = changed_bundle({"generation_config.json": f'{{"eos_token_id": {eos}}}'.encode()})
    found = generate(Session.open(bundle, exact=True), story, max_new_tokens=10)
    assert found.token_ids == free.token_ids[: free.token_ids.index(eos)]


@pytest.mark.parametrize("room", [0, 1, 5])
def test_the_end_of_the_context(changed_bundle, stories, story, room):
    """The last token needs no slot of the cache: it is never read again."""
    prompt = len(stories.text.encode(story))
    session = Session.open(changed_bundle(context=prompt + room), exact=True)
    found = generate(session, story, max_new_tokens=100)
    assert (len(found.token_ids), found.finish_reason) == (room + 1, "context")


def test_sampling_follows_the_seed(stories, story):
    options = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    one, again, other = (generate(stories, story, seed=seed, **options) for seed in (7, 7, 8))
    assert one.token_ids == again.token_ids != other.token_ids
    cold = generate(stories, story, max_new_tokens=30, temperature=1e-6)
    assert cold.token_ids == generate(stories, story, max_new_tokens=30).token_ids


def test_a_stream_runs_as_it_is_read(stories, story, monkeypatch):
    runs = []
    run = session_module.Session.run
    monkeypatch.setattr(
        session_module.Session, "run", lambda *a, **k: runs.append(a) or run(*a, **k)
    )
    tokens = stream(stories, story, max_new_tokens=30)
    assert not runs
    assert isinstance(next(tokens), Token)
    assert len(runs) == 1
    assert tokens.result().finish_reason == "interrupted"
    assert len(list(tokens)) == 29
    assert tokens.result().finish_reason == "length"


def test_interruption_keeps_what_was_generated(stories, story):
    seen = []

    def interrupt_at_third(token):
        seen.append(token)
        if len(seen) == 3:
            raise KeyboardInterrupt

    found = generate(stories, story, on_token=interrupt_at_third)
    assert (len(found.token_ids), found.finish_reason) == (3, "interrupted")
    assert found.text == "".join(token.text for token in seen)


def test_interruption_within_the_prompt(stories, story, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module.Session, "run", interrupted)
    found = generate(stories, story)
    assert (found.text, found.token_ids, found.finish_reason) == ("", (), "interrupted")
    assert found.prefill_tokens_per_second is None


def test_characters_of_several_tokens_come_whole(stories, monkeypatch):
    """Byte tokens of one character are given together, the last with the text."""
    euro = [stories.text.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    wanted = [*euro, *euro[:2]]
    picks = iter(wanted)
    monkeypatch.setattr("edgeattn.runtime.sampling.Sampling.pick", lambda *_: next(picks))
    tokens = list(stream(stories, "a", max_new_tokens=len(wanted), temperature=1))
    assert [token.id for token in tokens] == wanted
    assert [token.text for token in tokens] == ["", "", "€", "", "\ufffd\ufffd"]


def test_a_bundle_without_tokenizer_takes_ids(changed_bundle, stories, story):
    session = Session.open(changed_bundle({"tokenizer.json": None}), exact=True)
    found = generate(session, stories.text.encode(story), max_new_tokens=5)
    assert found.token_ids == generate(stories, story, max_new_tokens=5).token_ids
    assert found.text == ""
    with pytest.raises(BundleError, match="no tokenizer"):
        generate(session, story)


def test_chat_writes_the_token_of_beginning_once(changed_bundle):
    template = b"{{ bos_token }}{{ messages[0].content }}"
    session = Session.open(changed_bundle({"chat_template.jinja": template}))
    plain = generate(session, "Hello", max_new_tokens=1)
    assert generate(session, "Hello", max_new_tokens=1, chat=True) != plain
    tokens = stream(session, "Hello", chat=True)
    assert tokens._prompt_ids.count(1) == 1
    assert tokens._prompt_ids == session.text.encode("Hello")


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ([], {}, RuntimeInputError, "at least one token"),
        ([512], {}, RuntimeInputError, "ids from 0 to 511"),
        ([1.0], {}, RuntimeInputError, "whole numbers"),
        ([[1]], {}, RuntimeInputError, "one row"),
        ([1] * 513, {}, RuntimeInputError, "at most 512 tokens.*it has 513"),
        ("Hello " * 400, {}, RuntimeInputError, "at most 512 tokens"),
        ("Hello", {"max_new_tokens": 0}, UsageError, "at least 1 token"),
        ("Hello", {"temperature": -1.0}, UsageError, "temperature"),
        ("Hello", {"stop_tokens": [600]}, RuntimeInputError, "there is 600"),
        ("Hello", {"chat": True}, BundleError, "chat template"),
        ([1], {"chat": True}, UsageError, "token ids came"),
    ],
)
def test_unfit_prompts_and_numbers_are_refused(stories, prompt, options, error, words):
    with pytest.raises(error, match=words):
        stream(stories, prompt, **options)


def test_an_empty_text_is_a_prompt_where_the_tokenizer_adds_a_token(stories, changed_bundle):
    assert generate(stories, "", max_new_tokens=2).prompt_tokens == 1
    file = stories.bundle.path / "tokenizer.json"
    without = {**json.loads(file.read_text()), "post_processor": None}
    bundle = changed_bundle({"tokenizer.json": json.dumps(without).encode()})
    with pytest.raises(RuntimeInputError, match="at least one token, but it is empty"):
        generate(Session.open(bundle), "")


@pytest.mark.slow
def test_smollm2_greedy_equals_transformers(smollm2_gguf, tmp_path):
    transformers = pytest.importorskip("transformers")
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    export(smollm2_gguf, Recipe("cpu"), tmp_path / "bundle", verify=False)
    session = Session.open(tmp_path / "bundle", exact=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    ).eval()
    prompt = "It is a truth universally acknowledged"
    found = generate(session, prompt, max_new_tokens=32)
    assert found.token_ids == hf_greedy(model, session.text.encode(prompt), 32)
