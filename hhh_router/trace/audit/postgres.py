"""An audit in Postgres, which one process writes at a time. Needs the extra ``postgres``."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict

from hhh_router.errors import SettingsError
from hhh_router.trace.audit.chain import GENESIS, Anchor, Row
from hhh_router.trace.audit.places import shown_place
from hhh_router.trace.audit.writer import ROW_BYTES, ChainedAudit, NotStored, Old, Retention
from hhh_router.trace.redact import Redactor, redact_text

_log = logging.getLogger(__name__)

CONNECT_S = 5
"""Longest wait for a connection."""
LOCKED_S = 3.0
"""How long a start waits for the audit: the server may not have noticed yet that the last process has died."""
HANGS_S = 10.0
"""A server that is silent for so long within a statement is given up."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
"""Between two tries to connect; doubled each time."""
_COLUMNS = "seq, time, kind, request_id, record, hash"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS hhh_audit (
    seq bigint PRIMARY KEY,
    time double precision NOT NULL,
    kind text NOT NULL,
    request_id text NOT NULL,
    record text NOT NULL,
    hash text NOT NULL
);
CREATE INDEX IF NOT EXISTS hhh_audit_by_request ON hhh_audit (request_id, kind);
CREATE TABLE IF NOT EXISTS hhh_audit_anchors (seq bigint PRIMARY KEY, hash text NOT NULL);
CREATE OR REPLACE FUNCTION hhh_audit_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'hhh_audit'
        AND OLD.seq <= (SELECT coalesce(max(seq), 0) FROM hhh_audit_anchors) THEN
        RETURN OLD;
    ELSIF TG_OP = 'INSERT' AND EXISTS (SELECT 1 FROM hhh_audit WHERE seq = NEW.seq AND hash = NEW.hash) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'rows of the audit stay';
END $$;
CREATE OR REPLACE TRIGGER hhh_audit_rows_stay BEFORE UPDATE OR DELETE ON hhh_audit
    FOR EACH ROW EXECUTE FUNCTION hhh_audit_stays();
CREATE OR REPLACE TRIGGER hhh_audit_is_kept BEFORE TRUNCATE ON hhh_audit
    FOR EACH STATEMENT EXECUTE FUNCTION hhh_audit_stays();
CREATE OR REPLACE TRIGGER hhh_audit_anchors_stay BEFORE INSERT OR UPDATE OR DELETE ON hhh_audit_anchors
    FOR EACH ROW EXECUTE FUNCTION hhh_audit_stays();
CREATE OR REPLACE TRIGGER hhh_audit_anchors_are_kept BEFORE TRUNCATE ON hhh_audit_anchors
    FOR EACH STATEMENT EXECUTE FUNCTION hhh_audit_stays();
"""
_OPEN = """
SELECT request_id FROM hhh_audit AS intent WHERE kind = 'intent' AND NOT EXISTS (
    SELECT 1 FROM hhh_audit AS later
    WHERE later.request_id = intent.request_id AND later.kind IN ('outcome', 'interrupted'))
ORDER BY seq
"""
# the session ends soon after its client has, and the lock with it: the server's own keepalive waits for two hours
_SESSION = """
SET synchronous_commit = on;
SET tcp_keepalives_idle = 15;
SET tcp_keepalives_interval = 5;
SET tcp_keepalives_count = 3;
SET tcp_user_timeout = '30s';
"""
_TAKE = "SELECT pg_try_advisory_lock(x'48484841'::int, 'hhh_audit'::regclass::oid::int)"  # HHHA, and the table's own id
_INSERT = f"INSERT INTO hhh_audit ({_COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s)"

_Connection = psycopg.Connection[tuple[object, ...]]


class PostgresAudit(ChainedAudit):
    """`Audit` in a Postgres database, in the tables ``hhh_audit`` and ``hhh_audit_anchors``, which are made.

    Args:
        url: ``postgresql://…`` as libpq takes it.
        clock: Seconds since 1970.
        redactor: Replaces secrets before anything is written.
        retention: What is removed.

    Raises:
        SettingsError: The database cannot be reached or written, or another process writes this audit.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], float] = time.time,
        redactor: Redactor | None = None,
        retention: Retention | None = None,
    ) -> None:
        super().__init__(PostgresStore(url), clock=clock, redactor=redactor, retention=retention)


