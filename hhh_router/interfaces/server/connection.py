"""One connection: uvicorn's HTTP, with an end to headers that never come, and errors that a client can read."""

from __future__ import annotations

import asyncio
import socket
from typing import Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hhh_router.interfaces.server.http import MAX_HEADER_BYTES, dump, error_body

HEADERS_S = 15.0
"""A request's headers have to be here so long after its first byte, or after the connection was made."""
MAX_HEAD_BYTES = 2 * MAX_HEADER_BYTES
"""Of request line and headers, on the wire: what is more than the application allows, but less than this, gets its own
error; what is more gets a bare one. The parser itself has no bound, neither here nor at what stands between and behind
the chunks of a body."""


class Connection(HttpToolsProtocol):
    """See the module. The clock is the event loop's."""

    _awaits: Literal["nothing", "head", "body"] = "head"
    """What has to come next: the head of a request that has begun (of the first one in any case), or its body."""
    _is_over = False
    """Whether nothing more is read: what came could not be understood."""
    _undelivered = 0
    """Bytes since the last that meant something to the application."""
    _delivered = False
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        # asyncio does it too, but not for sockets that were made without naming their protocol, as `listen`'s are: then
        # a reply's second packet waits for the first one's acknowledgement, which clients delay by 40 ms
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._is_over:
            return
        self._delivered = False
        super().data_received(data)
        self._undelivered = 0 if self._delivered else self._undelivered + len(data)
        if self._undelivered > MAX_HEAD_BYTES:
            self.send_400_response("the headers are too long")
        elif self._awaits == "nothing" and not self._is_busy:
            self._awaits = "head"  # blank lines: they ended uvicorn's own patience, so ours begins
        self._watch()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._awaits = "head"

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is here; what follows a body is none, whatever it is called."""
        if self._awaits == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._awaits, self._delivered = "body", True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body is here."""
        self._delivered = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here."""
        self._awaits, self._delivered = "nothing", True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Tell a client that it does not speak HTTP, or says too much before its body."""
        self._refuse(400, f"{msg.rstrip('.')}; send HTTP/1.1 with at most {MAX_HEADER_BYTES:,} bytes of headers")

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _too_slow(self) -> None:
        self._waiting = None
        self._refuse(408, f"the headers were not here after {HEADERS_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer and hang up; an answer to an earlier request ends first, or is cut where its own request is broken."""
        self._is_over = True
        if self._is_busy and self._awaits != "body":
            self.cycle.keep_alive = False
            return
        if not self.pipeline and not (self._is_busy and self.cycle.response_started):
            body = dump(error_body(message, status=status, code="invalid_http"))
            fields = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + fields + body)
        self.transport.close()

    def _watch(self) -> None:
        """Wait for the rest of a request's headers, unless they are here."""
        if self._awaits != "head" or self._is_busy or self._is_over:
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADERS_S, self._too_slow)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
