"""What of ``figures.json`` may be printed: a figure without provenance is not, and what all of them come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hhh_router.errors import DataError
from hhh_router.evaluation.blocks import HASH_HEADS, Cell, Line, Section, Table
from hhh_router.evaluation.svg import plain
from hhh_router.evaluation.tables import made_by

Row = Mapping[str, Any]

# the parts of figures.json, and under which names each states how many rows it was measured on
COUNTS: Mapping[str, tuple[str, ...]] = {
    "detection": ("n",),
    "latency": ("n",),
    "subgroups": ("n",),
    "kinds": ("n",),
    "transfer": ("n",),
    "simplex": ("n",),
    "tradeoff": ("n_harmful", "n_benign"),
    "behaviour": ("harmful_n", "safe_n"),
    "judge": ("n",),
    "likelihood": ("n",),
    "evasion": ("n",),
    "gates": ("n",),
    "confidence": ("n",),
}
_LABELS = (
    "suite",
    "task",
    "source",
    "family",
    "name",
    "gate",
    "mode",
    "head",
    "group",
    "kind",
    "confidence",
    "replies",
    "judge",
    "system",
)


def printable_parts(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Every part's rows, each with its provenance; a part that is missing or empty is left out.

    Raises:
        DataError: Something without provenance; every one is listed.
    """
    wrong = [f"figures.json: no {key}" for key in ("bundle_parts", "versions") if not figures.get(key)]
    parts: dict[str, list[Row]] = {}
    for name in COUNTS:
        for where, row in _rows(name, figures):
            if missing := [key for key in ("command", "seed", "data_sha256", *COUNTS[name]) if not _states(row, key)]:
                wrong.append(f"figures.json: {where}: no {', '.join(missing)}")
            parts.setdefault(name, []).append(row)
    if wrong:
        raise DataError(
            "\n".join(wrong), hint="a figure without provenance is not printed; measure it again (hhh-router evaluate)"
        )
    return parts


def _rows(name: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    part = figures.get(name) or []
    shared = {key: figures[key] for key in ("command", "seed") if key in figures}
    if isinstance(part, Mapping) and "rows" in part:
        shared |= {key: part[key] for key in ("command", "seed", "data_sha256") if key in part}
        part = part["rows"]
    rows = [part] if isinstance(part, Mapping) else part
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(r, Mapping) for r in rows):
        raise DataError(f"figures.json: {name}: not a list of rows")
    for place, row in enumerate(rows):
        yield f"{name}[{place}]{_name(row)}", {**shared, **row}
    if name == "likelihood":  # a system's likelihood scores may stand beside its behaviour
        for where, row in _rows("behaviour", figures):
            for number, score in enumerate(row.get("likelihood") or []):
                made = {key: row[key] for key in ("command", "seed", "system") if key in row}
                yield f"{where}.likelihood[{number}]", {**made, **score}


def _name(row: Row) -> str:
    found = [plain(row[key]) for key in _LABELS if isinstance(row.get(key), str)]
    return f" ({', '.join(found)})" if found else ""


def _states(row: Row, key: str) -> bool:
    value = row.get(key)
    if key in ("command", "data_sha256"):
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, int) and not isinstance(value, bool) and (key == "seed" or value >= 0)


def provenance(parts: Mapping[str, Sequence[Row]], figures: Mapping[str, Any]) -> Section:
    """What was measured, with what, and on which rows."""
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in dict(figures["versions"]).items())
    seen: dict[tuple[str, str], Row] = {}
    for name, rows in parts.items():
        for row in rows:
            seen.setdefault((name, row["data_sha256"]), row)
    lines = tuple(
        Line(
            group="",
            note="",
            badge="",
            strong=False,
            cells=(
                Cell(text=name.replace("_", " ")),
                Cell(text=next((plain(row[key]) for key in ("task", "source", "replies") if key in row), "all")),
                Cell(text=plain(digest)),
                Cell(text=" + ".join(str(row[key]) for key in COUNTS[name])),
            ),
        )
        for (name, digest), row in seen.items()
    )
    rows = [row for part in parts.values() for row in part]
    table = Table(
        group_title="",
        head=("part", "measured on", HASH_HEADS[1], "n"),
        labels=3,
        lines=lines,
        made_by=made_by(rows),
        sizes="",
    )
    return Section(
        title="Provenance",
        lead="What was measured, with what, and on which rows.",
        points=(("bundle parts", plain(figures["bundle_parts"])), ("versions", versions), *_settings(figures)),
        blocks=(table,) if rows else (),
    )


def _settings(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    told = {
        "dtype": "precision of the last run",
        "max_tokens": "longest text read, tokens",
        "bootstraps": "bootstrap samples",
    }
    for key, name in told.items():
        if figures.get(key) is not None:
            yield name, plain(figures[key])
