"""One request that somebody else's model answers, as a `Generator` whose pieces carry the upstream's own bytes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from hhh_router.errors import BackendError, ReaderError, RequestError, UpstreamError
from hhh_router.interfaces.proxy.frames import Frame, Frames, decoded
from hhh_router.interfaces.proxy.headers import find
from hhh_router.interfaces.proxy.instruct import instruction
from hhh_router.interfaces.proxy.upstreams import Answer
from hhh_router.interfaces.proxy.wires import Asked, Wire
from hhh_router.interfaces.proxy.wires.reading import Reply
from hhh_router.pipeline.sessions import open_session
from hhh_router.protocols import (
    Delta,
    Event,
    Finished,
    Planned,
    Planner,
    Reader,
    ReadingSession,
    Redacted,
    Steerer,
    Unread,
    Window,
)
from hhh_router.types import ChatRequest, Scores, ToolCall

CHARS_PER_TOKEN = 4  # English text under common tokenizers; an upstream does not say how it splits

Kind = Literal["stream", "whole", "error", "unread"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the upstream's answer, with the bytes it came in."""

    raw: bytes
    body: Mapping[str, Any] | None = None
    """The same as an object; None for what says nothing: comments, marks, and bodies that nobody can read."""
    ends: bool = False
    """Whether it belongs to the end of a stream."""
    carries: bool = False
    """Whether clients look for metadata in it there."""


