"""Where requests are remembered for feedback, and where the labels go: one SQLite file, or this process's memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from hhh_router.errors import SettingsError, Unavailable, UnknownRequest
from hhh_router.trace.build import canonical_request
from hhh_router.trace.feedback import LEAST_PROBABILITY, Label, Labelled, Remembered, check_fits
from hhh_router.trace.redact import Redactor
from hhh_router.trace.sinks import Request

T = TypeVar("T")

_log = logging.getLogger(__name__)

MOST_REQUESTS: Final = 10_000
"""Requests without a label that are remembered, about 1 kB each."""
LONGEST_S: Final = 30 * 86_400.0
"""They are forgotten after so long."""
MAX_TEXT_BYTES: Final = 32_768
"""Texts of one request and its reply; longer ones are not kept."""
MOST_LABELLED: Final = 200_000
"""Labelled requests of one file; what is labelled is never forgotten, so a further one is turned away."""
MOST_WAITING: Final = 10_000
"""Requests that wait to be written; further ones are not remembered."""
_PRUNED_EVERY = 100  # requests
_BUSY_S = 5.0
_PRIVATE = 0o600
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    seq INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL UNIQUE,
    time REAL NOT NULL,
    labelled INTEGER NOT NULL DEFAULT 0,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS requests_by_label ON requests (labelled, seq);
CREATE TABLE IF NOT EXISTS labels (
    request_id TEXT NOT NULL,
    key TEXT NOT NULL,
    by TEXT NOT NULL,
    time REAL NOT NULL,
    labels TEXT NOT NULL,
    probability REAL,
    PRIMARY KEY (request_id, key, by)
);
"""
_LABELLED = """
SELECT requests.record, labels.by, labels.labels, labels.probability
FROM labels JOIN requests USING (request_id) ORDER BY requests.seq, labels.time
"""

Status = Literal["stored", "unchanged", "replaced"]
_Waiting = tuple[Remembered, Request, str | None]


