"""Where an audit is: a SQLite file, or Postgres by its URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

import platformdirs

from hhh_router.errors import MissingExtra, SettingsError
from hhh_router.trace.audit.chain import Anchor, Row, Verified, follow
from hhh_router.trace.audit.sqlite import SqliteAudit, SqliteReading
from hhh_router.trace.audit.writer import Audit, ChainedAudit, NoAudit, NotStored, Retention, not_kept
from hhh_router.trace.redact import Redactor

NONE = "none"
"""Names no audit at all."""
_SCHEMES = ("postgresql://", "postgres://")


class Reading(Protocol):
    """One look at an audit, as it is at one moment."""

    def anchor(self) -> Anchor | None:
        """Where the chain begins; None where nothing was removed."""
        ...

    def rows(self, *, last: int | None = None) -> Iterator[Row]:
        """The rows in order, or only the last ones."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def default_audit() -> Path:
    """Where the audit is kept when nobody says otherwise."""
    return Path(platformdirs.user_state_dir("hhh-router", appauthor=False)) / "audit.sqlite3"


def is_postgres(place: str | Path) -> bool:
    """Whether a place is a database's URL."""
    return isinstance(place, str) and place.startswith(_SCHEMES)


def check_place(place: str) -> None:
    """Refuse a URL that would put a password where others read it: on a command line, in a file of settings.

    Raises:
        SettingsError: It holds one, or it is a URL of something else.
    """
    if not is_postgres(place):
        if "://" in place:
            raise SettingsError(
                f"an audit cannot be kept at {place.split('://')[0]}://…",
                hint="name a file, or postgresql://host/database",
            )
        return
    parts = urlsplit(place)
    if parts.password or any(name == "password" for name, _ in parse_qsl(parts.query)):
        raise SettingsError(
            "the audit's URL holds a password",
            hint="put the whole URL into HHH_ROUTER_AUDIT_URL, or a file of that name in the folder of secrets",
        )


def shown_place(place: str | Path) -> str:
    """A place as it may be shown: of a URL the host and the database alone.

    >>> shown_place("postgresql://me:secret@db.example:5433/hhh?sslmode=require&password=x")
    'postgresql://db.example:5433/hhh'
    """
    if not is_postgres(place):
        return str(place)
    parts = urlsplit(str(place))
    return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_audit(place: str | Path, *, redactor: Redactor | None = None, retention: Retention | None = None) -> Audit:
    """The audit at a place, or one that keeps nothing at ``none``.

    Raises:
        SettingsError: It cannot be written, is in use, or is no audit.
        MissingExtra: It is in Postgres, and the driver is not installed.
    """
    return NoAudit() if place == NONE else open_writer(place, redactor=redactor, retention=retention)


def open_writer(
    place: str | Path, *, redactor: Redactor | None = None, retention: Retention | None = None
) -> ChainedAudit:
    """The same, for a place that keeps something."""
    if not is_postgres(place):
        return SqliteAudit(place, redactor=redactor, retention=retention)
    try:
        from hhh_router.trace.audit.postgres import PostgresAudit
    except ImportError as error:
        raise MissingExtra("postgres", needed_for="an audit in Postgres") from error
    return PostgresAudit(str(place), redactor=redactor, retention=retention)


def prune_audit(place: str | Path, kept: Retention) -> int:
    """Remove what was kept long enough, while no other process writes the audit; returns how many rows went.

    Raises:
        SettingsError: It cannot be written, or is in use.
        Unavailable: It could not be done.
    """
    audit = open_writer(place)
    removed = 0
    try:
        while count := audit.prune_some(kept):
            removed += count
        if removed:
            audit.store.compact()
    except NotStored as error:
        raise not_kept(str(error)) from error
    finally:
        audit.close()
    return removed


def open_reading(place: str | Path) -> Reading:
    """One look at an audit, which a process may go on writing.

    Raises:
        SettingsError: There is no such audit.
        MissingExtra: It is in Postgres, and the driver is not installed.
    """
    if not is_postgres(place):
        return SqliteReading(Path(place))
    try:
        from hhh_router.trace.audit.postgres import PostgresReading
    except ImportError as error:
        raise MissingExtra("postgres", needed_for="an audit in Postgres") from error
    return PostgresReading(str(place))


def read_rows(place: str | Path, *, last: int | None = None) -> Iterator[Row]:
    """The rows of an audit in order, or only the last ones. A process may go on writing it.

    Raises:
        SettingsError: There is no such audit.
    """
    with closing(open_reading(place)) as reading:
        yield from reading.rows(last=last)


def verify(place: str | Path, *, contains: str | None = None) -> Verified:
    """Follow the chain from its start.

    Args:
        place: The audit.
        contains: A head kept from an earlier time, which has to be in it; see `chain.follow`.

    Raises:
        SettingsError: There is no such audit.
    """
    with closing(open_reading(place)) as reading:
        return follow(reading.rows(), anchor=reading.anchor(), contains=contains)
