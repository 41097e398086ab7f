"""The report's part about detection: targets missed, one table and its curves a suite, reliability of the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import SIGNS, Charts, Panel, Section, Table
from hhh_router.evaluation.svg import plain
from hhh_router.evaluation.tables import distinct, number, table_of

Row = Mapping[str, Any]


Target = tuple[str, str, bool]
"""What is aimed at, what is said where it is missed, and whether it is met."""


def glance(rows: Sequence[Row], bundle: str, others: Sequence[Target] = ()) -> Iterator[Section]:
    """How many targets the bundle meets, and which it misses; nothing where no target is set.

    Args:
        rows: Of detection.
        bundle: Whose targets they are.
        others: Targets of other parts.
    """
    judged = [row for row in rows if row["system"] == bundle and "meets" in row]
    targets: list[Target] = [(f"{_suite(row)}, {row['task']}", _miss(row), bool(row["meets"])) for row in judged]
    targets += others
    missed = [(name, said) for name, said, met in targets if not met]
    if targets:
        yield Section(
            title="At a glance",
            lead=f"{bundle} meets {len(targets) - len(missed)} of {len(targets)} targets"
            + ("; it misses these:" if missed else "."),
            points=tuple(missed),
        )


def _miss(row: Row) -> str:
    auroc, target = row.get("auroc"), row.get("target")
    # 0.8497 misses 0.85, and must not be printed as 0.850
    narrow = auroc is not None and target is not None and round(auroc, 3) == round(target, 3)
    told = [f"AUROC {number(auroc, 5 if narrow else 3)}"] if auroc is not None else []
    told += [f"{number(target, 2)} aimed at"] if target is not None else []
    return ", ".join([SIGNS["missed"], *told])


def detection_section(rows: Sequence[Row], bundle: str) -> Section:
    """Every suite's tasks, the bundle first among the systems."""
    systems = [bundle, *(name for name in distinct(row["system"] for row in rows) if name != bundle)]
    suites = [
        _suite_section(suite, [row for row in rows if _suite(row) == suite], bundle, systems)
        for suite in distinct(map(_suite, rows))
    ]
    return Section(
        title="Detection",
        lead="How well each system tells rows that need care from rows that do not, on rows it never saw. AUROC: 0.5 "
        "is a coin, 1 is perfect. ECE is the mean gap between stated probability and observed share (15 equal-mass "
        "bins), NLL and Brier judge the probabilities as a whole; lower is better for all three. Tasks that miss the "
        "AUROC aimed at stand first.",
        sections=tuple(suites),
    )


def _suite(row: Row) -> str:
    return plain(row["suite"]) if row.get("suite") else plain(row["task"]).split(" · ")[0]


def _suite_section(suite: str, rows: Sequence[Row], bundle: str, systems: Sequence[str]) -> Section:
    tasks: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["system"] != bundle):
        tasks.setdefault((row["task"], row.get("mode"), row.get("head")), []).append(row)
    missed_first = sorted(tasks.values(), key=lambda task: _verdict(task, bundle) != "missed")
    table = table_of(
        [_judged(row, bundle) for task in missed_first for row in task],
        {"system": "system"},
        hide=("suite", "task", "mode", "head"),
        group=("task", lambda row: (plain(row["task"]), _about(row))),
        verdict=lambda row: _verdict(tasks[row["task"], row.get("mode"), row.get("head")], bundle),
        strong=lambda row: row["system"] == bundle,
    )
    curves = tuple(_curves(task, systems) for task in missed_first if any(r.get("roc") or r.get("pr") for r in task))
    bins = tuple(
        Panel(
            caption=f"{plain(row['task'])}, n = {row['n']}",
            drawings=(
                partial(
                    charts.reliability,
                    row["reliability"],
                    alt=f"Reliability diagram of {bundle} on {row['task']}: {len(row['reliability'])} bins"
                    + (f", ECE {number(row['ece'], 3)}." if "ece" in row else "."),
                ),
            ),
        )
        for task in missed_first
        for row in task
        if row["system"] == bundle and row.get("reliability")
    )
    blocks: list[Table | Charts] = [table]
    if curves:
        drawn = {row["system"] for row in rows if row.get("roc") or row.get("pr")}
        keys = tuple((place, name) for place, name in enumerate(systems) if name in drawn)
        note = "ROC on the left, precision and recall on the right; dotted: what guessing gets."
        blocks.append(Charts(layout="pairs", panels=curves, keys=keys, lines=True, note=note))
    if bins:
        note = (
            f"Reliability of {bundle}: on the dotted line the stated probability is the observed share. Upright "
            "lines are the 95 % intervals that the bins' sizes leave (Wilson)."
        )
        blocks.append(Charts(layout="small", panels=bins, note=note))
    return Section(title=suite, blocks=tuple(blocks))


def _judged(row: Row, bundle: str) -> Row:
    # the aim is the bundle's: beside every baseline it would be noise
    return row if row["system"] == bundle else {key: row[key] for key in row if key not in ("target", "meets")}


def _verdict(task: Sequence[Row], bundle: str) -> str:
    judged = [row for row in task if row["system"] == bundle and "meets" in row]
    return "" if not judged else "met" if all(row["meets"] for row in judged) else "missed"


def _about(row: Row) -> str:
    told = [row.get("head"), f"mode {row['mode']}" if "mode" in row else None, ", ".join(map(str, row.get("sets", ())))]
    return " · ".join(plain(text) for text in told if text)


def _curves(task: Sequence[Row], systems: Sequence[str]) -> Panel:
    row = task[0]
    values = ", ".join(f"{r['system']} {number(r['auroc'], 3)}" for r in task if r.get("auroc") is not None)
    roc = [(systems.index(r["system"]), r["roc"]) for r in task if r.get("roc")]
    pr = [(systems.index(r["system"]), r["pr"]) for r in task if r.get("pr")]
    prevalence = row["positives"] / row["n"] if row.get("positives") is not None and row["n"] else None
    drawings = []
    if roc:
        drawings.append(partial(charts.roc, roc, alt=f"ROC curves on {row['task']}. AUROC: {values or 'not stated'}."))
    if pr:
        alt = f"Precision against recall on {row['task']}"
        alt += f"; {number(prevalence, 2)} of the rows are positive." if prevalence is not None else "."
        drawings.append(partial(charts.precision_recall, pr, prevalence=prevalence, alt=alt))
    return Panel(caption=f"{plain(row['task'])}, n = {row['n']}", drawings=tuple(drawings))
