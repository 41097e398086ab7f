"""A replay as a page to look through."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hhh_router.evaluation.blocks import Cell, Change, Line, Section, Table
from hhh_router.evaluation.page import html_document
from hhh_router.evaluation.replay import Judged, Pair, Replay

FOLD = 200
"""Rows that are opened together."""
MOST_SHOWN = 50_000
"""Of one kind of flip; the figures count all."""
MOST_CHARACTERS = 2_000
"""Of one text."""
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_KINDS = ("newly passed", "newly stopped", "other action", "unknown")


def replay_html(found: Replay) -> str:
    """One page: both errors with paired intervals, then every flip with its prompt, actions and rules.

    It needs no script: rows are folded, and a browser lays out those that are opened. The page holds the prompts, where
    the traffic has them. It belongs to whoever may read the traffic.
    """
    figures = found.figures
    told = [
        ("before", f"{found.before.name}@{found.before.version} ({found.before.hash[:16]})"),
        ("after", f"{found.after.name}@{found.after.version} ({found.after.hash[:16]})"),
        ("read by", str(figures["bundle"])),
        ("requests", f"{figures['n']} ({figures['data_sha256'][:16]})"),
        ("flips", ", ".join(f"{n} {kind}" for kind, n in figures["flips"].items())),
        *_recorded(figures),
        *[("gate", line) for line in found.failed],
    ]
    sections = [Section(title="Errors", lead=_LEAD, blocks=(_errors(found),))]
    for kind in _KINDS:
        pairs = [p for p in found.pairs if p.flip == kind]
        if pairs:
            lead = f"{len(pairs):,} requests" + (
                f", the first {MOST_SHOWN:,} of them" if len(pairs) > MOST_SHOWN else ""
            )
            blocks = (_flips(pairs[:MOST_SHOWN], found),)
            sections.append(Section(title=kind.capitalize(), lead=lead, blocks=blocks))
    if lines := _why(found):
        sections.append(Section(title="What is not known", lead=_UNKNOWN, blocks=(lines,)))
    answered = [p for p in found.pairs if p.answers is not None]
    if answered:
        lead = (
            "The requests whose weights differ most, answered under both policies with the same seed. What the other "
            "answer does not have is marked."
        )
        sections.append(Section(title="Answers", lead=lead, blocks=(_answers(answered, found),)))
    return html_document(f"{found.before.name} → {found.after.name}", told, sections)


_LEAD = (
    "Shares of labelled requests, and how they differ between the policies. The interval is that of the difference, "
    "with requests drawn as pairs. What is not known under one of both is left out; a gate takes it at its worst."
)
_UNKNOWN = "What a decision hangs on and no record keeps, or nobody measured. None of it is guessed."


def differing_words(one: str, other: str) -> tuple[tuple[tuple[Change, str], ...], tuple[tuple[Change, str], ...]]:
    """Two texts in pieces: what both have, what only the first has, what only the second has.

    >>> differing_words("a good day", "a bad day")
    ((('same', 'a '), ('gone', 'good'), ('same', ' day')), (('same', 'a '), ('new', 'bad'), ('same', ' day')))
    """
    a, b = _WORDS.findall(one), _WORDS.findall(other)
    left: list[tuple[Change, str]] = []
    right: list[tuple[Change, str]] = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if a1 > a0:
            left.append(("same" if kind == "equal" else "gone", "".join(a[a0:a1])))
        if b1 > b0:
            right.append(("same" if kind == "equal" else "new", "".join(b[b0:b1])))
    return tuple(left), tuple(right)


def _recorded(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = [("left out", f"{n}: {why}") for why, n in figures.get("left_out", {}).items()]
    if (recorded := figures.get("recorded")) is not None and recorded["n"]:
        said = (
            f"of {recorded['n']} that the first policy decided, {recorded['same']} come out as they were, "
            f"{recorded['unknown']} are not known, {len(recorded['differences'])} come out otherwise"
        )
        told.append(("as recorded", said))
    return told


def _errors(found: Replay) -> Table:
    lines = []
    for side, e in found.figures["errors"].items():
        interval = e["difference_interval"]
        span = f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
        cells = (
            Cell(text=side.replace("_", " ")), Cell(text=str(e["n"])), Cell(text=str(e["unknown"])),
            Cell(text=f"{e['before']:.3f}"), Cell(text=f"{e['after']:.3f}"),
            Cell(text=f"{e['difference']:+.3f}", span=span),
        )  # fmt: skip
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("error", "requests", "unknown", "before", "after", "difference"), 1, lines, found)


def _flips(pairs: Sequence[Pair], found: Replay) -> Table:
    lines = []
    for p in pairs:
        label = {1.0: "harmful", 0.0: "benign"}.get(p.example.needs.get("harmless", -1.0), "not labelled")
        cells = (_asked(p), Cell(text=label), _said(p.before), _said(p.after), Cell(text=str(p.row)))
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("request", "label", "before", "after", "row"), 4, lines, found)


def _said(judged: Judged) -> Cell:
    if judged.decision is None:
        return Cell(text="unknown", span="; ".join(judged.unknown))
    d = judged.decision
    return Cell(text=str(d.action), span=f"{d.rule}: {d.reason}")


def _why(found: Replay) -> Table | None:
    """What is not known, and of how many requests."""
    counts = Counter(line for p in found.pairs for line in {*p.before.unknown, *p.after.unknown})
    lines = [
        Line(group="", note="", badge="", strong=False, cells=(Cell(text=why), Cell(text=f"{n:,}")))
        for why, n in counts.most_common()
    ]
    return _table(("unknown", "requests"), 1, lines, found) if lines else None


def _answers(pairs: Sequence[Pair], found: Replay) -> Table:
    lines = []
    for p in pairs:
        assert p.answers is not None
        one, other = differing_words(*map(_cut, p.answers))
        cells = (
            _asked(p), Cell(text="(empty)", parts=one, span=_mixture(p.before)),
            Cell(text="(empty)", parts=other, span=_mixture(p.after)), Cell(text=f"{p.shift_nats:.3f}"),
        )  # fmt: skip
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("request", "before", "after", "nats apart"), 3, lines, found)


def _mixture(judged: Judged) -> str:
    return judged.weights.mixture if judged.weights is not None else ""


def _asked(pair: Pair) -> Cell:
    """The prompt where it was kept, else which request it is."""
    text = "\n".join(m.content for m in pair.example.messages)
    return Cell(text=_cut(text), span=pair.request_id) if text else Cell(text=pair.request_id)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text):,} characters)"


def _table(head: tuple[str, ...], labels: int, lines: Sequence[Line], found: Replay) -> Table:
    made_by = ((str(found.figures["command"]), int(found.figures["seed"])),)
    return Table(group_title="", head=head, labels=labels, lines=tuple(lines), made_by=made_by, sizes="", fold=FOLD)
