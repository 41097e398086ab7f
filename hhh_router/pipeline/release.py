"""Holds a stream back: no text leaves before a reading that covers it has been cleared."""

from __future__ import annotations

from collections import deque

from hhh_router.protocols import Delta


class Release:
    """The part of a reply that nobody has cleared yet, in order.

    A reading covers the deltas that arrived before it, up to the number of tokens it says it has seen.

    >>> release = Release()
    >>> release.hold(Delta(text="Par")); release.hold(Delta(text="is"))
    >>> [d.text for d in release.clear(covered_tokens=1)]
    ['Par']
    >>> release.uncleared
    True
    """

    def __init__(self) -> None:
        self._held: deque[tuple[int, Delta]] = deque()  # tokens of the reply up to and including the delta
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens of the reply that arrived so far, cleared or not."""
        return self._tokens

    @property
    def uncleared(self) -> bool:
        """True while something held carries tokens or text, so that only a reading may clear it."""
        return any(delta.text or delta.tokens or delta.told for _, delta in self._held)

    def hold(self, delta: Delta) -> None:
        """Add a piece nobody has read yet."""
        self._tokens += delta.tokens
        self._held.append((self._tokens, delta))

    def clear(self, *, covered_tokens: int) -> list[Delta]:
        """Take out what a cleared reading has seen.

        Args:
            covered_tokens: Tokens of the reply, counted from its start, that the reading saw.
        """
        cleared = []
        while self._held and self._held[0][0] <= covered_tokens:
            cleared.append(self._held.popleft()[1])
        return cleared

    def text(self, *, covered_tokens: int) -> str:
        """What is held of the text that a reading has seen."""
        return "".join(delta.text for tokens, delta in self._held if tokens <= covered_tokens)

    def take_all(self) -> list[Delta]:
        """Take out everything: in shadow mode, or where the policy goes on without a reading (``on_error: open``)."""
        taken = [delta for _, delta in self._held]
        self._held.clear()
        return taken

    def drop(self) -> None:
        """Throw away what is held; it never leaves."""
        self._held.clear()
