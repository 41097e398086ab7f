"""Rows of figures to tables and dot charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from hhh_router.evaluation import charts
from hhh_router.evaluation.blocks import Cell, Line, Panel, Table
from hhh_router.evaluation.charts import Dot, DotRow
from hhh_router.evaluation.svg import plain

Row = Mapping[str, Any]

# key → heading, decimals; the columns stand in this order, keys unknown here after them
_FIGURES: Mapping[str, tuple[str, int]] = {
    "target": ("AUROC aimed at", 2),
    "accuracy": ("accuracy", 3),
    "auroc": ("AUROC", 3),
    "auroc_in_domain": ("AUROC with the group", 3),
    "auroc_lost": ("AUROC lost", 3),
    "recall_at_fpr_01": ("recall at 1 % FPR", 2),
    "f1": ("F1", 2),
    "recall_at_0.5": ("recall at 0.5", 2),
    "false_positive_rate_at_0.5": ("FPR at 0.5", 2),
    "recall_at_0.9": ("recall at 0.9", 2),
    "false_positive_rate_at_0.9": ("FPR at 0.9", 2),
    "nll": ("NLL, nats", 3),
    "brier": ("Brier", 3),
    "ece": ("ECE", 3),
    "ece_in_domain": ("ECE with the group", 3),
    "aurc": ("AURC", 3),
    "aurc_difference": ("AURC minus that of max softmax", 4),
    "recall": ("recall at the limit", 2),
    "false_alarms": ("false alarms at the limit", 2),
    "mean_logits": ("mean |logits|", 3),
    "harmful_refused": ("refuses harmful", 2),
    "safe_refused": ("refuses safe (over-refusal)", 2),
    "benign_refused": ("benign refused", 3),
    "harm_passed": ("harm passed", 3),
    "detected": ("detected before", 2),
    "detected_before": ("detected before", 2),
    "flips": ("flips", 3),
    "new_false_alarms": ("new false alarms", 3),
    "flips_by_any": ("flipped by any", 3),
    "mean_logit_shift": ("logit shift", 2),
    "logit_shift": ("logit shift", 2),
    "base": ("mean base", 2),
    "helpful": ("mean helpful", 2),
    "harmless": ("mean harmless", 2),
    "honest": ("mean honest", 2),
    "value": ("value", 3),
    "limit": ("limit", 2),
    "latency_ms": ("latency, ms", 1),
    "median_ms": ("median, ms", 1),
    "p95_ms": ("95th percentile, ms", 1),
}
_ELSEWHERE = ("command", "seed", "n", "positives", "data_sha256", "meets", "error")
_HASH_CHARS = 12


def table_of(
    rows: Sequence[Row],
    labels: Mapping[str, str],
    *,
    counts: Sequence[str] = ("n",),
    hide: Sequence[str] = (),
    group: tuple[str, Callable[[Row], tuple[str, str]]] = ("", lambda _: ("", "")),
    verdict: Callable[[Row], str] = lambda _: "",
    strong: Callable[[Row], bool] = lambda _: False,
) -> Table:
    """A table of rows of figures: labels, counts, figures in the order of `_FIGURES`, and the hash of the data."""
    labels = {key: title for key, title in labels.items() if any(key in row for row in rows)}
    not_figures = {*labels, *counts, *hide, *_ELSEWHERE}
    keys = [key for row in rows for key, value in row.items() if key not in not_figures and _is_figure(key, value)]
    keys += ["target"] if any("meets" in row for row in rows) else []
    known = [*_FIGURES]
    columns = sorted(distinct(keys), key=lambda key: known.index(key) if key in known else len(known))
    lines = []
    for row in rows:
        name, note = group[1](row)
        # why a row has no figures stands under its name: a column of its own would be empty everywhere else
        failed = f"not measured: {plain(row['error'])}" if row.get("error") else ""
        cells = [Cell(text=plain(row.get(key, "–")), span="" if i else failed) for i, key in enumerate(labels)]
        cells += [_count(row, key) for key in counts]
        cells += [_figure(row, key) for key in columns]
        cells.append(Cell(text=plain(row["data_sha256"])[:_HASH_CHARS]))
        lines.append(Line(group=name, note=note, badge=verdict(row), strong=strong(row), cells=tuple(cells)))
    positives = " (positive)" if any(row.get("positives") is not None for row in rows) else ""
    count_titles = [f"n{positives}" if key == "n" else f"n {key.replace('_n', '').replace('n_', '')}" for key in counts]
    titles = [_FIGURES[key][0] if key in _FIGURES else plain(key).replace("_", " ") for key in columns]
    return Table(
        group_title=group[0],
        head=(*labels.values(), *count_titles, *titles, "data"),
        labels=len(labels),
        lines=tuple(lines),
        made_by=made_by(rows),
        sizes="; ".join(
            f"{title.removesuffix(' (positive)')} {_range([row[key] for row in rows])}"
            for title, key in zip(count_titles, counts, strict=True)
        ),
    )


def grouped_by(key: str, rows: Sequence[Row], labels: Mapping[str, str]) -> Table:
    """A table whose rows stand together by one key."""
    ordered = [row for value in column(rows, key) for row in rows if row[key] == value]
    return table_of(ordered, labels, hide=(key,), group=(key, lambda row: (plain(row[key]), "")))


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, int | float | str | None) and not key.endswith(("_interval", "_error"))


def _count(row: Row, key: str) -> Cell:
    positives = f" ({row['positives']})" if key == "n" and row.get("positives") is not None else ""
    return Cell(text=plain(f"{row[key]}{positives}"))


def _figure(row: Row, key: str) -> Cell:
    value, digits = row.get(key), _FIGURES[key][1] if key in _FIGURES else 3
    span = ""
    if (interval := row.get(f"{key}_interval")) is not None:
        low, high = interval
        span = f"[{number(float(low), digits)}, {number(float(high), digits)}]"
    elif (error := row.get(f"{key}_error")) is not None:
        span = f"± {number(error, digits)}"
    if key == "target" and "meets" in row:
        return Cell(text="" if value is None else number(value, digits), badge="met" if row["meets"] else "missed")
    if key == "chosen":
        return Cell(text="", badge="chosen" if value else "")
    return Cell(text=number(value, digits), span=span)


def number(value: Any, digits: int) -> str:
    """A number for people: fixed decimals, a true minus, a dash where there is none.

    >>> number(-0.12345, 2), number(12, 3), number(None, 3), number(float("nan"), 3), number(True, 0)
    ('−0.12', '12', '–', '–', 'yes')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else plain(value)


