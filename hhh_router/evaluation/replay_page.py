"""A replay as a page to look through."""

from __future__ import annotations

from collections.abc import Sequence

from hhh_router.evaluation.blocks import Cell, Line, Section, Table
from hhh_router.evaluation.page import html_document
from hhh_router.evaluation.replay import Pair, Replay

_SHOWN = 500  # flips on the page; the figures count all


def replay_html(found: Replay) -> str:
    """One page: both errors with paired intervals, then every flip with its prompt, actions and rules.

    The page holds the prompts. It belongs to whoever may read the traffic.
    """
    figures = found.figures
    told = [
        ("before", f"{found.before.name}@{found.before.version} ({found.before.hash[:16]})"),
        ("after", f"{found.after.name}@{found.after.version} ({found.after.hash[:16]})"),
        ("read by", str(figures["bundle"])),
        ("requests", f"{figures['n']} ({figures['data_sha256'][:16]})"),
        ("flips", ", ".join(f"{n} {kind}" for kind, n in figures["flips"].items())),
        *[("gate", line) for line in found.failed],
    ]
    sections = [Section(title="Errors", lead=_LEAD, blocks=(_errors(found),))]
    for kind in ("newly passed", "newly stopped", "other action"):
        pairs = [p for p in found.pairs if p.flip == kind]
        if pairs:
            lead = f"{len(pairs)} requests" + (f", the first {_SHOWN} of them" if len(pairs) > _SHOWN else "")
            blocks = (_flips(pairs[:_SHOWN], found),)
            sections.append(Section(title=kind.capitalize(), lead=lead, blocks=blocks))
    answered = [p for p in found.pairs if p.answers is not None]
    if answered:
        lead = "The requests whose weights differ most, answered under both policies with the same seed."
        sections.append(Section(title="Answers", lead=lead, blocks=(_answers(answered, found),)))
    return html_document(f"{found.before.name} → {found.after.name}", told, sections)


_LEAD = (
    "Shares of labelled requests, and how they differ between the policies. The interval is that of the difference, "
    "with requests drawn as pairs."
)


def _errors(found: Replay) -> Table:
    lines = []
    for side, e in found.figures["errors"].items():
        interval = e["difference_interval"]
        span = f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
        cells = (
            Cell(text=side.replace("_", " ")), Cell(text=str(e["n"])), Cell(text=f"{e['before']:.3f}"),
            Cell(text=f"{e['after']:.3f}"), Cell(text=f"{e['difference']:+.3f}", span=span),
        )  # fmt: skip
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("error", "requests", "before", "after", "difference"), 1, lines, found)


def _flips(pairs: Sequence[Pair], found: Replay) -> Table:
    lines = []
    for p in pairs:
        one, other = p.before.decision, p.after.decision
        label = {1.0: "harmful", 0.0: "benign"}.get(p.example.needs.get("harmless", -1.0), "not labelled")
        cells = (
            Cell(text=_prompt(p)), Cell(text=label), Cell(text=str(one.action), span=f"{one.rule}: {one.reason}"),
            Cell(text=str(other.action), span=f"{other.rule}: {other.reason}"), Cell(text=str(p.row)),
        )  # fmt: skip
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("request", "label", "before", "after", "row"), 4, lines, found)


def _answers(pairs: Sequence[Pair], found: Replay) -> Table:
    lines = []
    for p in pairs:
        assert p.answers is not None
        cells = (
            Cell(text=_prompt(p)), Cell(text=p.answers[0], span=p.before.weights.mixture),
            Cell(text=p.answers[1], span=p.after.weights.mixture), Cell(text=f"{p.shift_nats:.3f}"),
        )  # fmt: skip
        lines.append(Line(group="", note="", badge="", strong=False, cells=cells))
    return _table(("request", "before", "after", "nats apart"), 3, lines, found)


def _prompt(pair: Pair) -> str:
    return "\n".join(m.content for m in pair.example.messages)


def _table(head: tuple[str, ...], labels: int, lines: Sequence[Line], found: Replay) -> Table:
    made_by = ((str(found.figures["command"]), int(found.figures["seed"])),)
    return Table(group_title="", head=head, labels=labels, lines=tuple(lines), made_by=made_by, sizes="")
