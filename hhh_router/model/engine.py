"""What stands between callers and the model: the engine's protocol, and its asynchronous faces.

No torch here: an engine may run on a thread of this process or in a process of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hhh_router.errors import GeneratorError, HHHRouterError
from hhh_router.protocols import Event, Load, Planner, Steerer
from hhh_router.types import ChatRequest, ReadRequest, Scores

_log = logging.getLogger(__name__)
_UNREAD_EVENTS = 4096  # a caller that far behind is not reading; its reply would pile up in memory

TellEvent = Callable[[Event], None]
EndChat = Callable[[Exception | None], None]
EndRead = Callable[[list[Scores] | Exception], None]


class Ticket(Protocol):
    """Work that was taken in."""

    def cancel(self) -> None:
        """Nobody waits for it any more; it ends at the next step. From any thread, any number of times."""
        ...


class Engine(Protocol):
    """Reads texts and answers chats, many at once. Its methods may be called from any thread.

    Everything that goes wrong with one piece of work goes to its ``end``, which is called exactly once, or not at all
    where the work was cancelled.
    """

    @property
    def load(self) -> Load:
        """How busy it is, a moment old."""
        ...

    def read(self, requests: Sequence[ReadRequest], end: EndRead) -> Ticket:
        """Score texts; ``end`` takes all scores in order, or what went wrong, on a thread of the engine."""
        ...

    def chat(
        self,
        request: ChatRequest,
        planner: Planner,
        *,
        window_tokens: int,
        tell: TellEvent,
        end: EndChat,
        steer: Steerer | None = None,
    ) -> Ticket:
        """Answer one request; all that is handed in is called on a thread of the engine. ``tell`` may raise."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Take nothing new in and wait for what is under way; False where the time did not suffice. Blocks."""
        ...

    def close(self) -> None:
        """End everything under way with an error, and stop. Blocks."""
        ...


class EngineReader:
    """`Reader` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        """Score each text, in order; texts of like length, whoever sent them, share a padded pass.

        Raises:
            ContextTooLong, InvalidRequest: A text cannot be read as it stands.
            Overloaded: Too many texts wait already.
            ReaderError: The reading failed.
            Unavailable: The engine is starting again, or shutting down.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Scores]] = loop.create_future()

        def settle(found: list[Scores] | Exception) -> None:
            if done.done():
                return
            if isinstance(found, Exception):
                done.set_exception(found)
            else:
                done.set_result(found)

        ticket = self._engine.read(requests, lambda found: _call(loop, settle, found))
        try:
            return await done
        finally:
            ticket.cancel()


class EngineGenerator:
    """`Generator` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(
        self, request: ChatRequest, planner: Planner, *, window_tokens: int, steer: Steerer | None = None
    ) -> AsyncGenerator[Event, None]:
        """See `hhh_router.protocols.Generator.generate`; closing the stream frees its row before the next step.

        Raises:
            ContextTooLong, InvalidRequest: The prompt cannot be answered as it stands.
            BackendTimeout: ``request.timeout_s`` passed.
            GeneratorError: The reply failed, or nobody read it.
            Overloaded: Too many chats wait already, or this one would wait past its deadline.
            Unavailable: The engine is starting again, or shutting down.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()
        closed = False

        def tell(event: Event) -> None:
            if closed:
                raise GeneratorError("the caller has left")
            if events.qsize() > _UNREAD_EVENTS:
                raise GeneratorError(f"{_UNREAD_EVENTS} events of the reply have not been read", hint="read faster")
            if not _call(loop, events.put_nowait, event):
                raise GeneratorError("the caller's event loop is closed")

        ticket = self._engine.chat(
            request, planner, window_tokens=window_tokens, tell=tell, steer=steer,
            end=lambda error: _call(loop, events.put_nowait, error or _END),
        )  # fmt: skip
        try:
            while (event := await events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            closed = True
            ticket.cancel()


@dataclass(slots=True)
class EmbeddedModel:
    """A bundle on its backbone, ready to read and to answer."""

    engine: Engine
    description: dict[str, Any]
    """Sizes and precision, for logs and ``doctor``: ``dtype``, ``context_tokens``, …"""

    @property
    def reader(self) -> EngineReader:
        """Scores texts."""
        return EngineReader(self.engine)

    @property
    def generator(self) -> EngineGenerator:
        """Answers requests."""
        return EngineGenerator(self.engine)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new in, wait for what is under way, and end with an error what takes longer."""
        if not await asyncio.to_thread(self.engine.drain, timeout_s):
            await self.aclose()

    async def aclose(self) -> None:
        """Stop the engine; does nothing the second time."""
        await asyncio.to_thread(self.engine.close)


def known(error: Exception, kind: type[HHHRouterError]) -> HHHRouterError:
    """An error of ours as it is; any other one, which is the model's fault, as this kind, and in the log."""
    if isinstance(error, HHHRouterError):
        return error
    _log.error("the model failed", exc_info=error)
    wrapped = kind(f"the model failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


_END = object()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *given: Any) -> bool:
    """Call something on a loop's thread; False where the loop is closed, so that nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(function, *given)
    except RuntimeError:
        return False
    return True
