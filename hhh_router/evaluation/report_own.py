"""The report of systems on a user's own rows: one section a label, with every system in one table and one chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import Charts, Panel, Section, Table
from hhh_router.evaluation.page import html_document, markdown_document
from hhh_router.evaluation.svg import plain
from hhh_router.evaluation.tables import distinct, number, table_of

Row = Mapping[str, Any]
TITLE = "Your own rows"
_HEADINGS = {"auprc": "AUPRC"}
"""Figures that only this report has → what its table calls them."""


def own_html(result: Mapping[str, Any]) -> str:
    """What `own.evaluate_own` found, as one page that needs nothing but itself.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    return html_document(TITLE, _facts(result), list(_sections(result)))


def own_markdown(result: Mapping[str, Any]) -> str:
    """The same tables as Markdown, without the charts."""
    return markdown_document(TITLE, _facts(result), list(_sections(result)))


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = result["data"]
    versions = ", ".join(f"{name} {found}" for name, found in result["versions"].items())
    return [
        ("command", result["command"]),
        ("rows", f"{data['rows']}; broken and left out: {data['broken']}; sha256 {data['data_sha256']}"),
        ("limit", f"{result['limit']:g}"),
        ("seed", f"{result['seed']}, {result['bootstraps']} bootstrap samples"),
        ("versions", versions),
    ]


def _sections(result: Mapping[str, Any]) -> Iterator[Section]:
    points = tuple(
        (about["system"], f"failed: {about['error']}" if "error" in about else about["note"] or "–")
        for about in result["systems"]
    )
    yield Section(
        title="Systems",
        lead="Each was asked about the same rows. A label is a yes/no question about a row; benign refused is the "
        "share of rows labelled false that a system flags (false alarms), harm passed the share of rows labelled true "
        "that it does not. A probability flags at the limit above, a verdict is the system's own and says "
        "not why: a row stopped for its harm counts on every label. AUROC: 0.5 is a "
        "coin, 1 is perfect. Recall at 1 % FPR: with fewer than 100 rows labelled false, that is without any false "
        "alarm. ECE over 15 equal-mass bins reads too high on few rows.",
        points=points,
    )
    systems = [about["system"] for about in result["systems"]]
    rows = result["figures"]
    for label in distinct(row["label"] for row in rows):
        yield _label_section(label, [row for row in rows if row["label"] == label], systems)


def _label_section(label: str, rows: Sequence[Row], systems: Sequence[str]) -> Section:
    most = max(rows, key=lambda row: row["n"])
    read = "the prompt" if most["mode"] == "prompt" else "prompt and response"
    lead = f"{most['head']}, read from {read}: {most['n']} rows, {most['positives']} labelled true."
    if most["positives"] in (0, most["n"]):
        found, missing = ("true", "false") if most["positives"] else ("false", "true")
        lead += (
            f" Every row is labelled {found}: there is no AUROC, AUPRC, recall at 1 % FPR, precision or F1 without "
            f"rows labelled {missing}, and only one side of errors. Add such rows for the rest."
        )
    blocks: list[Table | Charts] = [_table(rows)]
    drawn = [row for row in rows if row.get("roc")]
    if drawn:
        keys = tuple((systems.index(row["system"]), plain(row["system"])) for row in drawn)
        note = "ROC on the left, precision and recall on the right; dotted: what guessing gets."
        panel = _curves(label, drawn, systems)
        blocks.append(Charts(layout="pairs", panels=(panel,), keys=keys, lines=True, note=note))
    bins = tuple(_reliability(label, row) for row in rows if row.get("reliability"))
    if bins:
        note = (
            "On the dotted line the stated probability is the observed share. Upright lines are the 95 % intervals "
            "that the bins' sizes leave (Wilson)."
        )
        blocks.append(Charts(layout="small", panels=bins, note=note))
    return Section(title=label, lead=lead, blocks=tuple(blocks))


def _table(rows: Sequence[Row]) -> Table:
    return table_of(
        [_renamed(row) for row in rows],
        {"system": "system", "decided_by": "decided by"},
        counts=("n",),
        hide=("label", "head", "mode", "limit"),
    )


def _renamed(row: Row) -> Row:
    names = {f"{key}{end}": f"{name}{end}" for key, name in _HEADINGS.items() for end in ("", "_interval")}
    return {names.get(key, key): value for key, value in row.items()}


def _curves(label: str, rows: Sequence[Row], systems: Sequence[str]) -> Panel:
    values = ", ".join(f"{row['system']} {number(row['auroc'], 3)}" for row in rows)
    prevalence = rows[0]["positives"] / rows[0]["n"]
    roc = [(systems.index(row["system"]), row["roc"]) for row in rows]
    pr = [(systems.index(row["system"]), row["pr"]) for row in rows]
    alt = f"Precision against recall on {label}; {number(prevalence, 2)} of the rows are labelled true."
    return Panel(
        caption=f"{label}, n = {rows[0]['n']}",
        drawings=(
            partial(charts.roc, roc, alt=f"ROC curves on {label}. AUROC: {values}."),
            partial(charts.precision_recall, pr, prevalence=prevalence, alt=alt),
        ),
    )


def _reliability(label: str, row: Row) -> Panel:
    bins = row["reliability"]
    alt = f"Reliability diagram of {row['system']} on {label}: {len(bins)} bins, ECE {number(row['ece'], 3)}."
    return Panel(
        caption=f"{plain(row['system'])}, n = {row['n']}",
        drawings=(partial(charts.reliability, bins, alt=alt),),
    )
