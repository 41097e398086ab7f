"""Rows of an audit, the hashes that tie each to all before it, and what verifying finds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["intent", "outcome", "verdict", "interrupted", "pruned"]
"""``intent``: about to answer; ``outcome``: how it ended; ``verdict``: read afterwards; ``interrupted``: by a crash;
``pruned``: rows were removed because they had been kept long enough."""

GENESIS = "0" * 64


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
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind,
            "request_id": self.request_id,
            "record": json.loads(self.record),
            "hash": self.hash,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """Where a chain begins whose older rows were removed: the last of them."""

    seq: int
    hash: str

    def record(self) -> dict[str, Any]:
        """What the row ``pruned`` says of it, so that the chain itself vouches for the anchor."""
        return {"through": self.seq, "hash": self.hash}


def row_hash(before: str, *, seq: int, time: float, kind: str, request_id: str, record: str) -> str:
    """What ties a row to all before it."""
    told = json.dumps([before, seq, time, kind, request_id, record], separators=(",", ":"))
    return hashlib.sha256(told.encode("ascii")).hexdigest()


def chained(last: tuple[int, str], events: Iterable[tuple[str, str, str, float]]) -> list[Row]:
    """Events as rows that follow the last one.

    Args:
        last: Number and hash of the row before; ``(0, GENESIS)`` at the start.
        events: Kind, request, record and time of each.
    """
    seq, before = last
    rows = []
    for kind, request_id, record, at in events:
        seq += 1
        before = row_hash(before, seq=seq, time=at, kind=kind, request_id=request_id, record=record)
        rows.append(Row(seq=seq, time=at, kind=kind, request_id=request_id, record=record, hash=before))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found in an audit."""

    rows: int
    first: int | None
    """Number of the oldest row that is left; None where there is none."""
    since: float | None
    """Its time: from then on the audit tells everything."""
    removed: int
    """Older rows that were removed because they had been kept long enough."""
    head: str
    """Hash of the last row: keep it elsewhere, and a later audit has to contain it."""
    broken_at: int | None
    """The first row that does not follow from the one before; None when all do."""
    reason: str | None
    unfinished: int
    """Intents without an outcome: under way, or a crash nobody has started again after."""
    interrupted: int


def follow(rows: Iterable[Row], *, anchor: Anchor | None = None, contains: str | None = None) -> Verified:
    """Follow a chain from its start.

    Args:
        rows: In order.
        anchor: Where it begins, when older rows were removed. A row ``pruned`` has to say the same.
        contains: A head kept from an earlier time, which has to be one of the hashes: an audit that was cut off after
            it, or written anew, lacks it.
    """
    seq, before = (anchor.seq, anchor.hash) if anchor else (0, GENESIS)
    broken: int | None = None
    reason: str | None = None
    seen = contains in (None, GENESIS, before)
    vouched = anchor is None
    first: Row | None = None
    open_intents: set[str] = set()
    count = interrupted = 0
    for row in rows:
        seq, count, first = seq + 1, count + 1, first or row
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
        elif row.kind == "pruned" and anchor is not None and not vouched:
            vouched = json.loads(row.record) == anchor.record()
    if broken is None and not vouched and anchor is not None:
        broken = anchor.seq + 1
        reason = f"rows up to {anchor.seq} are missing, and no later row says that it removed them"
    if broken is None and not seen:
        gone = ", or removed with what was kept long enough" if anchor else ""
        broken, reason = seq, f"the head {contains} is not in it: it was cut off, or written anew{gone}"
    return Verified(
        rows=count,
        first=first.seq if first else None,
        since=first.time if first else None,
        removed=anchor.seq if anchor else 0,
        head=before,
        broken_at=broken,
        reason=reason,
        unfinished=len(open_intents),
        interrupted=interrupted,
    )
