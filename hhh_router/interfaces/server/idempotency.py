"""``Idempotency-Key``: a request that is sent again, after a lost connection say, is not generated again.

The same body under the same key of the same caller gets the reply that was made, streams included; while that is being
made it is waited for. Only replies that came to their end are kept: after an error the next try is a new one, and a
caller who leaves has cancelled its request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.server.http import Failure, WireError, failed, until_client_leaves
from hhh_router.pipeline.kept import Kept

if TYPE_CHECKING:
    from hhh_router.interfaces.server.chat import ChatResponse
    from hhh_router.interfaces.server.tracing import Traced

HEADER: Final = "idempotency-key"
REPLAYED: Final = (b"idempotent-replayed", b"true")
"""On a reply that was made for an earlier request, as Stripe's API has it."""
LONGEST_KEY: Final = 255
MOST_REPLIES: Final = 1024
MOST_BYTES: Final = 32_000_000
LONGEST_S: Final = 3600.0
"""A reply is kept for an hour, and forgotten earlier where there are too many or too large ones."""
_KEY = re.compile(rf"[!-~]{{1,{LONGEST_KEY}}}")

Name = tuple[str, str]
"""Caller and key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    asked: str
    """Digest of the request."""
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    asked: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Replies:
    """What was answered under which key. For one event loop."""

    def __init__(
        self, *, most: int = MOST_REPLIES, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kept = Kept[Name, _Reply](most=most, most_size=most_bytes, longest_s=LONGEST_S, clock=clock)
        self._running: dict[Name, _Running] = {}

    def find(self, name: Name, asked: str) -> _Reply | _Running | None:
        """What has become of an earlier request.

        Raises:
            WireError: 422, the key was used for another one.
        """
        found = self._running.get(name) or self._kept.find(name)
        if found is not None and found.asked != asked:
            raise WireError(
                422,
                f"{HEADER}: it was sent with another body before; use a new key for a new request",
                code="idempotency_key_reused",
            )
        return found

    def begin(self, name: Name, asked: str) -> None:
        """A request is being answered."""
        self._running[name] = _Running(asked=asked)

    def end(self, name: Name, reply: _Reply | None) -> None:
        """It is answered, or it came to nothing."""
        self._running.pop(name).ended.set()
        if reply is not None:
            self._kept.keep(name, reply, size=len(reply.body))


def once(
    replies: Replies,
    request: Request,
    body: Mapping[str, Any],
    response: ChatResponse | Traced,
    *,
    owner: str,
    wait_s: float,
    told: Callable[[Exception], Failure],
) -> Response:
    """The response, or the one that was made for the same request before; as it is where no key is sent.

    Args:
        replies: Those made so far.
        request: With or without the header.
        body: Of the request.
        response: Makes a reply, unless there is one.
        owner: Whose keys these are.
        wait_s: Longest wait for an earlier request under the same key.
        told: The wire's words for an error.

    Raises:
        InvalidRequest: The header is no key.
        WireError: 422, the key was used for another request.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return response
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"{HEADER}: found {key[:40]!r}", hint=f"send 1 to {LONGEST_KEY} visible ASCII characters, such as a UUID"
        )
    content = json.dumps([request.url.path, body], sort_keys=True, separators=(",", ":"))
    asked = hashlib.sha256(content.encode()).hexdigest()
    replies.find((owner, key), asked)
    return _Once(replies, (owner, key), asked, response, wait_s=wait_s, told=told)


class _Once(Response):
    def __init__(
        self,
        replies: Replies,
        name: Name,
        asked: str,
        response: ChatResponse | Traced,
        *,
        wait_s: float,
        told: Callable[[Exception], Failure],
    ) -> None:
        super().__init__()
        self._replies, self._name, self._asked, self._response = replies, name, asked, response
        self._wait_s, self._told = wait_s, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        try:
            reply = await self._earlier(receive)
        except ClientDisconnect:
            return
        except WireError as error:
            await failed(error, self._told)(scope, receive, send)
            return
        if reply is None:
            await self._answer(scope, receive, send)
            return
        headers = [*reply.headers, REPLAYED]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": reply.body})

    async def _earlier(self, receive: Receive) -> _Reply | None:
        """The reply to an earlier request, waited for where it is under way; None where this one is the first."""
        try:
            async with asyncio.timeout(self._wait_s):
                while isinstance(found := self._replies.find(self._name, self._asked), _Running):
                    await until_client_leaves(receive, found.ended.wait())
        except TimeoutError:
            raise WireError(
                409,
                f"{HEADER}: a request with this key is still being answered; try again later",
                code="idempotency_in_progress",
            ) from None
        return found

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent: list[Message] = []

        async def record(message: Message) -> None:
            sent.append(message)
            await send(message)

        self._replies.begin(self._name, self._asked)
        reply = None
        try:
            await self._response(scope, receive, record)
            if self._response.is_finished:
                reply = _Reply(
                    asked=self._asked,
                    status=sent[0]["status"],
                    headers=tuple(sent[0]["headers"]),
                    body=b"".join(message.get("body", b"") for message in sent),
                )
        finally:
            self._replies.end(self._name, reply)
