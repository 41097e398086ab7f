"""The queue of held calls: a call that a policy holds waits here until a person has approved or denied it.

One SQLite file, which any number of proxies and `hhh-router queue` open at once: whoever holds a call polls its row,
whoever decides changes it, each in one statement, so that a call is decided once. What is asked for (the arguments)
stands in the row only while it waits.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from hhh_router.errors import InvalidRequest, SettingsError, Unavailable
from hhh_router.trace.audit import default_audit
from hhh_router.trace.redact import Redactor

Status = Literal["waiting", "approved", "denied", "expired", "abandoned"]
"""``expired``: nobody decided in time; ``abandoned``: whoever asked for the call has gone."""

POLL_S = 0.25
MAX_ARGUMENT_BYTES = 256_000
"""A larger call cannot be shown to whoever decides, so it cannot be held."""
_BUSY_S = 5.0
_PAUSE_S = 0.02
_PRIVATE = 0o600
_DIGITS = 12
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY,
    door TEXT NOT NULL,
    request_id TEXT NOT NULL,
    session TEXT NOT NULL,
    tool TEXT NOT NULL,
    arguments TEXT,
    policy TEXT NOT NULL,
    rule TEXT NOT NULL,
    reason TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL,
    status TEXT NOT NULL,
    decided REAL,
    decided_by TEXT,
    note TEXT
);
CREATE INDEX IF NOT EXISTS calls_by_status ON calls (status, created);
"""
_COLUMNS = (
    "id, door, request_id, session, tool, arguments, policy, rule, reason, created, expires, status, decided, "
    "decided_by, note"
)


