"""Listening: uvicorn around the sidecar."""

from __future__ import annotations

import socket
from collections.abc import Callable

from hhh_router.interfaces.proxy.app import Sidecar
from hhh_router.interfaces.server.run import DrainingServer, url_of

CUT_S = 10
"""After answers under way were told to end, their connections are cut."""


def run(sidecar: Sidecar, listening: socket.socket, *, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """Pass requests on until SIGINT or SIGTERM; then let those under way end, and close everything.

    Args:
        sidecar: The application.
        listening: From `interfaces.server.run.listen`.
        on_ready: Called with the base URL once requests are taken.
    """
    url = url_of(listening)
    make_server(sidecar, on_ready=lambda: on_ready(url)).run(sockets=[listening])


def make_server(sidecar: Sidecar, *, on_ready: Callable[[], None] = lambda: None) -> DrainingServer:
    """A server that is not running yet; give its ``run`` or ``serve`` a socket."""
    drain_s = sidecar.config.drain_s
    return DrainingServer(
        sidecar,
        lambda: sidecar.drain(drain_s),
        on_ready,
        grace_s=int(drain_s) + CUT_S,
        date_header=False,  # the upstream's own passes
    )
