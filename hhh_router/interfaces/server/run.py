"""Listening: uvicorn around the application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from hhh_router.errors import SettingsError
from hhh_router.interfaces.server.app import create_app
from hhh_router.interfaces.server.connection import Connection
from hhh_router.interfaces.server.http import check_exposure
from hhh_router.interfaces.server.keys import KeyRing
from hhh_router.pipeline import Pipeline
from hhh_router.settings import Settings

DRAIN_S = 8.0  # replies under way may end; then they end with an error
GRACE_S = 10  # and then their connections are cut
BACKLOG = 1024
MAX_PORT = 65_535


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """A bound socket; port 0 takes a free one. Cheap, so do it before the model is loaded.

    Raises:
        SettingsError: The address cannot be used, it is reachable from outside and no key is set, or the file of keys
            has mistakes.
    """
    check_exposure(host, settings)
    KeyRing.open(settings)  # its mistakes are told before a model is loaded
    if not 0 <= port <= MAX_PORT:  # getaddrinfo would wrap it around
        raise SettingsError(f"--port {port} is no port", hint=f"use 0 (a free one) to {MAX_PORT}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror or error})",
            hint="choose another --host or --port; port 0 takes a free one",
        ) from error


def run(pipeline: Pipeline, listening: socket.socket, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM; then close the pipeline.

    Args:
        pipeline: Answers.
        listening: From `listen`.
        on_ready: Called with the base URL once requests are taken.
    """
    url = url_of(listening)
    make_server(pipeline, on_ready=lambda: on_ready(url)).run(sockets=[listening])


def url_of(listening: socket.socket) -> str:
    """The address at which a bound socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(pipeline: Pipeline, *, on_ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server that is not running yet; give its ``run`` or ``serve`` a socket from `listen`."""
    return DrainingServer(create_app(pipeline), lambda: pipeline.drain(DRAIN_S), on_ready, grace_s=GRACE_S)


class DrainingServer(uvicorn.Server):
    """Uvicorn as all doors run it; it lets replies under way end before it stops."""

    def __init__(
        self,
        app: ASGIApp,
        drain: Callable[[], Coroutine[Any, Any, None]],
        on_ready: Callable[[], None],
        *,
        grace_s: int,
        **config: Any,
    ) -> None:
        """Not running yet; give its ``run`` or ``serve`` a socket.

        Args:
            app: Answers.
            drain: Takes nothing new and lets what is under way end; what takes too long ends with an error.
            on_ready: Called once requests are taken.
            grace_s: Seconds until connections are cut.
            config: Further settings of uvicorn's.
        """
        settings: dict[str, Any] = {
            "http": Connection,
            "loop": "asyncio",  # also where uvloop is installed: one loop to know, and beside httptools nothing to gain
            "ws": "none",
            "log_level": "warning",  # one line a request comes from the pipeline's own log
            "access_log": False,
            "log_config": None,  # whoever runs this decides where logs go, and what they leave out
            "server_header": False,
            "timeout_graceful_shutdown": grace_s,
        }
        super().__init__(uvicorn.Config(app, **settings, **config))
        self._drain = drain
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain while uvicorn waits for the connections."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._drain())
            both.create_task(super().shutdown(sockets))