class FeedbackStore:
    """Remembers the latest requests and keeps what is said of them.

    One thread of its own writes, in order; requests that come together are committed together. Several processes may
    share a file.

    Args:
        path: The file; it is made, readable by its owner alone, where there is none. None: this process's memory.
        content: ``full`` keeps the texts of requests and replies too, secrets replaced.
        most: Requests without a label that are remembered.
        longest_s: Seconds after which they are forgotten.
        clock: Seconds since 1970.

    Raises:
        SettingsError: The file cannot be written, or is no such store.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        content: Literal["hash", "full"] = "hash",
        most: int = MOST_REQUESTS,
        longest_s: float = LONGEST_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.redactor = Redactor()
        """Replaces secrets; a deployment that has more than the usual ones puts its own here."""
        self.failures = 0
        """Requests that could not be remembered since the start."""
        self.changes = 0
        """Labels that were stored since the start."""
        self._content = content
        self._most, self._longest_s, self._clock = most, longest_s, clock
        self._waiting: deque[_Waiting] = deque()
        self._scheduled = self._closed = False
        self._unpruned = 0
        self._db = _open(self.path)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feedback")

    @property
    def durable(self) -> bool:
        """Whether labels outlive this process."""
        return self.path is not None

    def remember(self, seen: Remembered, request: Request, reply: str | None) -> None:
        """Keep a finished request; returns at once. What cannot be kept is logged and counted, never raised.

        Args:
            seen: Its record.
            request: What was asked, for deployments that keep texts.
            reply: What reached the caller.
        """
        if self._closed or len(self._waiting) >= MOST_WAITING:
            self.failures += 1
            return
        self._waiting.append((seen, request, reply))
        if not self._scheduled:
            self._scheduled = True
            self._thread.submit(self._write)

    async def label(self, label: Label, *, key: str = "") -> Status:
        """Keep what a labeller says; it survives a crash when this returns, where the store is a file.

        Args:
            label: What is said.
            key: Name of the API key it came with; labellers of two keys are two labellers.

        Raises:
            UnknownRequest: The request is not remembered (any more).
            InvalidRequest: That cannot be said of it.
            Unavailable: It could not be stored.
        """
        return await self._done(lambda: self._label(label, key))

    async def labelled(self) -> list[Labelled]:
        """Every labelled request, the oldest first.

        Raises:
            Unavailable: They cannot be read.
        """
        if self.path is not None and not self._closed:
            try:
                return await asyncio.to_thread(read_labelled, self.path)  # writing goes on meanwhile
            except SettingsError as error:
                raise Unavailable(error.message, hint=error.hint) from error
        return await self._done(lambda: _labelled(self._db))

    async def aclose(self) -> None:
        """Write what waits, and close; does nothing the second time."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._thread.shutdown)
            self._db.close()

    async def _done(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise Unavailable("the feedback store is closed")
        future: Future[T] = self._thread.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except sqlite3.Error as error:
            _log.error("%s: feedback not stored (%s)", self.path or "memory", error)
            raise Unavailable("the feedback store cannot be used", hint="its server's log says why") from error

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._scheduled = False  # first, so that whatever comes from now on is written by this call or by a further one
        rows = []
        while self._waiting:
            seen, request, reply = self._waiting.popleft()
            try:
                rows.append((seen.request_id, seen.time, self._record(seen, request, reply)))
            except (TypeError, ValueError, RecursionError) as error:  # a client's passthrough nested beyond reason
                self._lost(1, f"no JSON can be made of it: {type(error).__name__}")
        try:
            with self._db:
                self._db.executemany("INSERT OR IGNORE INTO requests (request_id, time, record) VALUES (?, ?, ?)", rows)
                self._unpruned += len(rows)
                if self._unpruned >= min(_PRUNED_EVERY, self._most):
                    self._prune()
        except sqlite3.Error as error:
            self._lost(len(rows), str(error))

    def _lost(self, rows: int, why: str) -> None:
        self.failures += rows
        _log.error("%s: %d requests not remembered for feedback (%s)", self.path or "memory", rows, why)

    def _record(self, seen: Remembered, request: Request, reply: str | None) -> str:
        if self._content == "full":
            texts = self.redactor.value({"request": canonical_request(request), "reply": reply})
            if len(json.dumps(texts)) <= MAX_TEXT_BYTES:
                seen = replace(seen, texts=texts)
        return json.dumps(seen.as_json(), separators=(",", ":"), allow_nan=False)

    def _prune(self) -> None:
        """Forget what is too old or too much; never what has a label."""
        self._unpruned = 0
        last = self._db.execute(
            "SELECT seq FROM requests WHERE labelled = 0 ORDER BY seq DESC LIMIT 1 OFFSET ?", (self._most,)
        ).fetchone()
        self._db.execute(
            "DELETE FROM requests WHERE labelled = 0 AND (time < ? OR seq <= ?)",
            (self._clock() - self._longest_s, last[0] if last else -1),
        )

    def _label(self, label: Label, key: str) -> Status:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")  # two processes that share the file take turns from here on
            found = self._db.execute(
                "SELECT record, labelled FROM requests WHERE request_id = ?", (label.request_id,)
            ).fetchone()
            if found is None:
                raise UnknownRequest(
                    f"request {label.request_id} is not remembered",
                    hint="the latest requests are, for a while; see HHH_ROUTER_FEEDBACK_REQUESTS",
                )
            check_fits(label, Remembered.from_json(json.loads(found[0])))
            if not found[1]:
                (many,) = self._db.execute("SELECT count(*) FROM requests WHERE labelled = 1").fetchone()
                if many >= MOST_LABELLED:
                    raise Unavailable(f"{many:,} requests are labelled", hint="calibrate, and begin another file")
            where = (label.request_id, key, label.by)
            told = json.dumps(dict(label.labels), separators=(",", ":"))
            before = self._db.execute(
                "SELECT labels, probability FROM labels WHERE request_id = ? AND key = ? AND by = ?", where
            ).fetchone()
            if before == (told, label.probability):
                return "unchanged"
            self._db.execute(
                "INSERT OR REPLACE INTO labels (request_id, key, by, time, labels, probability) VALUES (?,?,?,?,?,?)",
                (*where, self._clock(), told, label.probability),
            )
            self._db.execute("UPDATE requests SET labelled = 1 WHERE request_id = ?", (label.request_id,))
        self.changes += 1
        return "stored" if before is None else "replaced"


def read_labelled(path: str | Path) -> list[Labelled]:
    """Every labelled request of a file, the oldest first. A server may go on writing it.

    Raises:
        SettingsError: There is no such store.
    """
    with closing(_reading(path)) as db:
        return _labelled(db)


def read_remembered(path: str | Path) -> Iterator[Remembered]:
    """The requests of a file, the oldest first.

    Raises:
        SettingsError: There is no such store.
    """
    with closing(_reading(path)) as db:
        for (record,) in db.execute("SELECT record FROM requests ORDER BY seq"):
            yield Remembered.from_json(json.loads(record))


def _labelled(db: sqlite3.Connection) -> list[Labelled]:
    found: dict[str, Labelled] = {}
    for record, by, labels, probability in db.execute(_LABELLED):
        request = Remembered.from_json(json.loads(record))
        label = Label(request_id=request.request_id, labels=json.loads(labels), by=by, probability=probability)
        before = found.get(request.request_id)
        said = (label,) if before is None else (*before.said, label)
        found[request.request_id] = Labelled(request=request, said=said)
    return list(found.values())


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, _PRIVATE))
        except OSError as error:
            raise SettingsError(
                f"{path}: feedback cannot be kept there ({error.strerror})",
                hint="name a file in a folder that this user may write to with HHH_ROUTER_FEEDBACK",
            ) from error
    try:
        db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=_BUSY_S)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            db.execute(f"PRAGMA {pragma}")
        db.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise SettingsError(
            f"{path}: no feedback can be kept in it ({error})", hint="name another file with HHH_ROUTER_FEEDBACK"
        ) from error
    return db


