"""Listening: uvicorn around the sidecar."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from hhh_router.interfaces.proxy.app import Sidecar
from hhh_router.interfaces.server.connection import MAX_HEAD_BYTES, Connection

CUT_S = 10
"""After answers under way were told to end, their connections are cut."""


def run(sidecar: Sidecar, listening: socket.socket, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Pass requests on until SIGINT or SIGTERM; then let those under way end, and close everything.

    Args:
        sidecar: The application.
        listening: From `interfaces.server.run.listen`.
        on_ready: Called with the base URL once requests are taken.
    """
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    make_server(sidecar, on_ready=lambda: on_ready(f"http://{shown}:{port}")).run(sockets=[listening])


def make_server(sidecar: Sidecar, *, on_ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server that is not running yet; give its ``run`` or ``serve`` a socket."""
    config = uvicorn.Config(
        sidecar,
        http=Connection,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,  # the upstream's own passes
        timeout_graceful_shutdown=int(sidecar.config.drain_s) + CUT_S,
    )
    return _Server(config, sidecar, on_ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, sidecar: Sidecar, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._sidecar = sidecar
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening and let answers under way end; what takes too long ends with an error of its wire."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._sidecar.drain(self._sidecar.config.drain_s))
            both.create_task(super().shutdown(sockets))
