"""An OpenAI-compatible server as the generator: the embedded model reads prompt and answer, the upstream writes it.

Tokens are not known here, so they are counted as a quarter of the characters: ``window_tokens`` of a policy are
about four times as many characters of the reply. Each window is read together with the prompt and all of the reply
so far, in one pass up to the router's layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from pydantic import SecretStr

from hhh_router.errors import BackendTimeout, ReaderError, RequestError, UpstreamError
from hhh_router.protocols import Delta, Event, Finished, FinishReason, Planned, Planner, Reader, Steerer, Unread, Window
from hhh_router.tools import as_text
from hhh_router.types import ChatRequest, Message, ReadRequest, Scores
from hhh_router.upstream.sse import EventParser

CHARS_PER_TOKEN = 4  # English text under common tokenizers; an upstream does not say how it splits
CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 256
READ_FIELDS = ("content", "refusal", "reasoning_content", "reasoning")
"""Text of a reply that is read. Everything else that arrives (tool calls, audio, …) passes, listed as not inspected."""
_KNOWN_FIELDS = frozenset({"role", *READ_FIELDS})
_KNOWN_CHOICE = frozenset({"index", "message", "delta", "finish_reason"})
_KNOWN_BODY = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})
_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


class UpstreamGenerator:
    """`Generator` that asks another server for the reply.

    Args:
        reader: Reads the prompt, and prompt and reply at every window.
        base_url: As an OpenAI client has it, such as ``http://127.0.0.1:9000/v1``.
        api_key: Sent when the client sends no ``Authorization`` of its own.
        timeout_s: Longest silence of the upstream, in seconds.
        max_bytes: Largest reply that is accepted.
    """

    def __init__(
        self,
        reader: Reader,
        base_url: str,
        *,
        api_key: SecretStr | None = None,
        timeout_s: float = 120.0,
        max_bytes: int = 4_000_000,
    ) -> None:
        self._reader = reader
        self._base_url = base_url.rstrip("/")
        self._shown = urlsplit(base_url).netloc
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s)
        self._max_bytes = max_bytes
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        """Read the prompt and plan; then pass the upstream's reply on, with a window read every ``window_tokens``.

        A client that wants no stream gets the upstream's whole reply as one delta.

        Raises:
            UpstreamError: The upstream failed, or answered with an error.
            BackendTimeout: The upstream did not answer in time.
        """
        prompt = readable(request.messages)
        begun = perf_counter()
        prompt_tokens = 0
        try:
            scores = await _read(self._reader, ReadRequest(messages=prompt))
        except ReaderError as error:
            yield Unread(error=error)
        else:
            plan = planner(scores)
            prompt_tokens = scores.tokens
            read_ms = (perf_counter() - begun) * 1000
            yield Planned(plan=plan, prompt_tokens=prompt_tokens, layers_run=scores.layers_run, read_ms=read_ms)
            if plan.stops:
                yield Finished(reason="content_filter", prompt_tokens=prompt_tokens, completion_tokens=0)
                return
        reply = _Reply(self._reader, prompt)
        async with aclosing(self._chunks(request)) as chunks:
            async for chunk in chunks:
                yield reply.take(chunk)
                if reply.unread_tokens >= window_tokens:
                    yield await reply.window(is_final=False)
        if (last := await reply.last_window()) is not None:
            yield last
        yield reply.end(prompt_tokens=prompt_tokens)

    async def list_models(self, authorization: str | None) -> Mapping[str, Any]:
        """The upstream's own answer to ``GET /models``.

        Raises:
            UpstreamError: It failed, or answered with an error.
            BackendTimeout: It did not answer in time.
        """
        async with self._sent("GET", "/models", authorization) as response:
            return await self._json(response)

    async def aclose(self) -> None:
        """Close the connections; calling it again does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _chunks(self, request: ChatRequest) -> AsyncGenerator[Mapping[str, Any], None]:
        """The upstream's reply: its chunks, or its one body when the client wants no stream."""
        body = dict(request.passthrough)
        async with self._sent("POST", "/chat/completions", request.authorization, body) as response:
            is_stream = response.content_type == "text/event-stream"
            if is_stream != bool(body.get("stream")):
                raise UpstreamError(
                    f"upstream {self._shown} answered with {response.content_type}, which was not asked for"
                )
            if not is_stream:
                yield await self._json(response)
                return
            parser = EventParser(max_bytes=self._max_bytes)
            async for piece in response.content.iter_any():
                for data in parser.feed(piece):
                    if data == "[DONE]":
                        return
                    yield self._chunk(data)
            raise UpstreamError(f"upstream {self._shown} closed the stream before its end", hint="try again")

    def _chunk(self, data: str) -> Mapping[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise UpstreamError(f"upstream {self._shown} sent a chunk that is no JSON") from error
        if not isinstance(chunk, dict):
            raise UpstreamError(f"upstream {self._shown} sent a chunk that is no object")
        if "error" in chunk:
            raise UpstreamError(f"upstream {self._shown} broke off: {_message(chunk)}", body=chunk)
        return chunk

    @asynccontextmanager
    async def _sent(
        self, method: str, path: str, authorization: str | None, body: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout,
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),  # one caller's cookies are not another's
            )
        headers = {"accept": "text/event-stream, application/json"}
        if authorization is not None:
            headers["authorization"] = authorization
        elif self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key.get_secret_value()}"
        try:
            async with self._session.request(
                method, self._base_url + path, json=body, headers=headers, allow_redirects=False
            ) as response:
                if not 200 <= response.status < 300:
                    raise await self._failure(response)
                yield response
        except TimeoutError as error:
            raise BackendTimeout(f"upstream {self._shown} did not answer in time", hint="try again later") from error
        except aiohttp.ClientError as error:
            raise UpstreamError(
                f"upstream {self._shown} cannot be reached or broke off ({type(error).__name__})",
                hint="check that it runs and that --upstream names it",
            ) from error

    async def _failure(self, response: aiohttp.ClientResponse) -> UpstreamError:
        try:
            body = await self._json(response)
        except UpstreamError:
            body = None
        said = f": {_message(body)}" if body else ""
        return UpstreamError(
            f"upstream {self._shown} answered {response.status}{said}",
            status=response.status,
            body=body,
            retry_after=response.headers.get("retry-after"),
        )

    async def _json(self, response: aiohttp.ClientResponse) -> Mapping[str, Any]:
        raw = bytearray()
        async for piece in response.content.iter_any():
            raw += piece
            if len(raw) > self._max_bytes:
                raise UpstreamError(f"upstream {self._shown} sent more than {self._max_bytes:,} bytes")
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise UpstreamError(f"upstream {self._shown} sent a body that is no JSON") from error
        if not isinstance(body, dict):
            raise UpstreamError(f"upstream {self._shown} sent a body that is no object")
        return body


