"""The wires whose prompts and answers the sidecar can read; whatever else comes passes unread."""

from __future__ import annotations

import re
from urllib.parse import unquote

from hhh_router.interfaces.proxy.wires.chat import ChatWire
from hhh_router.interfaces.proxy.wires.completions import CompletionsWire
from hhh_router.interfaces.proxy.wires.messages import MessagesWire
from hhh_router.interfaces.proxy.wires.reading import Asked, Reply, Wire
from hhh_router.interfaces.proxy.wires.responses import ResponsesWire

__all__ = ["Asked", "Reply", "Wire", "find_wire"]

_WIRES: tuple[tuple[re.Pattern[str], Wire], ...] = (
    (re.compile(r"/chat/completions$"), ChatWire()),
    (re.compile(r"/completions$"), CompletionsWire()),
    (re.compile(r"/responses$"), ResponsesWire()),
    (re.compile(r"(?:/v\d+|^)/messages$"), MessagesWire()),  # not /threads/…/messages
)


def find_wire(method: str, path: str) -> Wire | None:
    """The wire of a request, by its path however it is spelt; None where nobody can read it.

    >>> [getattr(find_wire("POST", p), "name", None) for p in ("/v1/chat/completions", "//v1/Messages/", "/v1/files")]
    ['chat', 'messages', None]
    >>> find_wire("GET", "/v1/chat/completions") is None
    True
    """
    if method.upper() != "POST":
        return None
    plain = re.sub(r"/+", "/", unquote(path)).rstrip("/").lower()
    return next((wire for pattern, wire in _WIRES if pattern.search(plain)), None)
