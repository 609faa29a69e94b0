"""`edgeattn run` and `edgeattn eval`, through the command line's own group."""

from __future__ import annotations

import json

import pytest

from edgeattn.runtime import generate, perplexity


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Lily had a red ball. She liked to play with the dog. " * 200)
    return file


def refused(result, *words, exit_code=1):
    """One sentence on standard error, nothing on standard output."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line
    return True


def test_run_streams_the_text(edgeattn, stories, stories_bundle, story):
    done = edgeattn("run", stories_bundle, "-p", story, "-n", 20)
    assert done.exit_code == 0, done.output
    assert done.stdout == generate(stories, story, max_new_tokens=20).text + "\n"
    assert "prefill 16 tokens at" in done.stderr
    assert "decode 20 tokens at" in done.stderr
    assert "; cache 44.8 kB; " in done.stderr


def test_run_json(edgeattn, stories, stories_bundle, story):
    options = ("--temperature", "0.9", "--top-k", "40", "--top-p", "0.9", "--seed", "3")
    done = edgeattn("run", stories_bundle, "-p", story, "-n", 8, "--json", *options)
    expected = generate(
        stories, story, max_new_tokens=8, temperature=0.9, top_k=40, top_p=0.9, seed=3
    )
    found = json.loads(done.stdout)
    assert found["text"] == expected.text
    assert found["token_ids"] == list(expected.token_ids)
    assert found["finish_reason"] == "length"
    assert found["bundle"] == str(stories_bundle)
    assert found["decode_tokens_per_second"] > 0
    assert found["cache_bytes"] == expected.cache_bytes > 0


def test_run_reads_standard_input(edgeattn, stories_bundle, story):
    one = edgeattn("run", stories_bundle, "-p", "-", "-n", 5, stdin=story + "\n")
    assert one.stdout == edgeattn("run", stories_bundle, "-p", story, "-n", 5).stdout
    assert refused(edgeattn("run", stories_bundle, "-p", "-", stdin=b"\xff"), "prompt in UTF-8")


def test_run_interrupted(edgeattn, stories_bundle, story, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeattn.cli.run._print_token", interrupt)
    done = edgeattn("run", stories_bundle, "-p", story)
    assert done.exit_code == 130
    assert "ended by interrupted" in done.stderr


@pytest.mark.parametrize(
    ("options", "word", "exit_code"),
    [
        (("--chat",), "chat template", 1),
        (("--temperature", "-1"), "temperature", 2),
        (("--top-p", "2"), "top-p", 2),
        (("--threads", "0"), "threads", 2),
        (("-n", "0"), "at least 1 token", 2),
    ],
)
def test_run_refuses(edgeattn, stories_bundle, options, word, exit_code):
    done = edgeattn("run", stories_bundle, "-p", "Hello", *options)
    assert refused(done, word, exit_code=exit_code)


def test_run_without_a_bundle(edgeattn, tmp_path):
    assert refused(edgeattn("run", tmp_path / "absent", "-p", "Hello"), "nothing is there")


def test_eval(edgeattn, stories, stories_bundle, text_file):
    options = ("--text", text_file, "--windows", 3, "--length", 64)
    done = edgeattn("eval", stories_bundle, *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = perplexity(stories, text_file.read_text(), windows=3, length=64)
    assert found["perplexity"] == pytest.approx(expected.perplexity)
    assert (found["windows"], found["length"], found["mode"]) == (3, 64, "exact")

    plain = edgeattn("eval", stories_bundle, *options, "--fast")
    assert plain.stdout.startswith(f"perplexity {expected.perplexity:.3f}")
    assert "fast arithmetic" in plain.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot be read", "No such file")),
        (b"", ("the file is empty",)),
        (b" \n", ("the file is empty",)),
        (b"abc\xff", ("UTF-8 in", "byte 3")),
        (b"too short", ("enough for 0 windows",)),
    ],
)
def test_eval_refuses(edgeattn, stories_bundle, tmp_path, content, words):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert refused(edgeattn("eval", stories_bundle, "--text", file), *words)


@pytest.mark.parametrize("verb", ["run", "eval"])
def test_help_has_examples(edgeattn, verb):
    done = edgeattn(verb, "--help")
    assert done.exit_code == 0
    assert f"edgeattn {verb} ./bundle" in done.stdout