class _Reply:
    """The upstream's reply so far: what was read of it, and what was not."""

    def __init__(self, reader: Reader, prompt: tuple[Message, ...]) -> None:
        self._reader = reader
        self._prompt = prompt
        self._text: list[str] = []
        self._tokens = 0
        self._read_tokens = 0  # covered by the last window
        self._scores: Scores | None = None  # of the last window
        self._reason: FinishReason = "stop"
        self._usage: Mapping[str, Any] = {}
        self._unread: dict[str, None] = {}

    @property
    def unread_tokens(self) -> int:
        """Tokens since the last window."""
        return self._tokens - self._read_tokens

    def take(self, chunk: Mapping[str, Any]) -> Delta:
        """A chunk of a stream, or a whole reply."""
        content, text = self._look_into(chunk)
        tokens = math.ceil(len(text) / CHARS_PER_TOKEN)
        self._text.append(text)
        self._tokens += tokens
        return Delta(text=content, tokens=tokens, raw=chunk)

    async def window(self, *, is_final: bool) -> Window | Unread:
        """Read the prompt and all of the reply so far."""
        self._read_tokens = self._tokens
        try:
            self._scores = await _read(self._reader, ReadRequest(messages=self._prompt, response="".join(self._text)))
        except ReaderError as error:
            self._scores = None
            return Unread(error=error, completion_tokens=self._tokens)
        return Window(scores=self._scores, completion_tokens=self._tokens, is_final=is_final)

    async def last_window(self) -> Window | Unread | None:
        """The window that ends the reply; None when there was no text, or its reading failed already."""
        if self.unread_tokens:
            return await self.window(is_final=True)
        if self._scores is None:
            return None
        return Window(scores=self._scores, completion_tokens=self._tokens, is_final=True)

    def end(self, *, prompt_tokens: int) -> Finished:
        """The end, with the upstream's own token counts where it told them."""
        return Finished(
            reason=self._reason,
            prompt_tokens=_count(self._usage.get("prompt_tokens"), prompt_tokens),
            completion_tokens=_count(self._usage.get("completion_tokens"), self._tokens),
            not_inspected=tuple(self._unread),
        )

    def _look_into(self, chunk: Mapping[str, Any]) -> tuple[str, str]:
        """The reply's own text, and all text of the chunk that is to be read; notes the rest as not inspected.

        Raises:
            UpstreamError: The chunk is not built as OpenAI's are, so nobody could tell what it says.
        """
        if isinstance(usage := chunk.get("usage"), Mapping):
            self._usage = usage
        self._note("", chunk, _KNOWN_BODY)
        content, read = "", ""
        for i, choice in enumerate(_rows(chunk.get("choices"))):
            self._reason = _FINISH_REASONS.get(str(choice.get("finish_reason")), self._reason)
            self._note(f"choices[{i}].", choice, _KNOWN_CHOICE)
            for part in ("message", "delta"):
                [fields] = _rows([choice.get(part) or {}])
                read += "".join(_spoken(fields.get(f)) for f in READ_FIELDS)
                content += _spoken(fields.get("content"))
                self._note(f"choices[{i}].{part}.", fields, _KNOWN_FIELDS)
        return content, read

    def _note(self, where: str, fields: Mapping[str, Any], known: frozenset[str]) -> None:
        self._unread |= dict.fromkeys(f"{where}{name}" for name, value in fields.items() if value and name not in known)


