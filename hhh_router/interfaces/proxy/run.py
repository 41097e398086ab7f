"""Listening: uvicorn around the sidecar."""

from __future__ import annotations

import contextlib
import socket
import sys
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
    _open_files_to_the_limit()
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


def _open_files_to_the_limit() -> None:
    """A request takes two sockets: the usual soft limit of 1,024 files would be reached by some 500 of them."""
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
