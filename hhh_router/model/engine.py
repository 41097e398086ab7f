"""What stands between callers and the model: the engine's protocol, and its asynchronous faces.

No torch here: an engine may run on a thread of this process or in a process of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from hhh_router.errors import ContextTooLong, GeneratorError, HHHRouterError, ReaderError
from hhh_router.protocols import Event, Load, Planner, Steerer
from hhh_router.types import ChatRequest, Message, ReadRequest, Scores, Tool

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStep:
    """What an engine is told of an answer that it reads while it grows: what is new, and nothing twice."""

    session: str
    """Names the reading, until it is closed."""
    opens: ReadRequest | None
    """The prompt, in the first step; None for a session that is open."""
    kept: int
    """Characters of the answer told before that still hold, from its first on."""
    added: str | None
    """What follows them; None where the prompt alone is to be read."""
    digest: str
    """Names the whole text, as `hhh_router.model.quarantine` knows suspects."""


class SessionLost(ReaderError):
    """The engine does not know the session: it made room for others, or was started again. To be told anew."""

    code = "session_lost"


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

    def read_on(self, step: ReadStep, end: EndRead) -> Ticket:
        """Score a text of which most was read before; ``end`` takes one reading, or what went wrong.

        Steps of one session come one after another. One that went wrong or was cancelled leaves a session that can only
        be closed.
        """
        ...

    def close_session(self, session: str) -> None:
        """Drop what is kept of a reading; does nothing where nothing is."""
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
        return await _read(lambda end: self._engine.read(requests, end))

    def open(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> EngineSession:
        """See `hhh_router.protocols.SessionReader.open`."""
        return EngineSession(self._engine, ReadRequest(messages=tuple(messages), tools=tuple(tools)))


class EngineSession:
    """`ReadingSession` on an engine, which keeps what it has read of this conversation and is told only what is new."""

    def __init__(self, engine: Engine, prompt: ReadRequest) -> None:
        self._engine = engine
        self._prompt = prompt
        self._hash = hashlib.sha256(repr(prompt).encode("utf-8", "replace"))
        self._name: str | None = None
        self._told = ""  # of the answer
        self._too_long: tuple[str, ContextTooLong] | None = None

    async def read(self, response: str | None) -> Scores:
        """Score the prompt alone, or with the answer so far.

        Raises:
            ContextTooLong, InvalidRequest, Overloaded, ReaderError, Unavailable: As `EngineReader.read`.
        """
        if self._too_long is not None and (response or "").startswith(self._too_long[0]):
            raise self._too_long[1]  # nor is it read again to find that out
        try:
            return await self._step(response)
        except SessionLost:
            return await self._step(response)
        except ContextTooLong as error:
            self._too_long = (response or "", error)
            raise

    def close(self) -> None:
        """Let the engine drop what it keeps; what is read afterwards is read whole."""
        name, self._name, self._told = self._name, None, ""
        if name is not None:
            self._engine.close_session(name)

    async def _step(self, response: str | None) -> Scores:
        opens = None
        if self._name is None:
            self._name, opens = uuid4().hex, self._prompt
        text = self._told if response is None else response
        kept = len(self._told) if text.startswith(self._told) else _same(self._told, text)
        digest = self._hash.copy()
        digest.update(repr(response).encode("utf-8", "replace"))
        step = ReadStep(
            session=self._name, opens=opens, kept=kept, added=None if response is None else text[kept:],
            digest=digest.hexdigest(),
        )  # fmt: skip
        try:
            [scores] = await _read(lambda end: self._engine.read_on(step, end))
        except BaseException:  # also where nobody waits any more: what the engine has of it by now is not known
            self.close()
            raise
        self._told = text
        return scores


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


def _same(old: str, new: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


async def _read(start: Callable[[EndRead], Ticket]) -> list[Scores]:
    """Start a reading and wait for it; it is cancelled where nobody waits any more."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[Scores]] = loop.create_future()

    def settle(found: list[Scores] | Exception) -> None:
        if done.done():
            return
        if isinstance(found, Exception):
            done.set_exception(found)
        else:
            done.set_result(found)

    ticket = start(lambda found: _call(loop, settle, found))
    try:
        return await done
    finally:
        ticket.cancel()


_END = object()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *given: Any) -> bool:
    """Call something on a loop's thread; False where the loop is closed, so that nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(function, *given)
    except RuntimeError:
        return False
    return True
