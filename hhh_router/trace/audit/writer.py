"""Writing an audit: one thread takes whatever waits, chains it and commits it together, whatever the store."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

from hhh_router.errors import Unavailable
from hhh_router.trace.audit.chain import Anchor, Kind, Row, chained
from hhh_router.trace.redact import Redactor

_log = logging.getLogger(__name__)

MOST_TOGETHER = 512
"""Rows of one commit."""
MOST_WAITING = 10_000
"""Rows that wait to be written; further ones fail."""
MOST_LATE_BYTES = 64_000_000
"""Of rows that could not be stored and are tried again; further ones are lost."""
LATE_EVERY_S = 1.0
FAILING_S = 30.0
"""How long a failure speaks for the next row; after that, nobody knows until one is tried."""
MAX_ROW_BYTES = 1 << 20
ROW_BYTES = 300
"""What a row takes beside its record, with its place in the indexes; about."""
MOST_PRUNED = 2000
"""Rows that are removed together; new rows are written in between."""
PRUNED_EVERY_S = 3600.0
_DAY_S = 86_400.0


class Audit(Protocol):
    """Where intents and outcomes are kept."""

    failures: int
    """Rows that were lost since the start."""

    @property
    def is_failing(self) -> bool:
        """Whether rows cannot be stored, as far as is known."""
        ...

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """Store a row; it survives a crash when this returns.

        Raises:
            Unavailable: It could not be stored. What tells of the past is tried again later, as long as there is room;
                an intent is not, for whoever asked has given up.
        """
        ...

    async def aclose(self) -> None:
        """Write what waits, and close."""
        ...


class NoAudit:
    """Keeps nothing."""

    failures = 0
    is_failing = False

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    async def aclose(self) -> None:
        """Do nothing."""


class NotStored(Exception):
    """A store could not do what it was asked for; nothing of it was done, or nobody knows."""


class Old(NamedTuple):
    """What deciding about an old row takes."""

    seq: int
    time: float
    kind: str
    hash: str
    size: int
    """In bytes, as in `Store.size`."""


class Store(Protocol):
    """Where the rows of one audit are, which this process alone writes. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """For messages, without a password."""
        ...

    def head(self) -> tuple[int, str]:
        """Number and hash of the last row; ``(0, GENESIS)`` where there is none.

        Raises:
            NotStored: It cannot be read now.
        """
        ...

    def open_intents(self) -> list[str]:
        """Requests whose intent has no outcome, in order."""
        ...

    def append(self, rows: Sequence[Row]) -> None:
        """Store rows, all or none; they survive a crash when this returns.

        Raises:
            NotStored: They could not be stored.
        """
        ...

    def size(self) -> int:
        """Bytes of all rows together, about: of each its record and `ROW_BYTES`.

        Raises:
            NotStored: It cannot be read now.
        """
        ...

    def oldest(self, most: int) -> list[Old]:
        """The oldest rows, no more than so many.

        Raises:
            NotStored: It cannot be read now.
        """
        ...

    def prune(self, anchor: Anchor, told: Row) -> None:
        """Remove the rows up to the anchor and store the row that says so, both or neither.

        Raises:
            NotStored: It could not be done.
        """
        ...

    def compact(self) -> None:
        """Give back the room that removed rows took, as far as the store can."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long rows are kept; without either bound for ever."""

    days: float | None = None
    megabytes: float | None = None
    """Of rows; what the store's own bookkeeping takes comes on top."""

    @property
    def is_bounded(self) -> bool:
        """Whether anything is ever removed."""
        return self.days is not None or self.megabytes is not None

    def removable(self, oldest: Sequence[Old], *, now: float, size: int) -> int:
        """How many of the oldest rows may go: up to the first that is young enough, or until the rest is small enough.

        >>> old = [Old(1, 5.0, "intent", "", 10), Old(2, 9e9, "outcome", "", 10), Old(3, 6.0, "intent", "", 10)]
        >>> Retention(days=1).removable(old, now=1e9, size=30)
        1
        >>> Retention(days=1, megabytes=11e-6).removable(old, now=1e9, size=30)
        2
        """
        aged = 0
        if self.days is not None:
            before = now - self.days * _DAY_S
            aged = sum(1 for _ in takewhile(lambda row: row.time < before, oldest))
        beyond, excess = 0, 0.0 if self.megabytes is None else size - self.megabytes * 1e6
        while excess > 0 and beyond < len(oldest):
            excess -= oldest[beyond].size
            beyond += 1
        return max(aged, beyond)


