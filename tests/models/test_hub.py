"""Hub ids against a hub of our own on this machine: what is fetched, cached, refused and said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

from edgeattn.errors import CheckpointError, MissingDependencyError
from edgeattn.models.encoder_checkpoint import read_encoder_shape
from edgeattn.models.hub import (
    HubId,
    fetch_checkpoint,
    fetch_config,
    find_hub_id,
    model_name,
    open_model,
)

TINY = HubId("someone/tiny-model")
CLI = "import sys; from edgeattn.cli import main; main(sys.argv[1:], prog_name='edgeattn')"


class Refused(NamedTuple):
    """An answer of the hub that is no file."""

    status: int
    code: str = ""


@dataclass
class FakeHub:
    """A hub on this machine, as far as huggingface_hub asks it.

    Attributes:
        url: its address.
        folders: repository -> what it holds.
        commits: revision -> commit, for all repositories.
        refused: part of a path -> the answer given instead.
        cut: file name -> bytes after which its content ends, though its size says more.
        asked: every request so far, as "METHOD /path".
    """

    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40, "v1": "b" * 40})
    refused: dict[str, Refused] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        asked = (r.partition("/resolve/")[2] for r in self.asked if r.startswith("GET"))
        return {r.partition("/")[2] for r in asked if r}

    def answer(self, method: str, path: str) -> tuple[Refused, dict[str, str], bytes]:
        """Status, headers and content for a request."""
        for part, refused in self.refused.items():
            if part in path:
                return refused, {"X-Error-Code": refused.code}, b""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._listed("/".join(parts[2:4]), parts[5])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return Refused(404), {}, b""

    def _listed(self, name: str, revision: str) -> tuple[Refused, dict[str, str], bytes]:
        if name not in self.folders:
            return Refused(404), {"X-Error-Code": "RepoNotFound"}, b""
        if (commit := self.commits.get(revision)) is None:
            return Refused(404), {"X-Error-Code": "RevisionNotFound"}, b""
        files = sorted(p for p in self.folders[name].rglob("*") if p.is_file())
        siblings = [
            {"rfilename": str(p.relative_to(self.folders[name])), "size": p.stat().st_size}
            for p in files
        ]
        content = {"id": name, "sha": commit, "siblings": siblings}
        return Refused(200), {}, json.dumps(content).encode()

    def _file(self, name: str, revision: str, file: str) -> tuple[Refused, dict[str, str], bytes]:
        path = self.folders[name] / file
        if not path.is_file():
            return Refused(404), {"X-Error-Code": "EntryNotFound"}, b""
        content = path.read_bytes()
        headers = {
            "X-Repo-Commit": self.commits.get(revision, revision),
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        return Refused(200), headers, content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of our own; huggingface_hub in this process uses it and an empty cache."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            refused, headers, content = hub.answer(self.command, path)
            begin = self._begin(len(content))
            whole = len(content) - begin
            body = content[begin : hub.cut.get(path.rpartition("/")[2])]
            self.send_response(206 if begin else refused.status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(whole if self.command == "HEAD" else len(body)))
            if begin:
                self.send_header(
                    "Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def _begin(self, size: int) -> int:
            wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
            return min(int(wanted.partition("-")[0]), size)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    point_to(hub.url, tmp_path / "hf", monkeypatch)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_to(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do before huggingface_hub is imported."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def tiny(hub: FakeHub, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A repository with a tiny model and what nobody shall fetch; gives its folder."""
    folder = tmp_path / "repository"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "onnx").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "onnx/config.json"):
        (folder / name).write_bytes(b"not for us")
    hub.folders[TINY.repository] = folder
    return folder