class PostgresStore:
    """`Store` in a Postgres database. A lost connection is opened again, with growing pauses between the tries.

    An advisory lock of the session keeps a second writer out.

    Args:
        url: Where.
        hangs_s: A server that is silent for so long within a statement is given up.
        steady: Seconds that never jump.

    Raises:
        SettingsError: It cannot be reached or written, or another process writes this audit.
    """

    def __init__(self, url: str, *, hangs_s: float = HANGS_S, steady: Callable[[], float] = time.monotonic) -> None:
        self._at = _Place(url)
        self._hangs_s = hangs_s
        self._steady = steady
        self._pause_s = FIRST_PAUSE_S
        self._try_at = 0.0
        self._db: _Connection | None = None
        try:
            with self._at.told():
                self._db = self._opened(wait_s=LOCKED_S)
        except NotStored as error:
            raise SettingsError(
                f"{self.name}: no audit can be kept there ({error})", hint="correct the URL, or start the database"
            ) from error

    @property
    def name(self) -> str:
        """See `Store`."""
        return self._at.shown

    def head(self) -> tuple[int, str]:
        """See `Store`."""
        with self._using() as db:
            found = db.execute("SELECT seq, hash FROM hhh_audit ORDER BY seq DESC LIMIT 1").fetchone()
        return (int(str(found[0])), str(found[1])) if found else (0, GENESIS)

    def open_intents(self) -> list[str]:
        """See `Store`."""
        with self._using() as db:
            return [str(request_id) for (request_id,) in db.execute(_OPEN)]

    def append(self, rows: Sequence[Row]) -> None:
        """See `Store`. When the connection is lost over it, a new one is asked whether the rows are there."""
        self._surely(rows[-1], lambda db: _insert(db, rows))

    def size(self) -> int:
        """See `Store`."""
        with self._using() as db:
            found = db.execute("SELECT coalesce(sum(length(record) + %s), 0) FROM hhh_audit", (ROW_BYTES,)).fetchone()
        return int(str(found[0])) if found else 0

    def oldest(self, most: int) -> list[Old]:
        """See `Store`."""
        asked = "SELECT seq, time, kind, hash, length(record) + %s FROM hhh_audit ORDER BY seq LIMIT %s"
        with self._using() as db:
            return [Old(*found) for found in db.execute(asked, (ROW_BYTES, most))]  # type: ignore[arg-type]  # as asked

    def prune(self, anchor: Anchor, told: Row) -> None:
        """See `Store`."""

        def work(db: _Connection) -> None:
            _insert(db, [told])
            db.execute("INSERT INTO hhh_audit_anchors VALUES (%s, %s)", (anchor.seq, anchor.hash))
            db.execute("DELETE FROM hhh_audit WHERE seq <= %s", (anchor.seq,))

        self._surely(told, work)

    def compact(self) -> None:
        """See `Store`. Autovacuum does it."""

    def close(self) -> None:
        """See `Store`."""
        self._drop()

    def _surely(self, last: Row, work: Callable[[_Connection], None]) -> None:
        """Do something in one transaction. Whether a commit that was cut off came to pass is asked, not guessed."""
        try:
            with self._using() as db, db.transaction():
                work(db)
        except NotStored:
            if self._db is not None:
                raise  # the database said no
            with self._using() as db:
                found = db.execute("SELECT hash FROM hhh_audit WHERE seq = %s", (last.seq,)).fetchone()
                if found is None:
                    with db.transaction():
                        work(db)
                elif found[0] != last.hash:
                    raise NotStored("another process has written to it") from None

    @contextmanager
    def _using(self) -> Iterator[_Connection]:
        """The connection, which is opened again where it was lost. A server that says nothing is cut off."""
        with self._at.told():
            if self._db is None:
                self._db = self._reopened()
            db = self._db
            try:
                with _watched(db, self._hangs_s):
                    yield db
            finally:
                if db.closed:
                    self._drop()

    def _reopened(self) -> _Connection:
        if self._steady() < self._try_at:
            raise NotStored("the database cannot be reached; it is tried again in a moment")
        self._pause_s, pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S), self._pause_s
        try:
            db = self._opened()
        except (psycopg.Error, NotStored):
            self._try_at = self._steady() + pause_s
            raise
        self._pause_s = FIRST_PAUSE_S
        _log.warning("%s: connected again", self.name)
        return db

    def _opened(self, *, wait_s: float = 0.0) -> _Connection:
        db = self._at.connect()
        try:
            with _watched(db, self._hangs_s):
                db.execute(_SESSION)
                if not _has_tables(db):
                    db.execute(_SCHEMA)
                until = self._steady() + wait_s
                while not _said(db, _TAKE):
                    if self._steady() >= until:
                        raise NotStored("another process writes this audit")
                    time.sleep(0.1)
                if _said(db, "SHOW fsync") != "on":
                    _log.warning("%s: fsync is off there; rows may be lost when its machine fails", self.name)
        except BaseException:
            db.close()
            raise
        return db

    def _drop(self) -> None:
        if self._db is not None:
            with suppress(psycopg.Error, OSError):
                self._db.close()
            self._db = None


