"""Results for people: a chart of how each figure stands to its target, and a table.

``python -m benchmarks.present [FILE]`` draws both anew from figures that are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Record
from benchmarks.run import RESULTS
from hhh_router.evaluation.svg import HAIR, INK, MUTED, PALETTE

_MET, _MISSED = PALETTE[2], PALETTE[1]  # told apart by the colour-blind; a missed bar is hatched as well
_ROW_INCHES = 0.42


def present(records: Sequence[Record], results: Path, *, chart: bool = True) -> None:
    """Write ``NAME.md`` beside ``NAME.json``, and ``NAME.svg`` where there is anything to draw."""
    results.with_suffix(".md").write_text(table(records), encoding="utf-8")
    if chart and any(_drawn(r) for r in records):
        draw(records, results.with_suffix(".svg"))


def table(records: Sequence[Record]) -> str:
    """A Markdown table of all figures.

    >>> print(table([{"title": "A", "value": 0.0123, "low": 0.01, "high": 0.02, "unit": "share", "target": 0.03,
    ...               "at": "most", "meets": True, "n": 5, "sides": {}, "note": "", "command": "c"}]))
    | figure | value | middle half | target | met | rounds |
    | --- | --- | --- | --- | --- | --- |
    | A | 1.2 % | 1.0 % to 2.0 % | at most 3.0 % | yes | 5 |
    <BLANKLINE>
    """
    lines = ["| figure | value | middle half | target | met | rounds |", "| --- | --- | --- | --- | --- | --- |"]
    notes = []
    for r in records:
        met = {True: "yes", False: "**no**", None: ""}[r["meets"]]
        if r["value"] is None:
            lines.append(f"| {r['title']} | {r['note']} | | {_target(r)} | | |")
            continue
        spread = f"{shown(r['low'], r['unit'])} to {shown(r['high'], r['unit'])}"
        lines.append(f"| {r['title']} | {shown(r['value'], r['unit'])} | {spread} | {_target(r)} | {met} | {r['n']} |")
        details = [f"{name} {_plain(value)}" for name, value in r["sides"].items()]
        details += [r["note"]] if r["note"] else []
        if details:
            notes.append(f"- {r['title']}: {'; '.join(details)}.")
    return "\n".join([*lines, "", *notes, ""] if notes else [*lines, ""])


def shown(value: float, unit: str) -> str:
    """A value with its unit.

    >>> shown(0.0123, "share"), shown(2.5, "x"), shown(1234.5, "tokens/s"), shown(1.234, "ms")
    ('1.2 %', '2.50 x', '1234 tokens/s', '1.23 ms')
    """
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "x" or value < 100:
        return f"{value:.2f} {unit}"
    return f"{value:.0f} {unit}"


def _plain(value: float) -> str:
    """Four digits, never in powers of ten.

    >>> _plain(12345678.0), _plain(0.01234)
    ('12,345,678', '0.01234')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _target(r: Record) -> str:
    return "" if r["target"] is None else f"at {r['at']} {shown(r['target'], r['unit'])}"


def _drawn(r: Record) -> bool:
    return r["value"] is not None and r["target"] is not None


def draw(records: Sequence[Record], path: Path) -> None:
    """Horizontal bars of value over target: floors first (right of the line is good), then ceilings (left is good).

    Raises:
        ImportError: matplotlib is not installed (extra ``train``).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    floors = [r for r in records if _drawn(r) and r["at"] == "least"]
    ceilings = [r for r in records if _drawn(r) and r["at"] == "most"]
    groups = [(g, t) for g, t in ((floors, "at least 1 is wanted"), (ceilings, "at most 1 is wanted")) if g]
    look: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "hhh-router", "font.size": 9, "text.color": INK}
    with rc_context(look):
        heights = [len(g) for g, _ in groups]
        figure = Figure(figsize=(7.5, 0.9 * len(groups) + _ROW_INCHES * sum(heights)), layout="constrained")
        figure.patch.set_facecolor("white")
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (group, wanted) in zip(panels, groups, strict=True):
            _bars(axes, group, wanted)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _bars(axes: object, group: Sequence[Record], wanted: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for y, r in enumerate(group):
        met = bool(r["meets"])
        middle, low, high = (r[key] / r["target"] for key in ("value", "low", "high"))
        axes.barh(
            y + 0.18, middle, height=0.36, color=_MET if met else _MISSED, hatch="" if met else "///", edgecolor="white"
        )
        axes.hlines(y + 0.18, low, high, color=INK, linewidth=1.2)
        text = f"{r['title']}: {shown(r['value'], r['unit'])} ({_target(r)}{'' if met else ', missed'})"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # the line must not cross the words
        axes.text(0, y - 0.06, text, transform=axes.get_yaxis_transform(), va="bottom", bbox=paper)
    longest = 1.05 * max(1.0, *(max(r["value"], r["high"]) / r["target"] for r in group))
    axes.axvline(1, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)))
    axes.set(ylim=(len(group) - 0.5, -0.5), yticks=[], xlim=(0, longest), xlabel=f"value over target; {wanted}")
    axes.grid(axis="x", color=HAIR)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw from a results file."""
    given = sys.argv[1:] if argv is None else argv
    path = Path(given[0]) if given else RESULTS / "engine.json"
    present(json.loads(path.read_text(encoding="utf-8")), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