class Exchange:
    """`Generator` over an upstream's answer: the prompt is read first, then windows of what comes.

    Args:
        reader: Reads.
        wire: What the answer is written in.
        asked: What the request says.
        ask: Sends the request on; called once, or once more where a policy regenerates.
        enforce: The answer is read at every window; otherwise once, at its end.
        hold_calls: Calls of tools are told whole, so that they can be judged before any of them leaves.
        plan_first: Nothing is asked before the prompt was read; otherwise it is read while the upstream works.
        guard_timeout_s: Longest wait for one reading.
        max_bytes: Largest answer that is read.
    """

    def __init__(
        self,
        reader: Reader,
        wire: Wire,
        asked: Asked,
        ask: Callable[[], Awaitable[Answer]],
        *,
        enforce: bool,
        plan_first: bool,
        hold_calls: bool,
        guard_timeout_s: float,
        max_bytes: int,
    ) -> None:
        self._reader = reader
        self._wire = wire
        self._asked = asked
        self._ask = ask
        self._enforce = enforce
        self._plan_first = plan_first
        self._hold_calls = hold_calls
        self._guard_timeout_s = guard_timeout_s
        self._max_bytes = max_bytes
        self._read_tokens = 0
        self._tokens = 0
        self._scores: Scores | None = None
        self._session: ReadingSession | None = None
        self._calling: list[Piece] = []  # taken and not told yet
        self._text = ""  # theirs
        self.answer: Answer | None = None
        """The upstream's answer, once its head is there."""
        self.kind: Kind | None = None
        self.reply: Reply = wire.reply()
        self.instruction: str | None = None
        """What the weights say in words, once the prompt was read."""
        self.rule: str | None = None
        """Which rule decided about the prompt."""
        self.redact: tuple[str, ...] = ()
        """What is to be taken out of the request before it goes on."""
        self.taken_out: Mapping[str, int] = {}
        """What was, and how often; told by whoever sends it on."""
        self.error_body = b""
        """Of an answer that is an error, which passes as it came."""

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        """See `Generator`. Each delta's ``raw`` is ``{"pieces": …}``, a sequence of `Piece`.

        Raises:
            UpstreamError: It failed, or answered with an error, which is then in ``error_body``.
            BackendTimeout: It did not answer in time.
        """
        self._begin_again()
        early = None if self._plan_first else asyncio.ensure_future(self._ask())
        try:
            planned = await self._plan(planner)
            yield planned
            prompt_tokens = planned.prompt_tokens
            if isinstance(planned, Planned) and planned.plan.stops:
                yield Finished(reason="content_filter", prompt_tokens=prompt_tokens, completion_tokens=0)
                return
            self.answer = await (early or self._ask())
            if self.taken_out:
                yield Redacted(counts=self.taken_out)
            async with aclosing(self._answered(self.answer, window_tokens)) as events:
                async for event in events:
                    yield event
            yield self._end(prompt_tokens)
        finally:
            await self._leave(early)

    @property
    def spent_tokens(self) -> int:
        """What the upstream says that prompt and answer took; where it says nothing, what was counted of the answer."""
        prompt, said = self.reply.usage
        return (prompt or 0) + (self._tokens if said is None else said)

    def new_reply(self) -> Reply:
        """An answer on the same wire of which nothing has come yet."""
        return self._wire.reply()

    def _begin_again(self) -> None:
        self._read_tokens = self._tokens = 0
        self._scores = None
        self._calling, self._text = [], ""
        self.answer, self.kind, self.reply = None, None, self._wire.reply()

    async def _plan(self, planner: Planner) -> Planned | Unread:
        begun = perf_counter()
        try:
            if not self._asked.messages:
                raise ReaderError("the prompt has no text that could be read")
            scores = await self._read(None)
        except ReaderError as error:
            return Unread(error=error)
        plan = planner(scores)
        self.instruction = instruction(plan.weights)
        self.rule = plan.decision.rule
        if plan.enforced:
            kinds = [kind for decision in (plan.decision, *plan.others) for kind in decision.redact]
            self.redact = tuple(dict.fromkeys(kinds))
        return Planned(
            plan=plan,
            prompt_tokens=scores.tokens,
            layers_run=scores.layers_run,
            read_ms=(perf_counter() - begun) * 1000,
        )

    async def _answered(self, answer: Answer, window_tokens: int) -> AsyncGenerator[Event, None]:
        if not 200 <= answer.status < 300:
            self.kind = "error"
            self.error_body = await self._collected(answer)
            raise UpstreamError(f"the upstream answered {answer.status}", status=answer.status)
        media = (find(answer.headers, b"content-type") or b"").partition(b";")[0].strip().lower()
        encoding = find(answer.headers, b"content-encoding")
        if media == b"text/event-stream" and encoding in (None, b"identity"):
            self.kind = "stream"
            events = self._stream(answer, window_tokens)
        elif media == b"application/json" or media.endswith(b"+json"):
            self.kind = "whole"
            events = self._whole(answer, encoding)
        else:
            self.kind = "unread"
            found = f"{media.decode('latin-1')[:80] or 'no content type'}" + (" (compressed)" if encoding else "")
            events = self._unreadable(answer, b"", f"an answer of another kind: {found}")
        async with aclosing(events):
            async for event in events:
                yield event

    async def _stream(self, answer: Answer, window_tokens: int) -> AsyncGenerator[Event, None]:
        frames = Frames(max_bytes=self._max_bytes)
        async with aclosing(answer.pieces()) as pieces:
            async for raw in pieces:
                for frame in frames.feed(raw):
                    if (delta := self._take(frame)) is None:
                        continue
                    yield delta
                    if self._enforce and self._tokens - self._read_tokens >= window_tokens:
                        yield await self._window(is_final=False)
        if not self.reply.is_over:
            raise UpstreamError("the upstream closed the stream before its end", hint="try again")
        if rest := frames.rest():
            self._calling.append(Piece(rest))
        if self._calling:
            yield self._told(self.reply.take_calls())
        if (last := await self._last_window()) is not None:
            yield last

    def _take(self, frame: Frame) -> Delta | None:
        """A piece of a stream; None while a call is held until it is whole."""
        body = frame.body()
        if body is None:
            self.reply.over = self.reply.over or frame.data is not None
            self._calling.append(Piece(frame.raw))
            return None if self._hold_calls and self.reply.is_calling else self._told(())
        if "type" not in body and frame.name is not None:
            body = {"type": frame.name, **body}
        text = self.reply.event(body)
        self._text += text
        self._calling.append(Piece(frame.raw, body, self.reply.ends(body), self.reply.carries(body)))
        if self._hold_calls and self.reply.is_calling:
            return None
        return self._told(self.reply.take_calls())

    def _told(self, calls: tuple[ToolCall, ...]) -> Delta:
        """What was taken and not told yet."""
        pieces, self._calling = tuple(self._calling), []
        text, self._text = self._text, ""
        tokens = math.ceil(len(text) / CHARS_PER_TOKEN)
        self._tokens += tokens
        return Delta(text=text, tokens=tokens, raw={"pieces": pieces}, calls=calls)

    async def _whole(self, answer: Answer, encoding: bytes | None) -> AsyncGenerator[Event, None]:
        raw = bytearray()
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                raw += piece
                if len(raw) > self._max_bytes:
                    found = f"an answer of more than {self._max_bytes:,} bytes"
                    async with aclosing(self._unreadable(answer, bytes(raw), found)) as events:
                        async for event in events:
                            yield event
                    return
        plain = decoded(bytes(raw), encoding, max_bytes=self._max_bytes)
        if plain is None:
            async with aclosing(self._unreadable(answer, bytes(raw), "a compressed answer")) as events:
                async for event in events:
                    yield event
            return
        body = Frame(b"", None, plain.decode("utf-8", "replace")).body()
        if body is None:
            raise UpstreamError("the upstream sent a body that is no JSON")
        text = self.reply.whole(body)
        self._text = text
        self._calling = [Piece(plain, body)]
        yield self._told(self.reply.take_calls())
        if (last := await self._last_window()) is not None:
            yield last

    async def _unreadable(self, answer: Answer, begun: bytes, found: str) -> AsyncGenerator[Event, None]:
        """What nobody can read: in enforce a failed reading, for the policy's ``on_error``; else it passes unread."""
        self.kind = "unread"
        self.reply.unread[f"response: {found}"] = None
        if self._enforce:
            yield Unread(error=ReaderError(f"the upstream sent {found}"))
        if begun:
            yield Delta(text="", tokens=0, raw={"pieces": (Piece(begun),)})
        async with aclosing(answer.pieces()) as pieces:
            async for raw in pieces:
                yield Delta(text="", tokens=0, raw={"pieces": (Piece(raw),)})

    async def _collected(self, answer: Answer) -> bytes:
        raw = bytearray()
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                raw += piece
                if len(raw) > self._max_bytes:
                    raise UpstreamError(f"the upstream sent an error of more than {self._max_bytes:,} bytes")
        return bytes(raw)

    async def _window(self, *, is_final: bool) -> Window | Unread:
        """Read the prompt and all of the answer so far; what was read of them before need not be read again."""
        self._read_tokens = self._tokens
        try:
            self._scores = await self._read(self.reply.text)
        except ReaderError as error:
            self._scores = None
            return Unread(error=error, completion_tokens=self._tokens)
        return Window(scores=self._scores, completion_tokens=self._tokens, is_final=is_final)

    async def _last_window(self) -> Window | Unread | None:
        """The window that ends the answer; None when there was no text, or its reading failed already."""
        if self._tokens > self._read_tokens:
            return await self._window(is_final=True)
        if self._scores is None:
            return None
        return Window(scores=self._scores, completion_tokens=self._tokens, is_final=True)

    async def _read(self, response: str | None) -> Scores:
        """One reading, of the prompt alone (None) or with the answer so far.

        What the reader cannot take is a failed reading: an upstream might well take it.

        Raises:
            ReaderError: There is too much to read, it took too long, or the reader failed.
        """
        try:
            async with asyncio.timeout(self._guard_timeout_s) as limit:
                if self._session is None:
                    self._session = open_session(self._reader, self._asked.messages)
                return await self._session.read(response)
        except ReaderError:
            raise
        except RequestError as error:
            raise ReaderError(f"the reader cannot take it: {error.message}", hint=error.hint) from error
        except BackendError as error:  # overloaded, starting again, …
            raise ReaderError(f"the reader cannot read now: {error.message}", hint=error.hint) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ReaderError(f"no reading within {self._guard_timeout_s:g} s") from error

    def _end(self, prompt_tokens: int) -> Finished:
        prompt, said = self.reply.usage
        return Finished(
            reason=self.reply.finish_reason,
            prompt_tokens=prompt_tokens if prompt is None else prompt,
            completion_tokens=self._tokens if said is None else said,
            not_inspected=tuple(self.reply.unread),
        )

    async def _leave(self, early: asyncio.Future[Answer] | None) -> None:
        """Whatever happened, the upstream does not work for nobody, and the reader keeps nothing for nobody."""
        if self._session is not None:
            self._session.close()
            self._session = None
        if early is not None and not early.done():
            early.cancel()
            await asyncio.gather(early, return_exceptions=True)
        elif early is not None and not early.cancelled() and early.exception() is None:
            early.result().close()
        if self.answer is not None:
            self.answer.close()
