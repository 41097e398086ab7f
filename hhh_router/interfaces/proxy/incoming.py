"""A client's request as it comes, and its answer as it leaves: raw ASGI."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from hhh_router.interfaces.proxy.headers import find


class Incoming:
    """What a client sent.

    Args:
        scope: As ASGI has it.
        receive: Likewise.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._begun = bytearray()
        self._over = asyncio.Event()
        self._is_gone = False
        self.method: str = scope["method"]
        self.headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        raw = scope.get("raw_path") or scope["path"].encode()
        self.path: str = raw.partition(b"?")[0].decode("latin-1")
        self.query: str = scope["query_string"].decode("latin-1")
        length = find(self.headers, b"content-length")
        self.is_chunked = find(self.headers, b"transfer-encoding") is not None
        self.has_body = self.is_chunked or (length or b"0") != b"0"
        if not self.has_body:
            self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether all of the body is here."""
        return self._over.is_set()

    async def body(self, limit: int) -> bytes | None:
        """All of the body; None when it is larger, and then `pieces` still has it from the start.

        Raises:
            ClientDisconnect: The client left before its end.
        """
        while not self._over.is_set():
            self._begun += await self._next()
            if len(self._begun) > limit:
                return None
        return bytes(self._begun)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body from its start, as it comes; no more is taken than is asked for."""
        begun, self._begun = bytes(self._begun), bytearray()
        if begun:
            yield begun
        while not self._over.is_set():
            if piece := await self._next():
                yield piece

    async def after_body(self) -> Any:
        """The next message after the body: that the client left, sooner or later."""
        await self._over.wait()
        return {"type": "http.disconnect"} if self._is_gone else await self._receive()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._is_gone = True
            self._over.set()
            raise ClientDisconnect
        if not message.get("more_body", False):
            self._over.set()
        return bytes(message.get("body", b""))


class Out:
    """Sends an answer, and knows what has left.

    Args:
        send: As ASGI has it.
        before_first: Awaited before the first byte leaves; when it fails, none does.
    """

    def __init__(self, send: Send, before_first: Callable[[], Awaitable[None]] | None = None) -> None:
        self._send = send
        self._before_first = before_first
        self._sha = hashlib.sha256()
        self.begun = False
        self.over = False
        self.status: int | None = None
        self.is_event_stream = False
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """Of the body's bytes that have left."""
        return self._sha.hexdigest()

    async def begin(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Send status and headers."""
        if self._before_first is not None:
            await self._before_first()
        self.begun, self.status = True, status
        self.is_event_stream = (find(headers, b"content-type") or b"").startswith(b"text/event-stream") and (
            find(headers, b"content-encoding") is None
        )
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the body; waits while the client is slow."""
        self._sha.update(data)
        self.bytes += len(data)
        self.over = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], data: bytes) -> None:
        """Send an answer at once."""
        await self.begin(status, [*headers, (b"content-length", str(len(data)).encode())])
        await self.part(data, more=False)

    async def asgi(self, message: Any) -> None:
        """Send what another application says."""
        if message["type"] == "http.response.start":
            await self.begin(message["status"], message.get("headers", []))
        elif message["type"] == "http.response.body":
            await self.part(message.get("body", b""), more=message.get("more_body", False))
