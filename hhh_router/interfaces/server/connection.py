"""One connection: uvicorn's HTTP, with an end to headers that never come, and errors that a client can read."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hhh_router.interfaces.server.http import MAX_HEADER_BYTES, dump, error_body

HEADERS_S = 15.0
"""A request's headers have to be here so long after its first byte, or after the connection was made."""
MAX_HEAD_BYTES = 2 * MAX_HEADER_BYTES
"""Of request line and headers, on the wire: what is more than the application allows, but less than this, gets its own
error; what is more gets a bare one."""


class Connection(H11Protocol):
    """See the module. The clock is the event loop's."""

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

    def handle_events(self) -> None:
        """Bytes have come, or the reply to an earlier request has ended and bytes were waiting."""
        super().handle_events()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Tell a client that it does not speak HTTP, or says too much before its body."""
        self._refuse(400, f"{msg.rstrip('.')}; send HTTP/1.1 with at most {MAX_HEADER_BYTES:,} bytes of headers")

    def _too_slow(self) -> None:
        self._refuse(408, f"the headers were not here after {HEADERS_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        body = dump(error_body(message, status=status, code="invalid_http"))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        reason = HTTPStatus(status).phrase
        for event in (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(data=body)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Wait for the rest of a request's headers, unless they are here."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if self.conn.their_state is not h11.IDLE or not begun:
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADERS_S, self._too_slow)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
