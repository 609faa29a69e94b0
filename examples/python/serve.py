"""Serves bundles with OpenAI's API: completions of decoders, embeddings of encoders.

    pip install 'edgeattn[ort,examples]'
    python serve.py ./SmolLM2-135M-cpu-w4-rtn ./MiniLM-cpu --port 8000

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="SmolLM2-135M-cpu-w4-rtn", prompt="It is a truth")

A model is called what its folder is called. An example to start from, not a server for strangers:
it knows no keys and no TLS, and headers that trickle in are for the proxy before it to refuse.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import EdgeattnError, RuntimeInputError, UsageError
from edgeattn.runtime import EncoderSession, Session, TokenStream, stream

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")

# Texts that pass an encoder before others have their turn.
ROWS = 16


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        body_bytes: of a request.
        seconds: for its body to arrive, for its answer to be made, and for each piece of the answer
            to be taken.
        clients: requests at once; further ones are told to come later.
    """

    body_bytes: int = 1 << 20
    seconds: float = 120.0
    clients: int = 64


class _Asked(BaseModel):
    # What we would not heed is refused, not left out in silence.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    user: str | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionAsked(_Asked):
    """The body of /v1/completions; names and defaults are OpenAI's."""

    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    n: Literal[1] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None


class EmbeddingsAsked(_Asked):
    """The body of /v1/embeddings; names and defaults are OpenAI's."""

    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"


class Refusal(Exception):
    """A request that is answered with an error object."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """The answer; ASCII, because a client may have sent what UTF-8 cannot express."""
        return Response(json.dumps(self.body), self.status, media_type="application/json")


def refusal_of(error: Exception) -> Refusal:
    """The error object for what a handler raised."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        names = [str(part) for part in first["loc"][1:]]
        message = f"{'.'.join(names) or 'the body'}: {first['msg']}"
        return Refusal(400, message, "invalid_value", names[0] if names else None)
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), "http_error")
    if isinstance(error, RuntimeInputError | UsageError):
        return Refusal(400, str(error), "invalid_value")
    return Refusal(500, str(error), "model_error")