def default_queue() -> Path:
    """Where held calls wait when nobody says otherwise: beside the audit."""
    return default_audit().with_name("held.sqlite3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A call that is to wait."""

    door: str
    """Which door holds it, such as ``mcp``."""
    request_id: str
    """Its rows in the audit."""
    session: str
    """The conversation it belongs to."""
    tool: str
    arguments: Any
    """JSON; stored with secrets replaced."""
    policy: str
    """``name@version``."""
    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCall:
    """A call in the queue, or one that was."""

    id: str
    door: str
    request_id: str
    session: str
    tool: str
    arguments: Any
    """With secrets replaced; None once it no longer waits."""
    policy: str
    rule: str
    reason: str
    created: float
    """Seconds since 1970."""
    expires: float
    status: Status
    decided: float | None
    decided_by: str | None
    note: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs, and for whoever is told of it."""
        return {name: getattr(self, name) for name in self.__slots__}


class HeldCalls:
    """The queue.

    Args:
        path: The file; it is made, readable by its owner alone, where there is none.
        clock: Seconds since 1970.
        redactor: Replaces secrets before anything is written.
        poll_s: Seconds between two looks at a row that somebody waits for.

    Raises:
        SettingsError: It cannot be written, or is no queue.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        redactor: Redactor | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        self._redactor = redactor or Redactor()
        self._poll_s = poll_s
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, _PRIVATE))
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise SettingsError(
                f"{self.path}: no queue of held calls can be kept in it ({error})",
                hint="name another file with --queue",
            ) from error

    async def put(self, asked: Asked, *, wait_s: float) -> HeldCall:
        """Let a call wait for so long. One whose caller goes away while it is stored is abandoned.

        Raises:
            InvalidRequest: It is too large to be shown to anybody.
            Unavailable: It cannot be stored.
        """
        stored = asyncio.ensure_future(asyncio.to_thread(self._put, asked, wait_s))
        try:
            return await asyncio.shield(stored)
        except asyncio.CancelledError:
            await asyncio.wait({stored})  # the thread writes its row all the same
            if stored.exception() is None:
                self.settle(stored.result().id, "abandoned")
            raise

    async def wait(self, call: HeldCall) -> HeldCall:
        """The call once it waits no longer: approved, denied or expired. A caller that goes away abandons it.

        Raises:
            Unavailable: The queue cannot be read any more.
        """
        try:
            while True:
                found = await asyncio.to_thread(self._look, call.id)
                if found.status != "waiting":
                    return found
                await asyncio.sleep(self._poll_s)
        except asyncio.CancelledError:
            self.settle(call.id, "abandoned")  # no thread: this task is not to wait for anything any more
            raise

    def settle(self, call_id: str, status: Status, *, by: str | None = None, note: str | None = None) -> bool:
        """Decide about a call that waits; False where it waits no longer, and nothing was changed.

        Raises:
            Unavailable: It cannot be stored.
        """
        with self._working() as db:
            now = self._clock()
            late = "" if status in ("expired", "abandoned") else " AND expires > :now"
            changed = db.execute(
                "UPDATE calls SET status = :status, decided = :now, decided_by = :by, note = :note, arguments = NULL "
                f"WHERE id = :id AND status = 'waiting'{late}",
                {"status": status, "now": now, "by": by, "note": note, "id": call_id},
            ).rowcount
        return changed == 1

    def find(self, start: str) -> HeldCall:
        """The call whose id begins so.

        Raises:
            InvalidRequest: There is none, or more than one.
            Unavailable: The queue cannot be read.
        """
        with self._working() as db:
            wanted = f"SELECT {_COLUMNS} FROM calls WHERE substr(id, 1, ?) = ? LIMIT 2"
            rows = db.execute(wanted, (len(start), start)).fetchall()
        if len(rows) != 1 or not start:
            found = "no call" if not rows else "more than one call"
            raise InvalidRequest(f"{found} has an id that begins with {start!r}", hint="see hhh-router queue list")
        return self._current(_call(rows[0]))

    def calls(self, *, everything: bool = False) -> list[HeldCall]:
        """Those that wait, oldest first; or all there ever were.

        Raises:
            Unavailable: The queue cannot be read.
        """
        with self._working() as db:
            rows = db.execute(f"SELECT {_COLUMNS} FROM calls ORDER BY created, id").fetchall()
        found = [self._current(_call(row)) for row in rows]
        return [c for c in found if everything or c.status == "waiting"]

    def _put(self, asked: Asked, wait_s: float) -> HeldCall:
        arguments = json.dumps(self._redactor.value(asked.arguments), ensure_ascii=False)
        if len(arguments.encode("utf-8", "surrogatepass")) > MAX_ARGUMENT_BYTES:
            raise InvalidRequest(
                f"arguments of {len(arguments):,} characters cannot be shown to whoever decides",
                hint=f"send less than {MAX_ARGUMENT_BYTES:,} bytes to a tool whose calls are held",
            )
        now = self._clock()
        call = HeldCall(
            id=uuid4().hex[:_DIGITS],
            door=asked.door,
            request_id=asked.request_id,
            session=asked.session,
            tool=self._redactor.text(asked.tool),
            arguments=json.loads(arguments),
            policy=asked.policy,
            rule=asked.rule,
            reason=self._redactor.text(asked.reason),
            created=now,
            expires=now + wait_s,
            status="waiting",
            decided=None,
            decided_by=None,
            note=None,
        )
        row = {**call.as_json(), "arguments": json.dumps(call.arguments)}  # ASCII, whatever half a character is in it
        with self._working() as db:
            db.execute(f"INSERT INTO calls ({_COLUMNS}) VALUES (:{_COLUMNS.replace(', ', ', :')})", row)
        return call

    def _look(self, call_id: str) -> HeldCall:
        with self._working() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM calls WHERE id = ?", (call_id,)).fetchone()
        if row is None:
            raise Unavailable(f"call {call_id} is not in the queue any more", hint=f"was {self.path} replaced?")
        call = _call(row)
        if call.status == "waiting" and call.expires <= self._clock():
            self.settle(call_id, "expired")
            return self._look(call_id)  # expired, unless somebody was quicker
        return call

    def _current(self, call: HeldCall) -> HeldCall:
        """As it stands: whoever waited for it may have died before its time was over."""
        if call.status == "waiting" and call.expires <= self._clock():
            self.settle(call.id, "expired")
            return self._look(call.id)
        return call

    def _prepare(self) -> None:
        """Make the table. Changing the journal's mode may not wait for others as statements do: it is tried again."""
        until = time.monotonic() + _BUSY_S
        while True:
            try:
                with self._opened() as db:
                    db.execute("PRAGMA journal_mode=WAL")
                    db.executescript(_SCHEMA)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(_PAUSE_S)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as db:
            yield db

    @contextmanager
    def _working(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._opened() as db:
                yield db
        except sqlite3.Error as error:
            raise Unavailable(f"the queue of held calls cannot be used: {error}", hint=f"check {self.path}") from error


def _call(row: tuple[Any, ...]) -> HeldCall:
    named: Mapping[str, Any] = dict(zip(_COLUMNS.split(", "), row, strict=True))
    arguments = None if named["arguments"] is None else json.loads(named["arguments"])
    return HeldCall(**{**named, "arguments": arguments})
