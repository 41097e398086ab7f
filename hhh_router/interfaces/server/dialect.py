"""What a wire for chats has to say: how a reply, its pieces and a failure are put."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hhh_router.interfaces.server.http import Failure
from hhh_router.pipeline import ChatDelta, ChatFinished
from hhh_router.trace.block import Metadata
from hhh_router.types import ChatRequest


class StreamWriter(Protocol):
    """Turns the events of one streamed reply into frames, ready to be sent."""

    def delta(self, event: ChatDelta) -> Sequence[bytes]:
        """Frames for one piece."""
        ...

    def end(self, done: ChatFinished) -> Sequence[bytes]:
        """Frames that end the reply."""
        ...


class Dialect(Protocol):
    """One chat as its client wants it told."""

    @property
    def request(self) -> ChatRequest:
        """What is asked."""
        ...

    @property
    def model(self) -> str:
        """The model's name as it was asked for."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the reply is wanted piece by piece."""
        ...

    def whole(self, done: ChatFinished) -> Mapping[str, Any]:
        """The body of a reply that is not streamed."""
        ...

    def begin(self, first: Metadata) -> StreamWriter:
        """A writer for a reply that is about to begin."""
        ...

    def failure(self, error: Exception) -> Failure:
        """How the client is told that it failed."""
        ...

    @property
    def ping(self) -> bytes:
        """A frame that says nothing and keeps a quiet stream open."""
        ...

    def broken(self, body: Mapping[str, Any]) -> bytes:
        """The last frame of a stream that failed after its status had left."""
        ...


def event(name: str | None, data: bytes) -> bytes:
    """One server-sent event.

    >>> event("ping", b"{}")
    b'event: ping\\ndata: {}\\n\\n'
    """
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"