def dots_of(
    caption: str, rows: Sequence[Row], label: str, keys: Mapping[str, str], x_label: str, *, unit: bool = False
) -> Panel:
    """One chart with a dot, and its interval, per row and key."""
    lines = [
        DotRow(
            label=plain(row[label]),
            dots=tuple(dot_of(row, key, i) for i, key in enumerate(keys.values()) if row.get(key) is not None),
        )
        for row in rows
    ]
    told = "; ".join(
        f"{row[label]}: " + ", ".join(f"{name} {number(row.get(key), 3)}" for name, key in keys.items()) for row in rows
    )
    alt = f"{caption}: {x_label}. {told}."
    return Panel(caption=plain(caption), drawings=(partial(charts.dots, lines, x_label=x_label, alt=alt, unit=unit),))


def dot_of(row: Row, key: str, series: int) -> Dot:
    """One value of a row with its interval."""
    low, high = row.get(f"{key}_interval") or (None, None)
    return Dot(value=row[key], low=low, high=high, series=series)


def source_of(row: Row) -> Row:
    """A row's provenance."""
    return {key: row[key] for key in ("command", "seed", "data_sha256")}


def made_by(rows: Iterable[Row]) -> tuple[tuple[str, int], ...]:
    """Commands and seeds behind the rows, each once."""
    return tuple(dict.fromkeys((plain(row["command"]), row["seed"]) for row in rows))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def column(rows: Iterable[Row], key: str) -> tuple[Any, ...]:
    """The distinct values of one key, in order."""
    return distinct(row[key] for row in rows)


def distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    """Each value once, in order."""
    return tuple(dict.fromkeys(values))


def keys_of(names: Iterable[str]) -> tuple[tuple[int, str], ...]:
    """The legend's entries: number of the series, name."""
    return tuple(enumerate(names))