def _rows(value: object) -> Sequence[Mapping[str, Any]]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    raise UpstreamError("the upstream sent a chunk that is not built as OpenAI's are")


def _spoken(value: object) -> str:
    """What a field says. Some servers send parts in place of text: they are read as the JSON they are.

    >>> _spoken(None), _spoken("Hi"), _spoken([{"type": "text", "text": "Hi"}])
    ('', 'Hi', '[{"type": "text", "text": "Hi"}]')
    """
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


async def _read(reader: Reader, request: ReadRequest) -> Scores:
    """One reading. What the reader cannot take is a failed reading: an upstream might well take it.

    Raises:
        ReaderError: There is nothing to read, too much, or the reader failed.
    """
    if not request.messages:
        raise ReaderError("the prompt has no text that could be read")
    try:
        [scores] = await reader.read([request])
    except RequestError as error:
        raise ReaderError(f"the reader cannot take it: {error.message}", hint=error.hint) from error
    return scores


def readable(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation as the router's chat template takes it, whatever order an upstream's clients send.

    Turns without text are left out, later system turns and unknown roles are read as the user's, and turns of the
    same side that follow each other become one.

    >>> [m.role for m in readable([Message(role="assistant", content="Hi"), Message(role="system", content="Be kind")])]
    ['assistant', 'user']
    """
    turns: list[Message] = []
    for message in as_text(messages, ()):
        if not message.content.strip():
            continue
        role = message.role
        if role not in ("user", "assistant", "tool") and not (role == "system" and not turns):
            role = "user"
        if turns and turns[-1].role == role:
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n{message.content}")
        else:
            turns.append(Message(role=role, content=message.content))
    return tuple(turns)


def _count(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _message(body: Mapping[str, Any]) -> str:
    error = body.get("error")
    said = error.get("message") if isinstance(error, Mapping) else error
    return str(said)[:500] if said else "no message"
