"""Times of the week: ``mon-fri 09:00-17:00 Europe/Berlin``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_DAY = f"(?:{'|'.join(DAYS)})"
_HOURS = re.compile(
    rf"(?:({_DAY}(?:-{_DAY})?(?:,{_DAY}(?:-{_DAY})?)*) +)?"
    r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-4]):([0-5][0-9])"
    r"(?: +([A-Za-z][A-Za-z0-9_+/-]{0,60}))?"
)


@dataclass(frozen=True, slots=True)
class Hours:
    """Days and a time of day in a zone. A time that ends before it begins goes on into the next day."""

    days: frozenset[int]
    """0 is Monday; the day on which the time begins."""
    begins: int
    """Minutes after midnight."""
    ends: int
    zone: ZoneInfo

    def holds(self, at: datetime) -> bool:
        """Whether a moment lies in it. Begin included, end excluded."""
        local = at.astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        if self.begins < self.ends:
            return local.weekday() in self.days and self.begins <= minute < self.ends
        if minute >= self.begins:
            return local.weekday() in self.days
        return minute < self.ends and (local - timedelta(days=1)).weekday() in self.days


def parse_hours(text: str) -> Hours:
    """Read a time of the week; all days and UTC unless it says others.

    >>> parse_hours("fri 22:00-06:00").holds(datetime.fromisoformat("2026-11-28T05:59:00+00:00"))  # a Saturday
    True

    Raises:
        ValueError: It is none, or the zone is not known here.
    """
    match = _HOURS.fullmatch(text.strip())
    if match is None:
        raise ValueError("is no time of the week; write one like 'mon-fri 09:00-17:00 Europe/Berlin'")
    days, h1, m1, h2, m2, zone = match.groups()
    begins, ends = int(h1) * 60 + int(m1), int(h2) * 60 + int(m2)
    if ends > 24 * 60 or begins == ends:
        raise ValueError("ends when it begins or after midnight; the latest end is 24:00")
    try:
        where = ZoneInfo(zone or "UTC")
    except (LookupError, ValueError, OSError) as error:
        raise ValueError(f"has the time zone {zone!r}, which is not known here; use one like Europe/Berlin") from error
    return Hours(_days(days), begins, ends, where)


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(len(DAYS)))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {i % 7 for i in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)
