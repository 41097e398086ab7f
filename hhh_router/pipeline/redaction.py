"""Taking out of an answer what a policy redacts, while it leaves: what may still become such a text waits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from hhh_router.pipeline.results import ChatDelta
from hhh_router.trace.spans import Spans, without


class Redacting(Protocol):
    """Redacts one answer on its way out."""

    @property
    def counts(self) -> Counter[str]:
        """What was taken out so far, and how often."""
        ...

    def push(self, piece: ChatDelta, kinds: Sequence[str]) -> list[ChatDelta]:
        """What may leave once a cleared piece is there; ``kinds`` are looked for from it on."""
        ...

    def end(self) -> list[ChatDelta]:
        """What is left when nothing more comes."""
        ...


class TextRedacting:
    """For answers of our own.

    >>> redacting = TextRedacting()
    >>> told = redacting.push(ChatDelta(text="Write to ann@mail."), ["emails"])
    >>> told += redacting.push(ChatDelta(text="example today"), ["emails"]) + redacting.end()
    >>> "".join(piece.text for piece in told), dict(redacting.counts)
    ('Write to [redacted:email] today', {'emails': 1})
    """

    def __init__(self) -> None:
        self._spans = Spans()
        self._held: deque[ChatDelta] = deque()
        self._at = 0  # where the first held piece begins

    @property
    def counts(self) -> Counter[str]:
        """See `Redacting`."""
        return self._spans.counts

    def push(self, piece: ChatDelta, kinds: Sequence[str]) -> list[ChatDelta]:
        """See `Redacting`. A call of a tool is no text, and nothing is found across it."""
        self._spans.look_for(kinds)
        self._spans.feed(piece.text)
        self._held.append(piece)
        if piece.tool_calls:
            self._spans.end()
        return self._leaving()

    def end(self) -> list[ChatDelta]:
        """See `Redacting`."""
        self._spans.end()
        return self._leaving()

    def _leaving(self) -> list[ChatDelta]:
        told = []
        while self._held and self._at + len(self._held[0].text) <= self._spans.final:
            piece = self._held.popleft()
            text = without(piece.text, self._spans.found, self._at)
            self._at += len(piece.text)
            # tokens of a text that was changed would tell what stood there
            told.append(piece if text == piece.text else replace(piece, text=text, logprobs=()))
        self._spans.forget(self._at)
        return told