def refusal(hub_id: HubId = TINY, **options: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        fetch_checkpoint(hub_id, **options)
    sentence = str(raised.value)
    assert sentence.startswith("expected ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", ("HuggingFaceTB/SmolLM2-135M", None)),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("a/b.c_d-e@refs/pr/1", ("a/b.c_d-e", "refs/pr/1")),
        *(
            (text, None)
            for text in (
                *("model", "./a/b", "../b", "/a/b", "~/b", "a/b/c", "a/b/", "a//b", "a/b@", "@/b"),
                *("a/b.gguf", "a/b@x.gguf", "a/-b", "a/b-", "a/b.", "a/b--c", "a/b..c", "a/b.git"),
                *("a/b c", "a/b@../../x", "a/b@x y", "a/é", f"a/{'b' * 97}", "https://x/a/b", ""),
            )
        ),
    ],
)
def test_what_is_a_hub_id(text: str, expected: tuple[str, str | None] | None) -> None:
    assert find_hub_id(text) == (HubId(*expected) if expected else None)


def test_our_grammar_is_the_hubs() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    names = ("b", "-b", "b-", ".b", "b.", "_b_", "b--c", "b..c", "b.git", "b" * 96, "b" * 97)
    for name in names:
        try:
            validate_repo_id(f"a/{name}")
        except HFValidationError:
            assert find_hub_id(f"a/{name}") is None
        else:
            assert find_hub_id(f"a/{name}") == HubId(f"a/{name}")


def test_what_lies_on_this_disk_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_hub_id("a/b") == HubId("a/b")
    assert model_name("a/b@v1") == "b"
    assert find_hub_id(Path("a/b")) is None
    Path("a/b").mkdir(parents=True)
    assert find_hub_id("a/b") is None
    assert find_hub_id("a/b@v1") == HubId("a/b", "v1")


