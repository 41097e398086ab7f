"""The socket a server listens on."""

import socket

from hhh_router.interfaces.server.run import listen
from hhh_router.settings import Settings


def test_accepted_connections_send_at_once() -> None:
    """Without it the last piece of every reply waited 40 ms for an acknowledgement."""
    with (
        listen("127.0.0.1", 0, Settings.load()) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
