"""An audit in one SQLite file (WAL, ``synchronous=FULL``), which one process writes at a time."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hhh_router.errors import SettingsError
from hhh_router.trace.audit.chain import GENESIS, Anchor, Row
from hhh_router.trace.audit.writer import ROW_BYTES, ChainedAudit, NotStored, Old, Retention
from hhh_router.trace.redact import Redactor

_PRIVATE = 0o600
_COLUMNS = "seq, time, kind, request_id, record, hash"
# a row goes only once an anchor covers it, and an anchor is a row of the chain
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    request_id TEXT NOT NULL,
    record TEXT NOT NULL,
    hash TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS rows_by_request ON rows (request_id, kind);
CREATE TABLE IF NOT EXISTS anchors (seq INTEGER PRIMARY KEY, hash TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS rows_stay BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'rows of the audit stay'); END;
DROP TRIGGER IF EXISTS rows_are_kept;
CREATE TRIGGER rows_are_kept BEFORE DELETE ON rows
    WHEN OLD.seq > (SELECT coalesce(max(seq), 0) FROM anchors) BEGIN SELECT RAISE(ABORT, 'rows are kept'); END;
CREATE TRIGGER IF NOT EXISTS anchors_are_rows BEFORE INSERT ON anchors
    WHEN NOT EXISTS (SELECT 1 FROM rows WHERE seq = NEW.seq AND hash = NEW.hash)
    BEGIN SELECT RAISE(ABORT, 'an anchor is a row'); END;
CREATE TRIGGER IF NOT EXISTS anchors_stay BEFORE UPDATE ON anchors BEGIN SELECT RAISE(ABORT, 'anchors stay'); END;
CREATE TRIGGER IF NOT EXISTS anchors_are_kept BEFORE DELETE ON anchors BEGIN SELECT RAISE(ABORT, 'anchors stay'); END;
COMMIT;
"""
_OPEN = """
SELECT request_id FROM rows WHERE kind = 'intent' AND NOT EXISTS
    (SELECT 1 FROM rows AS later WHERE later.request_id = rows.request_id AND later.kind IN ('outcome', 'interrupted'))
ORDER BY seq
"""


class SqliteAudit(ChainedAudit):
    """`Audit` in one SQLite file.

    Args:
        path: The file; it is made, readable by its owner alone, where there is none.
        clock: Seconds since 1970.
        redactor: Replaces secrets before anything is written.
        retention: What is removed.

    Raises:
        SettingsError: It cannot be written, is in use, or is no audit.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        redactor: Redactor | None = None,
        retention: Retention | None = None,
    ) -> None:
        self.path = Path(path)
        super().__init__(SqliteStore(self.path), clock=clock, redactor=redactor, retention=retention)


class SqliteStore:
    """`Store` in one SQLite file; a lock beside it keeps a second writer out.

    Raises:
        SettingsError: It cannot be written, is in use, or is no audit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock", thread_local=False)  # any thread may close
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, _PRIVATE))
        except Timeout as error:
            raise SettingsError(
                f"{path}: another process writes this audit", hint="name another file with --audit"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"{path}: the audit cannot be written ({error.strerror})",
                hint="name a file in a folder that this user may write to with --audit, or --audit none",
            ) from error
        try:
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            # secure_delete: what was removed is not to be found in the file either
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
                self.db.execute(f"PRAGMA {pragma}")
            self.db.executescript(_SCHEMA)
            self._inode = path.stat().st_ino
        except (sqlite3.Error, OSError) as error:
            self._lock.release()
            raise SettingsError(
                f"{path}: no audit can be kept in it ({error})", hint="name another file with --audit"
            ) from error

    @property
    def name(self) -> str:
        """See `Store`."""
        return str(self.path)

    def head(self) -> tuple[int, str]:
        """See `Store`."""
        with _told():
            found = self.db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
        return found or (0, GENESIS)

    def open_intents(self) -> list[str]:
        """See `Store`."""
        with _told():
            return [request_id for (request_id,) in self.db.execute(_OPEN)]

    def append(self, rows: Sequence[Row]) -> None:
        """See `Store`."""
        with self._transaction():
            self._insert(rows)

    def size(self) -> int:
        """See `Store`."""
        with _told():
            summed = self.db.execute("SELECT coalesce(sum(length(record) + ?), 0) FROM rows", (ROW_BYTES,))
            return int(summed.fetchone()[0])

    def oldest(self, most: int) -> list[Old]:
        """See `Store`."""
        asked = "SELECT seq, time, kind, hash, length(record) + ? FROM rows ORDER BY seq LIMIT ?"
        with _told():
            return [Old(*found) for found in self.db.execute(asked, (ROW_BYTES, most))]

    def prune(self, anchor: Anchor, told: Row) -> None:
        """See `Store`."""
        with self._transaction():
            self._insert([told])
            self.db.execute("INSERT INTO anchors VALUES (?, ?)", (anchor.seq, anchor.hash))
            self.db.execute("DELETE FROM rows WHERE seq <= ?", (anchor.seq,))

    def compact(self) -> None:
        """See `Store`."""
        with _told():
            self.db.execute("VACUUM")
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """See `Store`."""
        self.db.close()
        self._lock.release()

    def _insert(self, rows: Sequence[Row]) -> None:
        self.db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)",
            [(r.seq, r.time, r.kind, r.request_id, r.record, r.hash) for r in rows],
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _told():
            if self.path.stat().st_ino != self._inode:  # SQLite would go on writing to a file that nobody will find
                raise OSError("the file was replaced")
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except sqlite3.Error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise NotStored(str(error)) from error


class SqliteReading:
    """One look at an audit that another process may go on writing.

    Raises:
        SettingsError: There is no such audit.
    """

    def __init__(self, path: Path) -> None:
        db: sqlite3.Connection | None = None
        try:
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
            db.execute("BEGIN")  # anchor and rows as they are at one moment
            db.execute("SELECT 1 FROM rows LIMIT 1")
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            raise SettingsError(f"{path}: no audit can be read ({error})", hint="name it with --audit") from error
        self._db = db

    def anchor(self) -> Anchor | None:
        """Where the chain begins; None where nothing was removed."""
        has = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'anchors'").fetchone()  # older audits
        found = has and self._db.execute("SELECT seq, hash FROM anchors ORDER BY seq DESC LIMIT 1").fetchone()
        return Anchor(seq=found[0], hash=found[1]) if found else None

    def rows(self, *, last: int | None = None) -> Iterator[Row]:
        """The rows in order, or only the last ones."""
        asked = f"SELECT {_COLUMNS} FROM rows ORDER BY seq"
        if last is not None:
            asked = f"SELECT * FROM (SELECT {_COLUMNS} FROM rows ORDER BY seq DESC LIMIT {int(last)}) ORDER BY seq"
        with closing(self._db.execute(asked)) as found:
            for seq, at, kind, request_id, record, hashed in found:
                yield Row(seq=seq, time=at, kind=kind, request_id=request_id, record=record, hash=hashed)

    def close(self) -> None:
        """End it."""
        self._db.close()
