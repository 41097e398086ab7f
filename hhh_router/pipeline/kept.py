"""A store in memory that forgets: the oldest first, when there are too many, when they are too large, when too old."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """What is kept for a while. For one event loop.

    >>> kept = Kept[str, str](most=2)
    >>> for word in ("a", "b", "c"):
    ...     kept.keep(word, word.upper())
    >>> kept.find("a"), kept.find("c")
    (None, 'C')
    """

    def __init__(
        self,
        *,
        most: int,
        most_size: float = math.inf,
        longest_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep nothing yet.

        Args:
            most: Entries.
            most_size: Of all entries together, in whatever unit they are kept with.
            longest_s: Seconds until an entry is forgotten.
            clock: Seconds.
        """
        self._most, self._most_size, self._longest_s, self._clock = most, most_size, longest_s, clock
        self._kept: OrderedDict[K, tuple[float, int, V]] = OrderedDict()
        self._size = 0

    def keep(self, key: K, value: V, *, size: int = 0) -> None:
        """Remember a value; a later one takes the place of an earlier."""
        self._forget(key)
        self._kept[key] = self._clock(), size, value
        self._size += size
        while self._kept and self._is_too_much(oldest := next(iter(self._kept))):
            self._forget(oldest)

    def find(self, key: K) -> V | None:
        """The value, if it is still known. It stays."""
        if (found := self._kept.get(key)) is None or self._is_old(found[0]):
            return None
        return found[2]

    def _is_too_much(self, oldest: K) -> bool:
        return len(self._kept) > self._most or self._size > self._most_size or self._is_old(self._kept[oldest][0])

    def _is_old(self, since: float) -> bool:
        return self._clock() - since > self._longest_s

    def _forget(self, key: K) -> None:
        if (found := self._kept.pop(key, None)) is not None:
            self._size -= found[1]