def test_only_what_is_read_is_fetched(hub: FakeHub, tiny: Path) -> None:
    counts: list[tuple[int, int]] = []
    snapshot = fetch_checkpoint(TINY, progress=lambda *count: counts.append(count))
    held = {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.fetched() == held
    assert {p.name for p in snapshot.path.iterdir()} == held
    assert snapshot.commit == hub.commits["main"]
    total = sum((tiny / name).stat().st_size for name in held - {"config.json"})
    assert counts[-1] == (total, total)
    assert counts == sorted(counts)


def test_the_configuration_alone(hub: FakeHub, tiny: Path) -> None:
    snapshot = fetch_config(TINY)
    assert hub.fetched() == {"config.json"}
    assert fetch_config(TINY, offline=True) == snapshot
    assert "the cache holds only a part of it" in refusal(offline=True)


def test_what_an_embedding_is_made_of_comes_with_an_encoder(hub: FakeHub, tiny: Path) -> None:
    """Else a model that pools its first token would be given the mean, which is another vector."""
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2}
    bert |= {"num_attention_heads": 4, "vocab_size": 100}
    (tiny / "config.json").write_text(json.dumps(bert))
    (tiny / "preprocessor_config.json").write_text("{}")
    (tiny / "1_Pooling").mkdir()
    (tiny / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    shape = read_encoder_shape(TINY.repository)
    assert (shape.task, shape.pooling) == ("embedding", "first")
    assert "model.safetensors" not in hub.fetched()
    fetch_checkpoint(TINY)
    assert hub.fetched() >= {"preprocessor_config.json", "1_Pooling/config.json"}
    assert not any("onnx" in name for name in hub.fetched())
    assert read_encoder_shape(TINY.repository, offline=True) == shape


def test_the_cache_serves_the_second_time(hub: FakeHub, tiny: Path) -> None:
    first = fetch_checkpoint(TINY)
    hub.asked.clear()
    assert fetch_checkpoint(TINY) == first
    assert hub.fetched() == set()
    hub.asked.clear()
    assert fetch_checkpoint(TINY, offline=True) == first
    assert hub.asked == []


def test_the_variable_means_offline_too(
    hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence = refusal()
    assert "the cache does not hold it: run once without --offline" in sentence
    assert hub.asked == []


def test_a_revision(hub: FakeHub, tiny: Path) -> None:
    assert fetch_checkpoint(HubId(TINY.repository, "v1")).commit == hub.commits["v1"]
    commit = hub.commits["v1"]
    hub.commits[commit] = commit
    exact = fetch_checkpoint(HubId(TINY.repository, commit))
    assert exact.identity() == {"hub_id": TINY.repository, "commit": commit}
    assert "revision v2 of someone/tiny-model" in refusal(HubId(TINY.repository, "v2"))
    assert "the cache does not hold it" in refusal(offline=True)  # main is another revision


def test_opened_it_is_named_after_the_repository(hub: FakeHub, tiny: Path) -> None:
    opened = open_model(str(TINY))
    assert opened.name == "tiny-model"
    assert opened.identity["hub_id"] == TINY.repository
    assert opened.identity["commit"] == hub.commits["main"]
    assert opened.identity["fingerprint"] == open_model(tiny).identity["fingerprint"]
    assert set(opened.text) == {"tokenizer.json"}


@pytest.fixture
def sharded(tiny: Path) -> Path:
    """The same repository with its weights in two files and an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, tiny / shard)
    index = {name: shard for shard, members in shards.items() for name in members}
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tiny


def test_shards(hub: FakeHub, sharded: Path) -> None:
    fetch_checkpoint(TINY)
    shards = {"model-1.safetensors", "model-2.safetensors"}
    assert shards < hub.fetched()
    assert "consolidated.safetensors" not in hub.fetched()
    opened = open_model(str(TINY), offline=True)
    assert set(opened.identity["files"]) == shards


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": [1]}', b'{"weight_map": {}}'])
def test_an_index_that_is_none(hub: FakeHub, sharded: Path, content: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        open_model(str(TINY))


def test_an_index_never_leads_to_a_pickle(hub: FakeHub, sharded: Path) -> None:
    index = {"weight_map": {"a": "pytorch_model.bin", "b": "../x.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_model(str(TINY))
    assert not {"pytorch_model.bin", "x.safetensors"} & hub.fetched()


def test_shards_of_which_one_is_missing_offline(hub: FakeHub, sharded: Path) -> None:
    snapshot = fetch_checkpoint(TINY)
    (snapshot.path / "model-2.safetensors").unlink()
    assert "only a part" in refusal(offline=True)
    hub.asked.clear()
    fetch_checkpoint(TINY)
    # Its blob is still in the cache: nothing has to be fetched again.
    assert hub.fetched() == set()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), ("it holds neither", "pickles are never loaded")),
        (("pytorch_model.bin",), ("it holds pytorch_model.bin", "pickles are never loaded")),
        (("tiny.Q4_0.gguf",), ("it holds tiny.Q4_0.gguf", "download tiny.Q4_0.gguf and pass")),
    ],
)
def test_no_safetensors(
    hub: FakeHub, tiny: Path, files: tuple[str, ...], words: tuple[str, ...]
) -> None:
    for name in ("model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (tiny / name).unlink()
    for name in files:
        (tiny / name).touch()
    sentence = refusal()
    assert all(word in sentence for word in words), sentence
    assert hub.fetched() == {"config.json"}


def test_no_configuration(hub: FakeHub, tiny: Path) -> None:
    (tiny / "config.json").unlink()
    assert "a config.json in someone/tiny-model, but the repository holds none" in refusal()


@pytest.mark.parametrize(
    ("where", "answer", "words"),
    [
        ("/api/", Refused(404, "RepoNotFound"), ("no such repository", "correct the name")),
        ("/api/", Refused(401, "RepoNotFound"), ("no such repository", "HF_TOKEN")),
        ("/api/", Refused(401), ("status 401", "HF_TOKEN")),
        ("/api/", Refused(401, "GatedRepo"), ("accept them at http", "hf auth login")),
        ("/resolve/", Refused(403, "GatedRepo"), ("accept them at http", "hf auth login")),
        ("/api/", Refused(403), ("status 403", "HF_TOKEN")),
        ("/api/", Refused(503), ("status 503", "try again later")),
        ("/resolve/", Refused(500, "x"), ("status 500", "try again later")),
    ],
)
def test_the_hub_refuses(
    hub: FakeHub,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    answer: Refused,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's own attempts
    hub.refused[where] = answer
    sentence = refusal()
    assert all(word in sentence for word in words), sentence


def test_no_such_repository(hub: FakeHub) -> None:
    assert "a folder, a .gguf file or a hub repository named a/b" in refusal(HubId("a/b"))


def test_something_else_answers(hub: FakeHub, tiny: Path) -> None:
    """A network's login page, which answers every request with a page of its own."""
    hub.answer = lambda *_: (Refused(200), {}, b"<html>Welcome</html>")  # type: ignore[method-assign]
    assert "something else answers there: check HF_ENDPOINT" in refusal()
    hub.answer = lambda *_: (Refused(200), {}, b"[]")  # type: ignore[method-assign]
    assert "something else answers there" in refusal()


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    point_to(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    sentence = refusal()
    assert "the connection failed" in sentence
    assert "--offline" in sentence


def test_a_file_that_ends_too_early(hub: FakeHub, tiny: Path) -> None:
    hub.cut["model.safetensors"] = 1000
    sentence = refusal()
    assert "the download broke" in sentence
    assert "run again" in sentence
    assert "only a part" in refusal(offline=True)
    hub.cut.clear()
    hub.asked.clear()
    fetch_checkpoint(TINY)
    assert hub.fetched() == {"model.safetensors"}, "what was complete is kept"


def test_a_file_cut_short_in_the_cache(hub: FakeHub, tiny: Path) -> None:
    snapshot = fetch_checkpoint(TINY)
    blob = (snapshot.path / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    sentence = refusal()
    assert f"remove {blob} and run again" in sentence
    blob.unlink()
    fetch_checkpoint(TINY)


def test_no_space(hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tiny)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    sentence = refusal()
    assert "0 MB are free" in sentence
    assert "HF_HOME" in sentence
    assert hub.fetched() == {"config.json"}


def test_the_disk_refuses(hub: FakeHub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert "the disk refused (No space left on device): free some space" in refusal()


def test_an_error_of_ours_is_not_hidden(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("edgeattn.models.hub._list", fail)
    with pytest.raises(ZeroDivisionError):
        fetch_checkpoint(TINY)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeattn.models.hub.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"edgeattn\[hub\]") as raised:
        open_model("models/typo")
    assert "a folder or a .gguf file at models/typo" in str(raised.value)


def test_somebody_pushes_meanwhile(hub: FakeHub, tiny: Path) -> None:
    """The files are those of one commit, the one the cache notes for the branch."""
    answer, moved = hub.answer, "c" * 40

    def push(method: str, path: str) -> Any:
        answered = answer(method, path)
        hub.commits.update({"main": moved, moved: moved})
        return answered

    hub.answer = push  # type: ignore[method-assign]
    snapshot = fetch_checkpoint(TINY)
    assert snapshot.commit == moved
    assert fetch_checkpoint(TINY, offline=True) == snapshot


@dataclass
class CommandLine:
    """The command line as processes of their own, with a hub and a cache."""

    url: str
    folder: Path

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        names = ("HF_", "HUGGING", "TRANSFORMERS")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "hf")}
        environment |= {"OMP_NUM_THREADS": "1", **variables}
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CLI, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment,
        )

    def run(self, *words: object, exit_code: int = 0, **variables: str) -> tuple[str, str]:
        """Standard output and standard error."""
        with self.start(*words, **variables) as child:
            stdout, stderr = child.communicate(timeout=120)
        assert child.returncode == exit_code, stdout + stderr
        assert "Traceback" not in stderr
        return stdout, stderr


@pytest.fixture
def command_line(hub: FakeHub, tiny: Path, tmp_path: Path) -> CommandLine:
    return CommandLine(hub.url, tmp_path)


@pytest.fixture
def bundle(
    edgeattn: Callable[..., Any],
    shared_traces: None,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The bundle of a fresh download, at the place it has by default."""
    monkeypatch.chdir(tmp_path)
    done = edgeattn("export", TINY, "--target", "cpu", "--no-verify")
    assert done.exit_code == 0, done.output
    assert "downloading" in done.stderr
    assert "B/s" not in done.stderr, "huggingface_hub's own bar"
    return tmp_path / "tiny-model-cpu-none"


def test_export_by_hub_id(hub: FakeHub, bundle: Path, edgeattn: Callable[..., Any]) -> None:
    source = json.loads((bundle / "manifest.json").read_text())["source"]
    assert source["name"] == "tiny-model"
    assert (source["hub_id"], source["commit"]) == (TINY.repository, hub.commits["main"])
    hub.asked.clear()
    words = ("export", TINY, "--target", "cpu", "--no-verify", "--offline", "-o", "again", "--json")
    done = edgeattn(*words)
    assert done.exit_code == 0, done.output
    assert "downloading" not in json.loads(done.stdout)["seconds"]
    assert hub.asked == []
    again = bundle.with_name("again") / "model.onnx.data"
    assert again.read_bytes() == (bundle / again.name).read_bytes()


def test_verify_by_hub_id(
    hub: FakeHub, tiny: Path, bundle: Path, edgeattn: Callable[..., Any]
) -> None:
    done = edgeattn("verify", bundle, "--checkpoint", TINY, "--offline")
    assert done.exit_code == 0, done.output
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "note": 1}))
    wanted, hub.commits["main"] = hub.commits["main"], "c" * 40
    done = edgeattn("verify", bundle, "--checkpoint", TINY)
    assert done.exit_code == 1
    assert f"pass the checkpoint named {TINY.repository}@{wanted}" in done.stderr


def test_a_dry_run_fetches_no_weights(hub: FakeHub, command_line: CommandLine) -> None:
    words = ("export", TINY, "--target", "cpu", "--dry-run", "--json")
    online = json.loads(command_line.run(*words)[0])
    assert hub.fetched() == {"config.json"}
    hub.asked.clear()
    by_variable = json.loads(command_line.run(*words, HF_HUB_OFFLINE="1")[0])
    by_option = json.loads(command_line.run(*words, "--offline")[0])
    assert hub.asked == []
    assert online["weight_bytes"] == by_variable["weight_bytes"] == by_option["weight_bytes"] > 0
    tokenizer = (hub.folders[TINY.repository] / "tokenizer.json").stat().st_size
    assert online["disk_bytes"] == by_option["disk_bytes"] + tokenizer  # not in the cache yet


def test_refused_before_anything_is_downloaded(
    hub: FakeHub, tiny: Path, edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    options = ("--target", "cpu", "--quant", "w4-rtn:group=128", "-o", tmp_path / "bundle")
    done = edgeattn("export", TINY, *options)
    assert done.exit_code == 1
    assert "divides the 64 inputs" in done.stderr
    assert hub.fetched() == {"config.json"}
    assert not list(tmp_path.glob("*bundle*"))


def test_interrupted_while_downloading(hub: FakeHub, tiny: Path, command_line: CommandLine) -> None:
    pytest.importorskip("torch")
    answer, reached, go_on = hub.answer, threading.Event(), threading.Event()

    def wait(method: str, path: str) -> Any:
        if method == "GET" and path.endswith("model.safetensors"):
            reached.set()
            go_on.wait(30)
        return answer(method, path)

    hub.answer = wait  # type: ignore[method-assign]
    words = ("export", TINY, "--target", "cpu", "--no-verify", "-o", "bundle")
    with command_line.start(*words) as child:
        assert reached.wait(60)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
    go_on.set()
    assert child.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not list(command_line.folder.glob("*bundle*"))
    hub.asked.clear()
    command_line.run(*words)
    assert hub.fetched() == {"model.safetensors"}
