"""Which request keeps killing the engine's process: those that were under way in two crashes, found one at a time."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable

from hhh_router.errors import Quarantined
from hhh_router.types import ChatRequest

_KEPT_S = 600.0


class Quarantine:
    """Holds back suspects, so that at most one of them runs at a time; the one that runs in a second crash is guilty.

    After a crash everything that was under way is suspect. Callers send their requests again, the guilty one among
    them: run together they would all be there in the next crash too. Not thread-safe: its owner holds a lock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._suspects: dict[str, float] = {}  # digest → when it is forgotten
        self._guilty: dict[str, float] = {}
        self._running: str | None = None
        self._held: deque[tuple[str, Callable[[], None]]] = deque()

    def admit(self, digest: str, start: Callable[[], None]) -> None:
        """Call ``start`` now, or once no other suspect runs.

        Raises:
            Quarantined: This request was under way, the only suspect, when the process died again.
        """
        now = self._clock()
        for kept in (self._suspects, self._guilty):
            for old in [d for d, until in kept.items() if until < now]:
                del kept[old]
        if digest in self._guilty:
            raise Quarantined("this request stopped the engine twice", hint="do not send it again")
        if digest in self._suspects:
            if self._running is not None:
                self._held.append((digest, start))
                return
            self._running = digest
        start()

    def ended(self, digest: str, *, cancelled: bool = False) -> None:
        """A request is over without a crash, so the next suspect may run; unless it was cancelled, it is cleared."""
        if not cancelled:
            self._suspects.pop(digest, None)
        if self._running == digest:
            self._running = None
            self._next()

    def crashed(self, digests: set[str]) -> None:
        """The process died with these under way."""
        until = self._clock() + _KEPT_S
        if self._running in digests:
            assert self._running is not None
            self._guilty[self._running] = until
            self._suspects.pop(self._running, None)
        else:
            self._suspects |= dict.fromkeys(digests, until)
        self._running = None

    def forget_held(self) -> None:
        """Drop what is held back; its owner has told the callers."""
        self._held.clear()

    def _next(self) -> None:
        while self._held and self._running is None:
            digest, start = self._held.popleft()
            if digest in self._suspects:
                self._running = digest
            start()


def chat_digest(request: ChatRequest) -> str:
    """Names what a chat asks, whoever asks it."""
    prompt = (request.messages, request.tools, request.continues, request.prompt_ids)
    return _digest("chat", prompt, request.weights, request.sampling)


def read_digest(requests: object) -> str:
    """Names the texts of one call."""
    return _digest("read", requests)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()
