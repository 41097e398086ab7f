"""One chat, streamed and whole, in whichever dialect it was asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hhh_router.interfaces.server.dialect import Dialect, StreamWriter
from hhh_router.interfaces.server.http import Sender, until_client_leaves
from hhh_router.pipeline import ChatDelta, ChatFinished, ChatStarted, Pipeline
from hhh_router.types import ChatRequest

E = TypeVar("E")
_log = logging.getLogger(__name__)

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


QUIET_S = 10.0
"""A stream that is quiet for so long is kept open with a word that says nothing: proxies cut silent connections."""


class ChatResponse(Response):
    """The reply to one chat, made while it is sent. A client that leaves cancels the model's work."""

    def __init__(
        self, pipeline: Pipeline, call: Dialect, *, spend: Callable[[int], None] = lambda tokens: None
    ) -> None:
        """Answer ``call``; ``spend`` is told how many tokens it took."""
        super().__init__()
        self._pipeline = pipeline
        self.call = call
        self._spend = spend
        self.is_finished = False
        """Whether the reply has been sent to its end."""
        self.done: list[ChatFinished] = []
        """What has been answered."""
        self.error: Exception | None = None
        """Why it was not."""

    @property
    def requests(self) -> Sequence[ChatRequest]:
        """What is asked: of one reply, or of several to one call."""
        return (self.call.request,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        try:
            await until_client_leaves(receive, self._answer(Sender(send)))
        except ClientDisconnect:
            _log.info("request id=%s: the client left", self.call.request.request_id)

    async def _answer(self, sender: Sender) -> None:
        try:
            if self.call.stream:
                await self._stream(sender)
            else:
                await self._whole(sender)
            self.is_finished = True
        except OSError:
            raise  # the connection broke while sending: nobody is there to be told
        except Exception as error:  # a door: whatever broke must reach the caller as an error, never as a broken stream
            await self._fail(sender, error)

    async def _whole(self, sender: Sender) -> None:
        async with aclosing(self._pipeline.chat(self.call.request, stream=False)) as events:
            async for event in events:
                if isinstance(event, ChatFinished):
                    self._spent(event)
                    await sender.json(self.call.whole(event), event.metadata.headers())

    async def _stream(self, sender: Sender) -> None:
        writer: StreamWriter | None = None
        async with aclosing(self._pipeline.chat(self.call.request, stream=True)) as events:
            async for event in kept_alive(events, lambda: self._ping(sender)):
                if isinstance(event, ChatStarted):
                    writer = self.call.begin(event.metadata)
                    await sender.begin(200, STREAM_HEADERS | event.metadata.headers())
                    continue
                assert writer is not None  # ChatStarted is always first
                if isinstance(event, ChatFinished):
                    self._spent(event)
                for frame in writer.delta(event) if isinstance(event, ChatDelta) else writer.end(event):
                    await sender.part(frame)
        await sender.part(b"", more=False)

    def _spent(self, done: ChatFinished) -> None:
        self.done.append(done)
        self._spend(done.usage.prompt_tokens + done.usage.completion_tokens)

    async def _ping(self, sender: Sender) -> None:
        if sender.begun:  # before that the status is not known yet
            await sender.part(self.call.ping)

    async def _fail(self, sender: Sender, error: Exception) -> None:
        self.error = error
        status, body, headers = self.call.failure(error)
        if not sender.begun:
            await sender.json(
                body, status=status, headers={"x-hhh-request-id": self.call.request.request_id, **headers}
            )
        else:  # the status has left; clients raise on an error event
            await sender.part(self.call.broken(body), more=False)


async def kept_alive(events: AsyncGenerator[E, None], ping: Callable[[], Awaitable[None]]) -> AsyncGenerator[E, None]:
    """The same events; in every long silence between two of them ``ping`` is called."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({coming}, timeout=QUIET_S)
            if not coming.done():
                await ping()
                continue
            event = await coming
            if event is None:
                return
            yield event
            coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)  # so that the events can be closed
