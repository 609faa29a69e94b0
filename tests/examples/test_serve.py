"""examples/python/serve.py answers a real OpenAI client, and refuses what it cannot serve."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import openai
import uvicorn
from encoders import save_embedder

from edgeattn.runtime import EncoderSession, Session, generate

PROMPT = "Once upon a time"
SECONDS = 3.0  # of the server's patience here


@pytest.fixture(scope="module")
def serve(repository: Path) -> ModuleType:
    """The example as a module."""
    file = repository / "examples" / "python" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_example", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "serve_example", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A tiny encoder's bundle that embeds."""
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    folder = tmp_path_factory.mktemp("embedder")
    save_embedder(folder / "model", tiny_checkpoint / "tokenizer.json")
    export(folder / "model", Recipe("cpu", batch=4), folder / "out", verify=False)
    return folder / "out"


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Path, embedder: Path) -> dict[str, Any]:
    decoder = Session.open(tiny_bundle, threads=1)
    return {"decoder": decoder, "embedder": EncoderSession.open(embedder, threads=1)}


@pytest.fixture(scope="module")
def address(serve: ModuleType, sessions: dict[str, Any]) -> Iterator[str]:
    """Where a server of both models listens."""
    limits = serve.Limits(body_bytes=10_000, seconds=SECONDS, clients=12)
    listening = socket.create_server(("127.0.0.1", 0))
    app = serve.make_app(sessions, limits)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    host, port = listening.getsockname()
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    listening.close()


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(sessions: dict[str, Any]) -> Callable[..., Any]:
    """What the runtime itself continues a prompt with."""

    def make(prompt: Any = PROMPT, count: int = 20, **options: Any) -> Any:
        return generate(sessions["decoder"], prompt, max_new_tokens=count, **options)

    return make


def test_models(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["decoder", "embedder"]
    assert [client.models.retrieve(model.id) for model in listed] == listed


@pytest.mark.parametrize("name", ["absent", "some/absent", "décodeur", "decoder "])
def test_an_unknown_model(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="known are decoder, embedder") as refusal:
        client.models.retrieve(name)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_completion(client: openai.OpenAI, expected: Callable[..., Any]) -> None:
    found = client.completions.create(model="decoder", prompt=PROMPT, max_tokens=20, temperature=0)
    whole = expected()
    assert found.choices[0].text == whole.text != ""
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.prompt_tokens == whole.prompt_tokens
    assert found.usage.completion_tokens == len(whole.token_ids) == 20


def test_options_and_token_ids(client: openai.OpenAI, expected: Callable[..., Any]) -> None:
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    found = client.completions.create(model="decoder", prompt=[5, 6, 7], max_tokens=20, **options)
    assert found.choices[0].text == expected([5, 6, 7], **options).text
    assert found.choices[0].text != expected([5, 6, 7]).text


def test_stream(client: openai.OpenAI, expected: Callable[..., Any]) -> None:
    chunks = list(
        client.completions.create(
            model="decoder",
            prompt=PROMPT,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *texts, end, usage = chunks
    assert len(texts) > 5
    assert "".join(chunk.choices[0].text for chunk in texts) == expected().text
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_stop(client: openai.OpenAI, expected: Callable[..., Any], streaming: bool) -> None:
    """A stop sequence across two tokens; nothing of it is sent."""
    whole = expected().text
    stop = whole[8:11]
    found = client.completions.create(
        model="decoder", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, stream=streaming
    )
    chunks = list(found) if streaming else [found]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_sequences_held_back(serve: ModuleType) -> None:
    until = serve.Until(["END", "NDX"])
    assert [until.push(text) for text in ("aE", "N", "xE", "ND!")] == ["a", "", "ENx", ""]
    assert until.reached
    until = serve.Until(["END"])
    assert (until.push("aEN"), until.push("", last=True), until.reached) == ("a", "EN", False)


@pytest.mark.parametrize("encoding", ["float", None])  # the client itself asks for base64
def test_embeddings(client: openai.OpenAI, sessions: dict[str, Any], encoding: str | None) -> None:
    texts = [f"text {'x' * (i % 7)}" for i in range(20)]
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model="embedder", input=texts, **options)
    vectors = np.array([one.embedding for one in found.data])
    np.testing.assert_allclose(vectors, sessions["embedder"].embed(texts), atol=1e-5)
    assert found.usage.prompt_tokens == sum(
        len(sessions["embedder"].text.encode(text)) for text in texts
    )
    (one,) = client.embeddings.create(model="embedder", input=texts[1], **options).data
    np.testing.assert_allclose(one.embedding, vectors[1], atol=1e-5)


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "none"}, 404, "known are decoder, embedder"),
    ({"model": "embedder"}, 400, "generates no text"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "x" * 300}, 400, "context"),
    ({"prompt": [1, 999]}, 400, "999"),
    ({"prompt": ["a", "b"]}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "surrogate"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"seed": -1}, 400, "seed"),
    ({"n": 2}, 400, "n: "),
    ({"stop": [""]}, 400, "stop"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"\ud800": 3}, 400, "unicode"),
]


