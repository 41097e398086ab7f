"""Taking out of an upstream's answer what a policy redacts: frames that hold none of it pass as they came."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from hhh_router.interfaces.proxy.exchange import Piece
from hhh_router.interfaces.proxy.frames import with_body
from hhh_router.interfaces.proxy.wires.texts import answer_texts, ends_texts
from hhh_router.pipeline.results import ChatDelta
from hhh_router.trace.spans import Spans, redacted, without

_Where = tuple[object, ...]


@dataclass(slots=True)
class _Open:
    """A text under way."""

    spans: Spans
    length: int = 0


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece of the answer that waits until the texts in it are final."""

    piece: Piece
    texts: Sequence[tuple[_Open, int, int]]
    """For each piece of a text in it: of which text, from where to where."""
    kinds: tuple[str, ...]
    """What is looked for in the whole texts in it."""

    @property
    def is_final(self) -> bool:
        return all(end <= text.spans.final for text, _, end in self.texts)


class FrameRedacting:
    """See `pipeline.redaction.Redacting`.

    A text of a stream is searched as it comes; a frame waits while the end of its text could still become part of what
    is taken out. Order is kept, so the frames behind it wait too. Texts that are told whole, in a body or once more at
    the end of a part, are searched as they stand.

    Args:
        wire: What the answer is written in.
    """

    def __init__(self, wire: str) -> None:
        self.counts: Counter[str] = Counter()
        """See `Redacting`."""
        self._wire = wire
        self._open: dict[_Where, _Open] = {}
        self._held: deque[_Held | ChatDelta] = deque()

    def push(self, piece: ChatDelta, kinds: Sequence[str]) -> list[ChatDelta]:
        """See `Redacting`."""
        pieces: Sequence[Piece] = piece.raw["pieces"] if piece.raw is not None else ()
        self._held += [self._taken(one, tuple(kinds)) for one in pieces]
        self._held.append(piece)  # it leaves with the last of its pieces
        return self._leaving()

    def end(self) -> list[ChatDelta]:
        """See `Redacting`."""
        self._close(list(self._open))
        return self._leaving()

    def _taken(self, piece: Piece, kinds: tuple[str, ...]) -> _Held:
        if piece.body is None:
            return _Held(piece, (), kinds)
        is_over = ends_texts(self._wire, piece.body)
        texts = []
        for text in answer_texts(self._wire, dict(piece.body)):
            if text.is_piece:
                under_way = self._open.setdefault(text.where, _Open(Spans(kinds)))
                under_way.spans.look_for(kinds)
                under_way.spans.feed(text.text)
                begin, under_way.length = under_way.length, under_way.length + len(text.text)
                texts.append((under_way, begin, under_way.length))
        if is_over is not None:
            self._close([where for where in self._open if is_over(where)])
        return _Held(piece, texts, kinds)

    def _close(self, places: Sequence[_Where]) -> None:
        for where in places:
            spans = self._open.pop(where).spans
            spans.end()
            self.counts.update(spans.counts)

    def _leaving(self) -> list[ChatDelta]:
        told: list[ChatDelta] = []
        ready: list[Piece] = []
        while self._held:
            first = self._held[0]
            if isinstance(first, _Held):
                if not first.is_final:
                    break
                ready.append(self._without(first))
            else:
                told.append(first if first.raw is None else replace(first, raw={"pieces": tuple(ready)}))
                ready = []
            self._held.popleft()
        if ready:  # of a delta whose last pieces still wait
            told.append(ChatDelta(text="", raw={"pieces": tuple(ready)}))
        return told

    def _without(self, held: _Held) -> Piece:
        """The piece as it may leave; itself where nothing has to be taken out of it."""
        piece = held.piece
        if piece.body is None:
            return piece
        body: dict[str, Any] = deepcopy(dict(piece.body))
        spans = iter(held.texts)
        counts = self.counts if self._counts_wholes(piece.body) else None
        is_changed = False
        for text in answer_texts(self._wire, body):
            before = text.text
            if text.is_piece:
                under_way, begin, _ = next(spans)
                after = without(before, under_way.spans.found, begin)
            else:
                after = redacted(before, held.kinds, counts)
            if after != before:
                text.put(after)
                is_changed = True
        return replace(piece, raw=with_body(piece.raw, body), body=body) if is_changed else piece

    def _counts_wholes(self, body: Mapping[str, Any]) -> bool:
        """Whether its texts are told here alone, and not once more after their pieces."""
        return "type" not in body or body["type"] == "message"
