"""The audit: what a sidecar was about to let out, before the first byte left, and what became of it. Hash-chained.

One row an event, appended and never changed, in SQLite (WAL, ``synchronous=FULL``). Rows of requests that come together
are committed together by one thread. Each row's hash covers the row before, so that a row that is changed, taken out or
put in shows from there on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import platformdirs
from filelock import FileLock, Timeout

from hhh_router.errors import SettingsError, Unavailable
from hhh_router.trace.redact import Patterns, redact

_log = logging.getLogger(__name__)

Kind = Literal["intent", "outcome", "verdict", "interrupted"]
"""``intent``: about to answer; ``outcome``: how it ended; ``verdict``: read afterwards; ``interrupted``: by a crash."""

GENESIS = "0" * 64
MOST_TOGETHER = 512
"""Rows of one commit."""
MOST_WAITING = 10_000
"""Rows that wait to be written; further ones fail."""
MAX_ROW_BYTES = 1 << 20
_PRIVATE = 0o600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    request_id TEXT NOT NULL,
    record TEXT NOT NULL,
    hash TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS rows_by_request ON rows (request_id, kind);
CREATE TRIGGER IF NOT EXISTS rows_stay BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows of the audit stay'); END;
CREATE TRIGGER IF NOT EXISTS rows_are_kept BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'rows are kept'); END;
"""
_OPEN = """
SELECT request_id FROM rows WHERE kind = 'intent' AND NOT EXISTS
    (SELECT 1 FROM rows AS later WHERE later.request_id = rows.request_id AND later.kind IN ('outcome', 'interrupted'))
ORDER BY seq
"""


def default_audit() -> Path:
    """Where the audit is kept when nobody says otherwise."""
    return Path(platformdirs.user_state_dir("hhh-router", appauthor=False)) / "audit.sqlite3"


class Audit(Protocol):
    """Where intents and outcomes are kept."""

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """Store a row; it survives a crash when this returns.

        Raises:
            Unavailable: It could not be stored.
        """
        ...

    async def aclose(self) -> None:
        """Write what waits, and close."""
        ...


class NoAudit:
    """Keeps nothing."""

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    async def aclose(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One event."""

    seq: int
    """Counts from 1, without a gap."""
    time: float
    """Seconds since 1970, by the machine's clock, which may jump; ``seq`` tells the order."""
    kind: str
    request_id: str
    record: str
    """JSON, with secrets replaced."""
    hash: str
    """sha256 over the hash of the row before and everything in this one."""

    def as_json(self) -> dict[str, Any]:
        """For export."""
        record = json.loads(self.record)
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind,
            "request_id": self.request_id,
            "record": record,
            "hash": self.hash,
        }


def row_hash(before: str, *, seq: int, time: float, kind: str, request_id: str, record: str) -> str:
    """What ties a row to all before it."""
    told = json.dumps([before, seq, time, kind, request_id, record], separators=(",", ":"))
    return hashlib.sha256(told.encode("ascii")).hexdigest()


@dataclass(slots=True)
class _Waiting:
    kind: Kind
    request_id: str
    record: str
    time: float
    loop: asyncio.AbstractEventLoop
    stored: asyncio.Future[None]