@pytest.mark.parametrize(("changes", "status", "word"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests(address: str, changes: dict[str, Any], status: int, word: str) -> None:
    asked = {"model": "decoder", "prompt": PROMPT, "max_tokens": 4, **changes}
    for more in ({}, {"stream": True}):
        answer = request(f"{address}/v1/completions", json.dumps({**asked, **more}))
        assert refused(answer, status, word)


def request(url: str, body: bytes | str | None = None) -> tuple[int, str]:
    """Status and body of the answer to a POST, or to a GET without a body."""
    content = body.encode() if isinstance(body, str) else body
    asked = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def refused(answer: tuple[int, str], status: int, word: str) -> bool:
    assert answer[0] == status, answer
    error = json.loads(answer[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]
    return True


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        (b"[" * 9_000, 400),
        (b"x" * 10_001, 413),
    ],
)
@pytest.mark.parametrize("path", ["completions", "embeddings"])
def test_malformed_bodies(address: str, path: str, body: bytes, status: int) -> None:
    answer = request(f"{address}/v1/{path}", body)
    assert refused(answer, status, "")


def test_bad_embeddings(client: openai.OpenAI, address: str) -> None:
    for texts in ([], [""], ["x" * 5000], [[1, 2]]):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="embedder", input=texts)
    with pytest.raises(openai.BadRequestError, match="embeds no text"):
        client.embeddings.create(model="decoder", input="a")
    with pytest.raises(openai.NotFoundError, match="known are"):
        client.embeddings.create(model="none", input="a")
    assert refused(request(f"{address}/v1/nothing"), 404, "Not Found")
    assert refused(request(f"{address}/v1/completions"), 405, "Method Not Allowed")


def test_a_body_that_does_not_come(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
        )
        answer = connection.recv(65536)
        while b'"code"' not in answer and (more := connection.recv(65536)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"timeout"' in answer


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Makes each run of a model take that long; gives the moments of the runs."""
    run, moments = Session.run, []

    def slow(*given: Any, **more: Any) -> Any:
        moments.append(time.monotonic())
        time.sleep(seconds)
        return run(*given, **more)

    monkeypatch.setattr(Session, "run", slow)
    return moments


def test_an_answer_that_takes_too_long(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, SECONDS / 10)
    asked = {"model": "decoder", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    with pytest.raises(openai.APIStatusError, match="took more than") as refusal:
        client.completions.create(**asked)
    assert refusal.value.status_code == 408
    with pytest.raises(openai.APIError, match="took more than"):
        list(client.completions.create(**asked, stream=True))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves(
    address: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """The model stops long before the 100 tokens, and the time they may take, are over."""
    moments = slowed(monkeypatch, 0.02)
    asked = {"model": "decoder", "prompt": PROMPT, "max_tokens": 100, "stream": streaming}
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(asked).encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        began = time.monotonic()
        while len(moments) < 5 and time.monotonic() < began + 20:
            time.sleep(0.01)
    left, count = time.monotonic(), 0
    while count != len(moments) and time.monotonic() < left + 20:
        count = len(moments)
        time.sleep(0.5)
    assert 5 <= count < 60
    monkeypatch.undo()
    assert client.completions.create(model="decoder", prompt=PROMPT).choices[0].text


def test_too_many_clients(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.05)
    asked = json.dumps({"model": "decoder", "prompt": PROMPT, "max_tokens": 2})

    def ask(_: int) -> int:
        return request(f"{address}/v1/completions", asked)[0]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert set(found) == {200, 503}
    assert found.count(200) >= 12


def test_an_answer_that_is_not_read(serve: ModuleType) -> None:
    """A client that takes nothing holds its place no longer than the limit."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        await asyncio.sleep(60)

    guard = serve.Guard(app, serve.Limits(seconds=0.05))
    asyncio.run(asyncio.wait_for(guard({"type": "http"}, receive, send), 30))


def load(address: str, seconds: float, expected: Callable[..., Any], texts: Any) -> int:
    """Eight clients at once, every answer checked; how many answers there were."""
    until = time.monotonic() + seconds
    prompts = [f"{PROMPT} {i}" for i in range(8)]
    wanted = [expected(prompt, 8).text for prompt in prompts]

    def ask(i: int) -> int:
        count = 0
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            while time.monotonic() < until or count < 4:
                asked = {"model": "decoder", "prompt": prompts[i], "max_tokens": 8}
                streaming = count % 2 == 1
                found = client.completions.create(**asked, temperature=0, stream=streaming)
                chunks = list(found) if streaming else [found]
                assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[i]
                (vector,) = client.embeddings.create(model="embedder", input=prompts[i]).data
                np.testing.assert_allclose(vector.embedding, texts[i], atol=1e-5)
                count += 2
        return count

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(ask, range(8)))


def test_eight_clients(
    address: str, expected: Callable[..., Any], sessions: dict[str, Any]
) -> None:
    vectors = sessions["embedder"].embed([f"{PROMPT} {i}" for i in range(8)])
    assert load(address, 3, expected, vectors) >= 8 * 4


@pytest.mark.slow
def test_eight_clients_for_a_minute(
    address: str, expected: Callable[..., Any], sessions: dict[str, Any]
) -> None:
    """Memory after a minute is that after a few seconds; clients and server share the process."""
    vectors = sessions["embedder"].embed([f"{PROMPT} {i}" for i in range(8)])
    load(address, 10, expected, vectors)
    before = psutil.Process().memory_info().rss
    assert load(address, 60, expected, vectors) > 100
    assert psutil.Process().memory_info().rss - before < 32e6