class Guard:
    """What stands before the app: bounds on clients, bodies and time, whatever the path."""

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits) -> None:
        self._app, self._limits, self._active = app, limits, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on, with its whole body, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._active += 1
        try:
            if self._active > self._limits.clients:
                raise Refusal(503, "too many requests at once; try again later", "overloaded")
            body = await self._body(receive)
            if body is not None:
                await self._answer(scope, body, receive, send)
        except Refusal as refusal:
            response = refusal.response()
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
        finally:
            self._active -= 1

    async def _body(self, receive: Receive) -> bytes | None:
        """The body; None of a client that left."""
        try:
            return await asyncio.wait_for(self._read(receive), self._limits.seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, "the request took too long to arrive", "timeout") from None

    async def _read(self, receive: Receive) -> bytes | None:
        body, more, most = bytearray(), True, self._limits.body_bytes
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise Refusal(413, f"the request is larger than {most} bytes", "too_large")
        return bytes(body)

    async def _answer(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        stalled = False

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        async def timed(message: Message) -> None:
            nonlocal stalled
            try:
                await asyncio.wait_for(send(message), self._limits.seconds)
            except asyncio.TimeoutError:
                stalled = True
                raise

        try:
            await self._app(scope, replay, timed)
        except Exception:
            if not stalled:  # else the client does not read; uvicorn closes the connection
                raise


class Until:
    """Text up to the first stop sequence; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.reached = stops, "", False

    def push(self, text: str, *, last: bool = False) -> str:
        """Takes a piece, gives what is certain."""
        held = self._held + text
        if found := [place for stop in self._stops if (place := held.find(stop)) >= 0]:
            self.reached, self._held = True, ""
            return held[: min(found)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        certain = len(held) - (0 if last else max(begun, default=0))
        self._held = held[certain:]
        return held[:certain]


class Completion:
    """One continuation, and the objects that tell of it."""

    def __init__(self, asked: CompletionAsked, tokens: TokenStream, stops: Sequence[str]) -> None:
        self._asked, self.tokens, self.until = asked, tokens, Until(stops)
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    def finish_reason(self) -> str:
        """In OpenAI's words, which call a full context a length."""
        ended = self.until.reached or self.tokens.result().finish_reason == "stop"
        return "stop" if ended else "length"

    def usage(self) -> dict[str, int]:
        """Tokens read and generated, those behind a stop sequence included."""
        result = self.tokens.result()
        read, new = result.prompt_tokens, len(result.token_ids)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def told(self, text: str | None, finish_reason: str | None, **more: Any) -> dict[str, Any]:
        """An answer or a chunk of one; without a choice where `text` is None."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._asked.model,
            "choices": [] if text is None else [choice],
            **more,
        }


class Server:
    """The loaded models, and the one thread that runs them.

    One token, or a few texts, at a time: requests take turns, so that a long one delays no other
    for long, and no two compete for the same cores.
    """

    def __init__(self, sessions: dict[str, Session | EncoderSession], limits: Limits) -> None:
        self._sessions, self._limits = sessions, limits
        self._thread = ThreadPoolExecutor(1, "model")
        self._started = int(time.time())

    async def models(self) -> dict[str, Any]:
        """/v1/models."""
        return {"object": "list", "data": [await self.model(name) for name in self._sessions]}

    async def model(self, name: str) -> dict[str, Any]:
        """/v1/models/NAME."""
        self._find(name, object, "")
        return {"id": name, "object": "model", "created": self._started, "owned_by": "edgeattn"}

    async def complete(self, asked: CompletionAsked, request: Request) -> Response:
        """/v1/completions."""
        session = self._find(asked.model, Session, "generates no text")
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        if len(stops) > 4 or not all(stops):
            raise Refusal(400, "stop: up to 4 texts, none empty", "invalid_value", "stop")
        options = {
            "max_new_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "seed": secrets.randbelow(1 << 31) if asked.seed is None else asked.seed,
        }
        tokens = await self._run(lambda: stream(session, asked.prompt, **options))
        completion = Completion(asked, tokens, stops)
        pieces = self._pieces(completion)
        if asked.stream:
            events = self._events(completion, pieces, asked)
            return StreamingResponse(events, media_type="text/event-stream")
        text = ""
        async for piece in pieces:
            text += piece
            if await request.is_disconnected():
                break
        content = completion.told(text, completion.finish_reason(), usage=completion.usage())
        return JSONResponse(content)

    async def embed(self, asked: EmbeddingsAsked, request: Request) -> Response:
        """/v1/embeddings."""
        session = self._find(asked.model, EncoderSession, "embeds no text")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not texts:
            raise Refusal(400, "input: there is no text", "invalid_value", "input")
        deadline, found, tokens = time.monotonic() + self._limits.seconds, [], 0
        for first in range(0, len(texts), ROWS):
            some = texts[first : first + ROWS]
            found.extend(await self._run(lambda some=some: session.embed(some)))
            tokens += sum(len(session.text.encode(text)) for text in some)
            self._check(deadline)
            if await request.is_disconnected():
                break
        as_floats = asked.encoding_format == "float"
        vectors = [
            vector.tolist() if as_floats else base64.b64encode(vector.astype("<f4")).decode()
            for vector in found
        ]
        data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})

    def _find(self, name: str, kind: type[Result], lack: str) -> Result:
        session = self._sessions.get(name)
        if session is None:
            known = ", ".join(self._sessions)
            raise Refusal(404, f"no such model: known are {known}", "model_not_found", "model")
        if not isinstance(session, kind):
            raise Refusal(400, f"the model {lack}", "invalid_value", "model")
        return session

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _pieces(self, completion: Completion) -> AsyncIterator[str]:
        """The text as it comes; who stops reading stops the model."""
        deadline = time.monotonic() + self._limits.seconds
        while not completion.until.reached:
            token = await self._run(lambda: next(completion.tokens, None))
            if token is None:
                break
            self._check(deadline)
            if text := completion.until.push(token.text):
                yield text
        if rest := completion.until.push("", last=True):
            yield rest

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            most = self._limits.seconds
            raise Refusal(408, f"the answer took more than {most:g} s; ask for less", "timeout")

    async def _events(
        self, completion: Completion, pieces: AsyncIterator[str], asked: CompletionAsked
    ) -> AsyncIterator[str]:
        """Server-sent events; an error in the middle is an event, as the status is sent already."""
        try:
            async for piece in pieces:
                yield _event(completion.told(piece, None))
            yield _event(completion.told("", completion.finish_reason()))
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(completion.told(None, None, usage=completion.usage()))
        except (Refusal, EdgeattnError) as error:
            yield _event(refusal_of(error).body)
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def make_app(sessions: dict[str, Session | EncoderSession], limits: Limits) -> Guard:
    """The ASGI application."""
    app, server = FastAPI(title="edgeattn"), Server(sessions, limits)

    async def refuse(request: Request, error: Exception) -> Response:
        return refusal_of(error).response()

    for kind in (Refusal, EdgeattnError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)

    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.post("/v1/completions", response_model=None)(server.complete)
    app.post("/v1/embeddings", response_model=None)(server.embed)
    return Guard(app, limits)


def open_session(path: Path) -> Session | EncoderSession:
    """Loads a bundle as what it is."""
    bundle = Bundle.open(path)
    return EncoderSession.open(bundle) if bundle.is_encoder else Session.open(bundle)


def main() -> None:
    """Reads the command line and serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve bundles with OpenAI's API.")
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds")
    given = parser.parse_args()
    try:
        sessions = {path.resolve().name: open_session(path) for path in given.bundles}
    except EdgeattnError as error:
        parser.exit(1, f"{error}\n")
    uvicorn.run(make_app(sessions, Limits(seconds=given.timeout)), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