def _reading(path: str | Path) -> sqlite3.Connection:
    """A connection that only reads."""
    db: sqlite3.Connection | None = None
    try:
        db = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        db.execute("SELECT 1 FROM labels LIMIT 1")
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        raise SettingsError(
            f"{path}: no feedback can be read ({error})", hint="name the file that HHH_ROUTER_FEEDBACK names"
        ) from error
    return db


def draw_requests(path: str | Path, *, rate: float, rate_stopped: float, seed: int) -> Iterator[dict[str, Any]]:
    """Requests of a file drawn at random, each alone and whatever else is there, as a label's body to be filled in.

    Whether somebody complained about a request already must not matter to whether it is drawn; those that were drawn
    and labelled already are left out.

    Args:
        path: The file.
        rate: Probability of a request that was let through.
        rate_stopped: Of one that was stopped.
        seed: Of the draw; the same seed draws the same requests.

    Raises:
        SettingsError: There is no such store, or a rate is too small or none.
    """
    for name, share in (("--rate", rate), ("--rate-stopped", rate_stopped)):
        if not LEAST_PROBABILITY <= share <= 1:
            raise SettingsError(f"{name} {share}: not between {LEAST_PROBABILITY} and 1", hint="give a probability")
    done = {row.request.request_id for row in read_labelled(path) if row.weight is not None}
    for request in read_remembered(path):
        probability = rate_stopped if request.stopped else rate
        digest = hashlib.sha256(f"{seed} {request.request_id}".encode()).digest()
        if request.request_id not in done and int.from_bytes(digest[:8]) / 2**64 < probability:
            told = {"request_id": request.request_id, "sampled": True, "probability": probability, "labels": {}}
            yield told | {"action": request.action} | ({} if request.texts is None else {"texts": request.texts})