class PostgresReading:
    """One look at an audit that another process may go on writing.

    Raises:
        SettingsError: There is no such audit.
    """

    def __init__(self, url: str) -> None:
        at = _Place(url)
        db: _Connection | None = None
        try:
            with at.told():
                db = at.connect()
                db.autocommit = False
                db.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # anchor and rows of one moment
                db.read_only = True
                db.execute("SELECT 1 FROM hhh_audit LIMIT 1")
                self._db = db
        except NotStored as error:
            if db is not None:
                db.close()
            raise SettingsError(f"{at.shown}: no audit can be read ({error})", hint="name it with --audit") from error

    def anchor(self) -> Anchor | None:
        """Where the chain begins; None where nothing was removed."""
        found = self._db.execute("SELECT seq, hash FROM hhh_audit_anchors ORDER BY seq DESC LIMIT 1").fetchone()
        return Anchor(seq=int(str(found[0])), hash=str(found[1])) if found else None

    def rows(self, *, last: int | None = None) -> Iterator[Row]:
        """The rows in order, or only the last ones."""
        asked = f"SELECT {_COLUMNS} FROM hhh_audit ORDER BY seq"
        if last is not None:
            newest = f"SELECT {_COLUMNS} FROM hhh_audit ORDER BY seq DESC LIMIT {int(last)}"
            asked = f"SELECT * FROM ({newest}) AS newest ORDER BY seq"
        with self._db.cursor(name="rows") as cursor:  # on the server, which sends a few at a time
            found: Iterable[Any] = cursor.execute(asked)
            for seq, at, kind, request_id, record, hashed in found:
                yield Row(seq=seq, time=at, kind=kind, request_id=request_id, record=record, hash=hashed)

    def close(self) -> None:
        """End it."""
        self._db.close()


class _Place:
    """A URL: how it is connected to, and how it is spoken of without what it keeps secret."""

    def __init__(self, url: str) -> None:
        self.shown = shown_place(url)
        try:
            self._params = conninfo_to_dict(url)
        except psycopg.Error:  # its message repeats the URL
            raise SettingsError(
                f"{self.shown}: no URL that Postgres takes", hint="write postgresql://user@host:5432/database"
            ) from None

    def connect(self) -> _Connection:
        """A new connection.

        Raises:
            psycopg.Error: There is none.
        """
        given = {"connect_timeout": CONNECT_S, "application_name": "hhh-router audit", **self._params}
        return psycopg.connect(**given, autocommit=True)  # type: ignore[arg-type]  # as libpq names them

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever the driver raises, as `NotStored`, in words that hold no password."""
        try:
            yield
        except (psycopg.Error, OSError) as error:
            said = redact_text(" ".join(str(error).split())) or type(error).__name__
            if password := self._params.get("password"):
                said = said.replace(str(password), "…")
            raise NotStored(said) from None


def _insert(db: _Connection, rows: Sequence[Row]) -> None:
    with db.cursor() as cursor:
        cursor.executemany(_INSERT, [(r.seq, r.time, r.kind, r.request_id, r.record, r.hash) for r in rows])


def _has_tables(db: _Connection) -> bool:
    """Whether an earlier process has made the tables; then this one needs no right to make any."""
    return bool(_said(db, "SELECT to_regclass('hhh_audit_anchors') IS NOT NULL"))


def _said(db: _Connection, asked: LiteralString) -> object:
    """The one value that a query gives."""
    found = db.execute(asked).fetchone()
    return found[0] if found else None


@contextmanager
def _watched(db: _Connection, hangs_s: float) -> Iterator[None]:
    """A server that says nothing for so long is cut off."""
    watch = threading.Timer(hangs_s, _cut, [db])
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _cut(db: _Connection) -> None:
    """End a connection from another thread: whoever waits for the server sees it closed."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(db.fileno())) as wire:
        wire.shutdown(socket.SHUT_RDWR)
