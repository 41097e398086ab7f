"""Reading beside the requests: what was asked and answered is judged after it left, and recorded."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hhh_router.errors import HHHRouterError, InvalidRequest
from hhh_router.interfaces.proxy.entry import Keep
from hhh_router.interfaces.proxy.frames import Frame, Frames, decoded
from hhh_router.interfaces.proxy.headers import Headers, find
from hhh_router.interfaces.proxy.policies import compared, shadowed
from hhh_router.interfaces.proxy.wires import Asked, Wire
from hhh_router.interfaces.proxy.wires.reading import Reply, conversing
from hhh_router.pipeline.guard import run_guard
from hhh_router.pipeline.parts import Parts
from hhh_router.pipeline.situation import asked_situation
from hhh_router.types import Caller, GuardRequest, ReadRequest

_log = logging.getLogger(__name__)

MOST_BYTES = 64_000_000
"""Of exchanges that wait to be read, together."""
REST_S = 0.003
"""Between two verdicts. One takes the event loop about 0.7 ms, besides its reading: requests have four fifths of it."""


class Tee:
    """A copy of an answer's first bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._copy = bytearray()
        self.is_cut = False

    def add(self, piece: bytes) -> None:
        """Copy a piece, as long as there is room."""
        if not self.is_cut:
            self._copy += piece
            if len(self._copy) > self._limit:
                self.is_cut = True
                self._copy.clear()

    @property
    def copy(self) -> bytes:
        """What was copied; nothing where there was more than fits."""
        return bytes(self._copy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One exchange that has passed."""

    request_id: str
    wire: Wire
    policy: str | None
    candidate: str | None
    """Asked beside it."""
    caller: Caller
    """Who asked; the model that was named is found when it is read."""
    body: bytes
    body_encoding: bytes | None
    status: int
    headers: Headers
    answer: bytes
    is_cut: bool
    """Whether the answer was larger than what is read, or broke off."""


class Observer:
    """Reads exchanges one after the other, as fast as the model can and never faster than there is room for.

    Args:
        parts: The deployment, which judges.
        record: Gets each verdict with its request's id.
        most_waiting: Exchanges that may wait; one more is not read.
        max_bytes: Largest body that is read.
        keep: Keeps texts beside the verdict; None keeps none.
    """

    def __init__(
        self,
        parts: Callable[[], Parts],
        record: Callable[[str, Mapping[str, Any]], Awaitable[None]],
        *,
        most_waiting: int,
        max_bytes: int,
        keep: Keep | None = None,
    ) -> None:
        self._parts = parts
        self._record = record
        self._most = most_waiting
        self._max_bytes = max_bytes
        self._keep = keep
        self._queue: asyncio.Queue[Seen] = asyncio.Queue()
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._is_draining = False
        self.dropped = 0
        """Exchanges that were not read for lack of room."""

    def take(self, seen: Seen) -> bool:
        """Put an exchange in line; False where there is no room, which never holds a request up."""
        size = len(seen.body) + len(seen.answer)
        if self._queue.qsize() >= self._most or self._bytes + size > MOST_BYTES:
            self.dropped += 1
            return False
        self._bytes += size
        self._queue.put_nowait(seen)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return True

    async def drain(self, timeout_s: float) -> None:
        """Read what waits, for so long at most."""
        self._is_draining = True
        if self._task is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._queue.join()
            except TimeoutError:
                _log.warning("%d exchanges were not read before the end", self._queue.qsize())
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _work(self) -> None:
        while True:
            seen = await self._queue.get()
            try:
                await self._record(seen.request_id, await self._judge(seen))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # nobody waits for this one, and the next one is to be read all the same
                _log.warning("%s: not judged (%s)", seen.request_id, type(error).__name__)
            finally:
                self._bytes -= len(seen.body) + len(seen.answer)
                self._queue.task_done()
            await asyncio.sleep(0 if self._is_draining else REST_S)

    async def _judge(self, seen: Seen) -> Mapping[str, Any]:
        unread: list[str] = []
        try:
            asked = self._asked(seen)
        except InvalidRequest as error:
            asked = Asked(messages=())
            unread.append(f"request: {error.message}")
        reply = self._reply(seen, unread)
        unread += [*asked.not_inspected, *(reply.unread if reply else ())]
        text = reply.text if reply else ""
        if not asked.messages and not text.strip():
            return {"unread": unread or ["nothing that is text"]}
        content = {} if self._keep is None else {"content": self._keep(asked.messages, text or None)}
        request = GuardRequest(
            read=ReadRequest(messages=asked.messages, response=text if text.strip() else None),
            policy=seen.policy,
            caller=conversing(seen.caller, asked),
            request_id=seen.request_id,
            not_inspected=tuple(unread),
            turns=asked.turns,
            goes_on=asked.goes_on,
            calls=reply.take_calls() if reply else (),
        )
        try:
            parts = compared(shadowed(self._parts()), seen.policy, seen.candidate)
            [result] = await run_guard(parts, [request])
        except HHHRouterError as error:
            return {"unread": [*unread, f"{error.code}: {error.message}"], **content}
        if reply is not None and reply.answer_id is not None:
            told = asked_situation(request.turns, request.caller, None)
            self._parts().conversations.also_called(told.caller, reply.answer_id)
        return {"hhh": result.metadata.recorded.as_json(), **content}

    def _asked(self, seen: Seen) -> Asked:
        return seen.wire.asked(parsed(seen.body, seen.body_encoding, max_bytes=self._max_bytes, strict=False))

    def _reply(self, seen: Seen, unread: list[str]) -> Reply | None:
        if not 200 <= seen.status < 300:
            unread.append(f"response: status {seen.status}")
            return None
        if seen.is_cut:
            unread.append("response: larger than what is read, or it broke off")
        plain = decoded(seen.answer, find(seen.headers, b"content-encoding"), max_bytes=self._max_bytes)
        if plain is None:
            unread.append("response: compressed")
            return None
        media = (find(seen.headers, b"content-type") or b"").partition(b";")[0].strip().lower()
        reply = seen.wire.reply()
        try:
            if media == b"text/event-stream":
                for frame in Frames(max_bytes=self._max_bytes).feed(plain):
                    if (body := frame.body()) is not None:
                        reply.event({"type": frame.name, **body} if frame.name and "type" not in body else body)
            elif not seen.is_cut and (body := Frame(b"", None, plain.decode("utf-8", "replace")).body()) is not None:
                reply.whole(body)
        except HHHRouterError as error:
            unread.append(f"response: {error.message}")
        return reply


def parsed(body: bytes, encoding: bytes | None, *, max_bytes: int, strict: bool) -> Mapping[str, Any]:
    """A request's body as an object.

    Args:
        body: As the client sent it.
        encoding: Its ``Content-Encoding``.
        max_bytes: Largest that is read.
        strict: Refuse what two readers could take in two ways: a key that is there twice.

    Raises:
        InvalidRequest: It cannot be read.
    """
    plain = decoded(body, encoding, max_bytes=max_bytes)
    if plain is None:
        raise InvalidRequest("the body is compressed in a way that is not read here", hint="send it plain, or as gzip")
    try:
        found = json.loads(plain, object_pairs_hook=_once if strict else None)
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body is no JSON", hint="send a JSON object in UTF-8") from error
    if not isinstance(found, dict):
        raise InvalidRequest("the body is JSON, but no object", hint="send a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"{twice[:80]!r} is there twice in one object", hint="send each key once")
    return found