class SqliteAudit:
    """`Audit` in one SQLite file, which one process writes at a time.

    Intents of an earlier process that have no outcome are marked interrupted at the start.

    Args:
        path: The file; it is made, readable by its owner alone, where there is none.
        clock: Seconds since 1970.
        patterns: Further secrets to replace before anything is written.

    Raises:
        SettingsError: It cannot be written, is in use, or is no audit.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time, patterns: Patterns = ()) -> None:
        self.path = Path(path)
        self.failures = 0
        """Rows that could not be stored since the start."""
        self._clock = clock
        self._patterns = patterns
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting = 0
        self._closed = False
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, _PRIVATE))
        except Timeout as error:
            raise SettingsError(
                f"{self.path}: another process writes this audit", hint="name another file with --audit"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"{self.path}: the audit cannot be written ({error.strerror})",
                hint="name a file in a folder that this user may write to with --audit, or --audit none",
            ) from error
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
            self._inode = self.path.stat().st_ino
            self._last = self._head()
            self._mark_interrupted()
        except sqlite3.Error as error:
            self._lock.release()
            raise SettingsError(
                f"{self.path}: no audit can be kept in it ({error})", hint="name another file with --audit"
            ) from error
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._thread.start()

    async def write(self, kind: Kind, request_id: str, record: Mapping[str, Any]) -> None:
        """See `Audit`."""
        if self._closed or self._waiting >= MOST_WAITING:
            self.failures += 1
            raise _not_kept("it is closed" if self._closed else f"{self._waiting:,} rows wait to be written")
        text = json.dumps(redact(dict(record), patterns=self._patterns), separators=(",", ":"), sort_keys=True)
        if len(text) > MAX_ROW_BYTES:
            text = json.dumps({"left_out": f"a record of {len(text):,} bytes"})
        loop = asyncio.get_running_loop()
        stored: asyncio.Future[None] = loop.create_future()
        self._waiting += 1
        self._queue.put(_Waiting(kind, request_id, text, self._clock(), loop, stored))
        await asyncio.shield(stored)  # a caller that goes away does not take the row back

    async def aclose(self) -> None:
        """See `Audit`."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
            self._db.close()
            self._lock.release()

    def _head(self) -> tuple[int, str]:
        found = self._db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
        return found or (0, GENESIS)

    def _mark_interrupted(self) -> None:
        still = [request_id for (request_id,) in self._db.execute(_OPEN)]
        if still:
            _log.warning("%s: %d requests were under way when the last process ended", self.path, len(still))
        for i in range(0, len(still), MOST_TOGETHER):
            self._commit([("interrupted", r, "{}", self._clock()) for r in still[i : i + MOST_TOGETHER]])

    def _work(self) -> None:
        """The thread: takes whatever waits, and commits it together."""
        ended = False
        while not ended:
            taken = [self._queue.get()]
            while len(taken) < MOST_TOGETHER and not self._queue.empty():
                taken.append(self._queue.get())
            rows = [row for row in taken if row is not None]
            ended = len(rows) < len(taken)
            failure: Unavailable | None = None
            try:
                if rows:
                    self._commit([(r.kind, r.request_id, r.record, r.time) for r in rows])
            except (sqlite3.Error, OSError) as error:
                failure = _not_kept(str(error))
                self.failures += len(rows)
                _log.error("%s: %d rows not stored (%s)", self.path, len(rows), error)
            self._tell(rows, failure)

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

    def _commit(self, rows: Sequence[tuple[str, str, str, float]]) -> None:
        """Append rows in one transaction; all of them are stored, or none.

        Raises:
            sqlite3.Error, OSError: They are not stored.
        """
        if self.path.stat().st_ino != self._inode:  # SQLite would go on writing to a file that nobody will find
            raise OSError("the file was replaced")
        seq, before = self._last
        filled = []
        for kind, request_id, record, at in rows:
            seq += 1
            before = row_hash(before, seq=seq, time=at, kind=kind, request_id=request_id, record=record)
            filled.append((seq, at, kind, request_id, record, before))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", filled)
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._last = seq, before


def _not_kept(why: str) -> Unavailable:
    return Unavailable(f"the audit cannot be kept: {why}", hint="see the log", retry_after_s=5.0)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found in an audit."""

    rows: int
    head: str
    """Hash of the last row: keep it elsewhere, and a later audit has to contain it."""
    broken_at: int | None
    """The first row that does not follow from the one before; None when all do."""
    reason: str | None
    unfinished: int
    """Intents without an outcome: under way, or a crash nobody has started again after."""
    interrupted: int


def read_rows(path: str | Path, *, last: int | None = None) -> Iterator[Row]:
    """The rows of an audit in order, or only the last ones. A process may go on writing it.

    Raises:
        SettingsError: There is no such audit.
    """
    columns = "seq, time, kind, request_id, record, hash"
    asked = f"SELECT {columns} FROM rows ORDER BY seq"
    if last is not None:
        asked = f"SELECT * FROM (SELECT {columns} FROM rows ORDER BY seq DESC LIMIT {int(last)}) ORDER BY seq"
    with closing(_reading(path)) as db:
        for seq, at, kind, request_id, record, hashed in db.execute(asked):
            yield Row(seq=seq, time=at, kind=kind, request_id=request_id, record=record, hash=hashed)


def verify(path: str | Path, *, contains: str | None = None) -> Verified:
    """Follow the chain from its start.

    Args:
        path: The audit.
        contains: A head kept from an earlier time, which has to be one of the hashes: an audit that was cut off after
            it, or written anew, lacks it.

    Raises:
        SettingsError: There is no such audit.
    """
    before, seq, broken, reason = GENESIS, 0, None, None
    seen = contains in (None, GENESIS)
    open_intents: set[str] = set()
    interrupted = 0
    for row in read_rows(path):
        seq += 1
        hashed = row_hash(
            before, seq=row.seq, time=row.time, kind=row.kind, request_id=row.request_id, record=row.record
        )
        if broken is None and row.seq != seq:
            broken, reason = row.seq, f"row {seq} is missing"
        elif broken is None and hashed != row.hash:
            broken, reason = row.seq, "it is not what was written"
        before = row.hash
        seen = seen or row.hash == contains
        if row.kind == "intent":
            open_intents.add(row.request_id)
        elif row.kind in ("outcome", "interrupted"):
            open_intents.discard(row.request_id)
            interrupted += row.kind == "interrupted"
    if broken is None and not seen:
        broken, reason = seq, f"the head {contains} is not in it: it was cut off, or written anew"
    return Verified(
        rows=seq, head=before, broken_at=broken, reason=reason, unfinished=len(open_intents), interrupted=interrupted
    )


def _reading(path: str | Path) -> sqlite3.Connection:
    """A connection that only reads."""
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        db.execute("SELECT 1 FROM rows LIMIT 1")
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        raise SettingsError(f"{path}: no audit can be read ({error})", hint="name it with --audit") from error
    return db