@dataclass(slots=True)
class _Waiting:
    kind: Kind
    request_id: str
    record: str
    time: float
    loop: asyncio.AbstractEventLoop
    stored: asyncio.Future[None]


class ChainedAudit:
    """`Audit` over a store.

    Intents of an earlier process that have no outcome are marked interrupted at the start.

    Args:
        store: Whose only writer this process is.
        clock: Seconds since 1970.
        redactor: Replaces secrets before anything is written.
        retention: What is removed, now and every hour. It counts days by a steady clock from the start on, so that a
            clock that jumps while the process runs removes nothing.
        steady: Seconds that never jump.

    Raises:
        SettingsError: The store cannot be read or written at the start.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        redactor: Redactor | None = None,
        retention: Retention | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.failures = 0
        """Rows that were lost since the start."""
        self._failed_at: float | None = None  # by the steady clock; None once a row was stored
        self._late: list[_Waiting] = []
        self._late_bytes = 0
        self._clock = clock
        self._steady = steady
        self._redactor = redactor or Redactor()
        self._retention = retention or Retention()
        self._began = clock() - steady() if self._retention.is_bounded else None
        self._prune_at = float("inf") if self._began is None else steady()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting = 0
        self._closed = False
        self._last: tuple[int, str] | None = None
        self._size: int | None = None
        try:
            self._mark_interrupted()
        except NotStored as error:
            store.close()
            raise not_kept(str(error)) from error
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._thread.start()

    @property
    def is_failing(self) -> bool:
        """See `Audit`: the last row that was tried could not be stored, and that was within `FAILING_S`."""
        failed_at = self._failed_at
        return failed_at is not None and self._steady() - failed_at < FAILING_S

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """See `Audit`."""
        if self._closed or self._waiting >= MOST_WAITING:
            self.failures += 1
            raise not_kept("it is closed" if self._closed else f"{self._waiting:,} rows wait to be written")
        text = json.dumps(self._redactor.value(dict(record)), separators=(",", ":"), sort_keys=True)
        if len(text) > MAX_ROW_BYTES:
            text = json.dumps({"left_out": f"a record of {len(text):,} bytes"})
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()
        self._waiting += 1
        self._queue.put(_Waiting(kind, request_id, text, self._clock(), loop, stored))
        await asyncio.shield(stored)  # a caller that goes away does not take the row back

    async def aclose(self) -> None:
        """See `Audit`."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """The same, where no loop runs."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self.store.close()

    def _mark_interrupted(self) -> None:
        still = self.store.open_intents()
        if still:
            _log.warning("%s: %d requests were under way when the last process ended", self.store.name, len(still))
        for i in range(0, len(still), MOST_TOGETHER):
            self._commit([("interrupted", r, "{}", self._clock()) for r in still[i : i + MOST_TOGETHER]])

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Take whatever waits, and commit it together."""
        ended = False
        while not ended:
            taken = self._take()
            rows = [row for row in taken if row is not None]
            ended = len(rows) < len(taken)
            if rows:
                self._store(rows)
            elif self._late:
                self._store_late()
            if ended and self._late:
                self._lose("the process ends")
            if not ended and self._steady() >= self._prune_at:
                self._prune()

    def _take(self) -> list[_Waiting | None]:
        """What waits; empty when nothing came until it is time to prune, or to try late rows again."""
        wait_s = min(self._prune_at - self._steady(), LATE_EVERY_S if self._late else float("inf"))
        try:
            taken = [self._queue.get(timeout=None if wait_s == float("inf") else max(0.0, wait_s))]
        except queue.Empty:
            return []
        while len(taken) < MOST_TOGETHER and not self._queue.empty():
            taken.append(self._queue.get())
        return taken

    def _store(self, rows: Sequence[_Waiting]) -> None:
        failure: Unavailable | None = None
        try:
            self._commit([(r.kind, r.request_id, r.record, r.time) for r in rows])
        except NotStored as error:
            failure = not_kept(str(error))
            self._keep_for_later(rows, error)
        self._tell(rows, failure)
        if failure is None and self._late:
            self._store_late()
            if self._late:
                self._lose("others can be stored")  # or they would be tried for ever

    def _keep_for_later(self, rows: Sequence[_Waiting], why: NotStored) -> None:
        kept = 0
        for row in rows:
            if row.kind != "intent" and self._late_bytes + len(row.record) <= MOST_LATE_BYTES:
                self._late.append(row)
                self._late_bytes += len(row.record) + ROW_BYTES
                kept += 1
        self.failures += len(rows) - kept
        _log.error("%s: %d rows not stored (%s); %d are tried again", self.store.name, len(rows), why, kept)

    def _store_late(self) -> None:
        while self._late:
            some = self._late[:MOST_TOGETHER]
            try:
                self._commit([(r.kind, r.request_id, r.record, r.time) for r in some])
            except NotStored:
                return
            del self._late[: len(some)]
            self._late_bytes -= sum(len(row.record) + ROW_BYTES for row in some)

    def _lose(self, why: str) -> None:
        _log.error("%s: %d rows are lost: %s", self.store.name, len(self._late), why)
        self.failures += len(self._late)
        self._late, self._late_bytes = [], 0

    def _commit(self, events: Sequence[tuple[str, str, str, float]]) -> None:
        try:
            rows = chained(self._head(), events)
            self.store.append(rows)
        except NotStored:
            # where the chain ends is asked again, for the rows may be there all the same
            self._last = self._size = None
            self._failed_at = self._steady()
            raise
        self._failed_at = None
        self._last = rows[-1].seq, rows[-1].hash
        if self._size is not None:
            self._size += sum(len(row.record) + ROW_BYTES for row in rows)

    def _head(self) -> tuple[int, str]:
        if self._last is None:
            self._last = self.store.head()
        return self._last

    def _prune(self) -> None:
        try:
            more = self.prune_some(self._retention) == MOST_PRUNED
        except NotStored as error:
            more = False
            _log.error("%s: rows kept long enough were not removed (%s)", self.store.name, error)
        self._prune_at = self._steady() + (0.0 if more else PRUNED_EVERY_S)

    def prune_some(self, kept: Retention) -> int:
        """Remove some of the rows that have been kept long enough, oldest first; returns how many.

        For the thread, and for commands that write nothing else meanwhile.

        Raises:
            NotStored: It could not be done.
        """
        if self._size is None:
            self._size = 0 if kept.megabytes is None else self.store.size()
        oldest = self.store.oldest(MOST_PRUNED)
        now = self._clock() if self._began is None else self._began + self._steady()
        count = kept.removable(oldest, now=now, size=self._size)
        if count == 0 or (count == 1 and oldest[0].kind == "pruned"):  # or each would be removed by the next, for ever
            return 0
        last = oldest[count - 1]
        anchor = Anchor(seq=last.seq, hash=last.hash)
        record = json.dumps(anchor.record(), separators=(",", ":"), sort_keys=True)
        [told] = chained(self._head(), [("pruned", "", record, self._clock())])
        try:
            self.store.prune(anchor, told)
        except NotStored:
            self._last = self._size = None
            raise
        self._last = told.seq, told.hash
        self._size += len(told.record) + ROW_BYTES - sum(row.size for row in oldest[:count])
        return count

    def _tell(self, rows: Sequence[_Waiting], failure: Unavailable | None) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[_Waiting]] = {}
        for row in rows:
            by_loop.setdefault(row.loop, []).append(row)
        for loop, its in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._told, its, failure)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._waiting -= len(its)

    def _told(self, rows: Sequence[_Waiting], failure: Unavailable | None) -> None:
        self._waiting -= len(rows)
        for row in rows:
            if row.stored.done():
                continue
            if failure is None:
                row.stored.set_result(None)
            else:
                row.stored.set_exception(failure)
                row.stored.exception()  # whoever waits gets it; where nobody does, it was counted and logged


def not_kept(why: str) -> Unavailable:
    """What callers get when a row could not be stored."""
    return Unavailable(f"the audit cannot be kept: {why}", hint="see the log", retry_after_s=5.0)
