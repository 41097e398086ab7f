"""``annotate`` and ``enforce``: the upstream's answer comes through the pipeline, in the bytes it was sent in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Literal

from hhh_router.interfaces.proxy.exchange import Exchange, Piece
from hhh_router.interfaces.proxy.frames import with_body
from hhh_router.interfaces.proxy.headers import encoded, passing, replaced
from hhh_router.interfaces.proxy.incoming import Out
from hhh_router.interfaces.server.chat import STREAM_HEADERS
from hhh_router.interfaces.server.dialect import Dialect
from hhh_router.interfaces.server.http import dump
from hhh_router.pipeline import ChatDelta, ChatFinished, ChatStarted
from hhh_router.pipeline.chat import run_chat
from hhh_router.pipeline.parts import Parts
from hhh_router.trace.block import Metadata
from hhh_router.types import Action

_FRAMING = frozenset({b"content-length", b"content-encoding", b"etag", b"content-md5", b"digest"})
"""Headers that speak of the exact bytes of a body that was changed, or taken out of its compression."""
_OURS = b"x-hhh-"


class Guarded:
    """One answer on its way to the client.

    Args:
        parts: The deployment, with ``exchange`` as its generator.
        exchange: Where the answer comes from.
        call: What is asked, and how our own answers are put.
        out: Where it goes.
        block: Where the caller is told.
        enforce: Whether pieces may be held back by the pipeline; otherwise all leave as they come.
        escalate: Answers in place of what ``escalate`` stopped before any of it left; None where nobody is there to.
        extra: Further headers, read when the first byte leaves.
    """

    def __init__(
        self,
        parts: Parts,
        exchange: Exchange,
        call: Dialect,
        out: Out,
        *,
        block: Literal["body", "headers", "none"],
        enforce: bool,
        escalate: Callable[[Metadata], Awaitable[Metadata | None] | None],
        extra: Mapping[str, str],
    ) -> None:
        self._parts = parts
        self._exchange = exchange
        self._call = call
        self._out = out
        self._block = block
        self._enforce = enforce
        self._escalate = escalate
        self._extra = extra
        self._first: Metadata | None = None
        self._held: list[Piece] = []
        self._whole: Piece | None = None
        self._has = exchange.new_reply()
        """What the client has got of the upstream's answer: less than what was read of it."""
        self._has_begun = False

    async def run(self) -> Metadata | None:
        """Answer; returns the final record.

        Raises:
            RequestError, BackendError: As `run_chat` does; what was cleared has left by then.
        """
        stream = self._call.stream or not self._enforce
        async with aclosing(run_chat(self._parts, self._call.request, stream=stream)) as events:
            async for event_ in events:
                if isinstance(event_, ChatStarted):
                    self._first = event_.metadata
                elif isinstance(event_, ChatDelta):
                    await self._take(event_)
                else:
                    return await self._end(event_)
        return None

    async def _take(self, delta: ChatDelta) -> None:
        if delta.waits:
            await self._keep_alive()
        if delta.raw is None:
            return  # the policy's message: it is put in its shape when the final record is there
        for piece in delta.raw["pieces"]:
            match self._exchange.kind:
                case "stream":
                    await self._pass(piece)
                case "unread":
                    await self._begin_passing(changed=False)
                    await self._out.part(piece.raw)
                case _:
                    self._whole = piece

    async def _keep_alive(self) -> None:
        """While a call is held: in a stream the wire's own sign of life; whole answers just wait."""
        if self._call.stream and self._exchange.kind == "stream":
            await self._begin_passing(changed=True)
            await self._out.part(self._call.ping)

    async def _pass(self, piece: Piece) -> None:
        """A piece of a stream. What belongs to its end waits for the final record."""
        if piece.ends or (self._held and not piece.body):
            self._held.append(piece)
            return
        await self._let_go()
        if not self._out.begun:
            await self._begin_passing(changed=True)
        await self._out.part(self._with_first(piece))

    def _with_first(self, piece: Piece) -> bytes:
        if piece.body is not None:
            self._has_begun = True
            self._has.event(piece.body)
        if self._first is None or piece.body is None or self._block != "body":
            return piece.raw
        block, self._first = self._first, None
        return self._blocked(piece, block)

    async def _let_go(self) -> None:
        held, self._held = self._held, []
        for piece in held:
            if not self._out.begun:
                await self._begin_passing(changed=True)
            await self._out.part(self._with_first(piece))

    def _blocked(self, piece: Piece, block: Metadata) -> bytes:
        assert piece.body is not None
        return with_body(piece.raw, self._exchange.reply.with_block(piece.body, block.as_json()))

    async def _end(self, done: ChatFinished) -> Metadata | None:
        stopped = done.refusal is not None
        if stopped and not self._out.begun and done.metadata.action == Action.ESCALATE:
            again = self._escalate(done.metadata)
            if again is not None:
                return await again
        if stopped and (self._has_begun or self._held) and self._out.begun and self._exchange.kind == "stream":
            await self._let_go()
            assert done.refusal is not None
            await self._out.part(b"".join(self._has.ending(done.refusal, done)), more=False)
        elif stopped:
            await self._refuse(done)
        elif self._exchange.kind == "stream":
            await self._end_stream(done)
        elif self._whole is not None:
            await self._end_whole(self._whole, done)
        elif not self._out.begun:  # an answer of which nothing came, such as an unread one without a body
            await self._begin_passing(changed=False)
        if not self._out.over:
            await self._out.part(b"", more=False)
        return done.metadata

    async def _end_stream(self, done: ChatFinished) -> None:
        held, self._held = self._held, []
        carrier = max((i for i, piece in enumerate(held) if piece.carries), default=None)
        if not self._out.begun:
            await self._begin_passing(changed=True)
        frames = [
            self._blocked(piece, done.metadata) if i == carrier and self._block == "body" else self._with_first(piece)
            for i, piece in enumerate(held)
        ]
        await self._out.part(b"".join(frames), more=False)  # at once: clients hang up after the last frame

    async def _end_whole(self, piece: Piece, done: ChatFinished) -> None:
        assert self._exchange.answer is not None
        data = piece.raw
        if self._block == "body":
            data = _spliced(data, dump(done.metadata.as_json()))
        headers = self._headers(done.metadata, passing(self._exchange.answer.headers, without=_FRAMING))
        await self._out.whole(self._exchange.answer.status, headers, data)

    async def _refuse(self, done: ChatFinished) -> None:
        """An answer of ours, from its start."""
        assert done.refusal is not None
        if not self._call.stream:
            data = dump(self._call.whole(done))
            headers = self._headers(done.metadata, [(b"content-type", b"application/json")])
            await self._out.whole(200, headers, data)
            return
        writer = self._call.begin(self._first or done.metadata)
        if not self._out.begun:
            await self._out.begin(200, self._headers(done.metadata, encoded(STREAM_HEADERS)))
        told = [*writer.delta(ChatDelta(text=done.refusal, is_refusal=True)), *writer.end(done)]
        await self._out.part(b"".join(told), more=False)

    async def _begin_passing(self, *, changed: bool) -> None:
        if self._out.begun:
            return
        answer = self._exchange.answer
        assert answer is not None
        headers = passing(answer.headers, without=_FRAMING if changed else ())
        assert self._first is not None
        await self._out.begin(answer.status, self._headers(self._first, headers))

    def _headers(self, metadata: Metadata, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        if self._block == "none":
            return headers
        ours = encoded({**metadata.headers(), **self._extra})
        return replaced([(n, v) for n, v in headers if not n.startswith(_OURS)], ours)


def _spliced(data: bytes, block: bytes) -> bytes:
    """A JSON object with ``hhh`` as its last key, every other byte as it came.

    >>> _spliced(b'{"a": 1.0 }\\n', b"{}"), _spliced(b"{ }", b"{}")
    (b'{"a": 1.0 ,"hhh":{}}\\n', b'{ "hhh":{}}')
    """
    end = data.rindex(b"}")
    comma = b"" if data[:end].rstrip().endswith(b"{") else b","
    return data[:end] + comma + b'"hhh":' + block + data[end:]
