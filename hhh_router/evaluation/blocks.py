"""What a report is made of, before it is HTML or Markdown: sections with tables and charts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SIGNS = {"missed": "✗ missed", "met": "✓ met", "chosen": "✓ chosen"}
"""Badge → what is printed."""
Change = Literal["same", "gone", "new"]
HASH_HEADS = ("data", "sha256 of the rows")
"""Headings of the columns that hold hashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One field of a table."""

    text: str
    span: str = ""
    """The interval, or the error."""
    badge: str = ""
    """A key of `SIGNS`, or nothing."""
    parts: tuple[tuple[Change, str], ...] = ()
    """The text in pieces, beside another text: what both have, what is gone there, what is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of a table."""

    group: str
    """What several lines share; nothing in a table without groups."""
    note: str
    """More about the group."""
    badge: str
    """Of the group."""
    strong: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Figures in columns."""

    group_title: str
    head: tuple[str, ...]
    labels: int
    """How many of the first columns are words."""
    lines: tuple[Line, ...]
    made_by: tuple[tuple[str, int], ...]
    """Command and seed."""
    sizes: str
    fold: int = 0
    """Rows that are opened together; 0 shows all. A browser lays out what is opened and in sight, so that a page may
    hold tens of thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One or more drawings under one caption."""

    caption: str
    drawings: tuple[Callable[[], str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Panels that share a legend."""

    layout: str
    """A class of the style sheet: pairs, small or wide."""
    panels: tuple[Panel, ...]
    keys: tuple[tuple[int, str], ...] = ()
    """The legend: number of the series, and its name."""
    lines: bool = False
    """The series are lines, not markers."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A titled part of the report."""

    title: str
    lead: str = ""
    blocks: tuple[Table | Charts, ...] = ()
    sections: tuple[Section, ...] = ()
    points: tuple[tuple[str, str], ...] = ()
    """Term and what is said of it, as a list before the blocks."""
