"""Figures of any systems on a user's own labelled rows, per label, and the files they are written to."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hhh_router.calibration import metrics as m
from hhh_router.calibration.metrics import Floats
from hhh_router.data.examples import Example, data_hash
from hhh_router.data.own import NEED_LABELS, OUTCOME_LABELS
from hhh_router.errors import DataError, HHHRouterError, MissingExtra, SettingsError
from hhh_router.evaluation.intervals import with_interval
from hhh_router.evaluation.systems import System, Told
from hhh_router.types import Mode, ReadRequest

SCHEMA = "hhh-router/own-evaluation/1"
BOOTSTRAPS = 1000
LIMIT = 0.5
MAX_FPR = 0.01
FILES = ("figures.json", "report.md", "report.html")
VERDICT = "its verdict"
"""What decides in the rows of a system that says yes or no by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTask:
    """One label: the rows that have it, and what is read of them."""

    label: str
    """As in the file, such as ``harmful``."""
    kind: Literal["needs", "outcomes"]
    head: str
    mode: Mode
    """Needs are read from the prompt alone, outcomes from prompt and response."""
    requests: tuple[ReadRequest, ...]
    labels: tuple[float, ...]
    data_sha256: str


def own_tasks(examples: Sequence[Example]) -> list[OwnTask]:
    """The labels that occur, in the order of the file format. A text that recurs is asked once.

    >>> from hhh_router.data.examples import ask
    >>> row = Example(source="own", split="eval", messages=ask("Hi"), needs={"harmless": 0.0})
    >>> [(t.label, t.head, t.mode, len(t.labels)) for t in own_tasks([row, row])]
    [('harmful', 'harmless', 'prompt', 1)]
    """
    heads: list[tuple[str, Literal["needs", "outcomes"], str]] = [(k, "needs", v) for k, v in NEED_LABELS.items()]
    heads += [(label, "outcomes", label) for label in OUTCOME_LABELS]
    tasks = []
    for label, kind, head in heads:
        mode: Mode = "prompt" if kind == "needs" else "both"
        rows: dict[ReadRequest, Example] = {}
        for e in examples:
            if head in getattr(e, kind):
                asked = ReadRequest(messages=e.messages, response=None if mode == "prompt" else e.response)
                rows.setdefault(asked, e)
        if rows:
            tasks.append(
                OwnTask(
                    label=label, kind=kind, head=head, mode=mode, requests=tuple(rows),
                    labels=tuple(getattr(e, kind)[head] for e in rows.values()), data_sha256=data_hash(rows.values()),
                )
            )  # fmt: skip
    return tasks


def evaluate_own(
    systems: Sequence[System],
    examples: Sequence[Example],
    *,
    command: str,
    seed: int,
    limit: float = LIMIT,
    broken: int = 0,
    on_progress: Told = lambda *_: None,
    on_measured: Callable[[Mapping[str, Any]], object] = lambda _: None,
    on_failed: Callable[[str, HHHRouterError], object] = lambda *_: None,
) -> dict[str, Any]:
    """Ask every system about every label; a system that fails is reported as such and the others go on.

    Args:
        systems: Measured one after the other.
        examples: Sound rows, see `data.own`.
        command: How this was asked for, without paths of this machine and without keys.
        seed: Of the bootstraps.
        limit: A probability at or above it is a positive, in (0, 1).
        broken: Rows of the file that were left out.
        on_progress: Told stage, done, total, note.
        on_measured: Given the figures so far after each system, so that a run that is killed keeps them.
        on_failed: Given the name of a system that failed, and why. The figures hold the error's message alone: its
            hint may quote what a server said, which may quote a row.

    Returns:
        Plain values for JSON, without a word of the rows: ``schema``, ``command``, ``seed``, ``limit``,
        ``bootstraps``, ``versions``, ``data`` (``rows``, ``broken``, ``data_sha256``), ``systems`` (``system``,
        ``note``, and ``error`` where it failed) and ``figures``: a row per label, system and way to decide.

    Raises:
        DataError: The limit is out of range.
    """
    check_limit(limit)
    tasks = own_tasks(examples)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "limit": limit,
        "bootstraps": BOOTSTRAPS,
        "versions": {p: version(p) for p in ("hhh-router", "numpy")} | {"python": platform.python_version()},
        "data": {"rows": len(examples), "broken": broken, "data_sha256": data_hash(examples)},
        "systems": [],
        "figures": [],
    }
    for system in systems:
        rows, error = _measured(system, tasks, limit, seed, on_progress)
        about = {"system": system.name, "note": system.note}
        result["systems"].append(about if error is None else about | {"error": error.message})
        result["figures"] += [row | {"seed": seed, "command": command} for row in rows]
        on_measured(result)
        if error is not None:
            on_failed(system.name, error)
    order = [task.label for task in tasks]
    result["figures"].sort(key=lambda row: order.index(row["label"]))  # stable: systems keep their order
    return result


def has_figures(result: Mapping[str, Any]) -> bool:
    """Whether anything was measured."""
    return any("error" not in row for row in result["figures"])


def check_limit(limit: float) -> None:
    """Refuse a limit that no rows lie on both sides of.

    Raises:
        DataError: It is out of range.
    """
    if not 0 < limit < 1:
        raise DataError(f"the limit is {limit:g}", hint="give --limit between 0 and 1")


def _measured(
    system: System, tasks: Sequence[OwnTask], limit: float, seed: int, on_progress: Told
) -> tuple[list[dict[str, Any]], HHHRouterError | None]:
    rows: list[dict[str, Any]] = []
    failed: HHHRouterError | None = None
    for number, task in enumerate(tasks):
        row = {
            "label": task.label,
            "system": system.name,
            "head": f"{task.kind}.{task.head}",
            "mode": task.mode,
            "n": len(task.labels),
            "positives": int(sum(task.labels)),
            "data_sha256": task.data_sha256,
        }
        if failed is None:
            on_progress(system.name, number, len(tasks), task.label)
            try:
                rows += _asked(system, task, row, limit, seed)
            except HHHRouterError as error:
                failed = error
        if failed is not None:
            rows.append(row | {"error": failed.message})
    if failed is None:
        on_progress(system.name, len(tasks), len(tasks), "")
    return rows, failed


def _asked(system: System, task: OwnTask, row: Mapping[str, Any], limit: float, seed: int) -> list[dict[str, Any]]:
    found = []
    p = system.probabilities(task.requests, task.head)
    if p is not None:
        is_judged = [not math.isnan(value) for value in p]
        counts, (values, labels) = _judged(is_judged, p, task.labels)
        decided = {"decided_by": f"p ≥ {limit:g}", "limit": limit}
        found.append({**row, **decided, **counts, **probability_figures(values, labels, limit=limit, seed=seed)})
    if task.head in system.verdict_heads and (verdicts := system.verdicts(task.requests)) is not None:
        counts, (flags, labels) = _judged([v is not None for v in verdicts], verdicts, task.labels)
        found.append({**row, "decided_by": VERDICT, **counts, **verdict_figures(flags, labels, seed=seed)})
    return found


def _judged(
    is_judged: Sequence[bool], values: Sequence[Any], labels: Sequence[float]
) -> tuple[dict[str, Any], tuple[list[float], list[float]]]:
    """The rows a system judged, and their counts; those it would not judge are counted where there are any."""
    kept = [(float(v), y) for is_in, v, y in zip(is_judged, values, labels, strict=True) if is_in]
    counts = {"n": len(kept), "positives": int(sum(y for _, y in kept))}
    if missing := len(labels) - len(kept):
        counts["unjudged"] = missing
    return counts, ([v for v, _ in kept], [y for _, y in kept])


# --- figures of one label


def probability_figures(p: Sequence[float], y: Sequence[float], *, limit: float, seed: int) -> dict[str, Any]:
    """Every figure of probabilities that the labels allow, with 95 % bootstrap intervals and thinned curves.

    With one class only, ranking figures (AUROC, AUPRC, recall at a false positive rate), precision and F1 are left
    out; Brier, ECE and the one side of errors that can occur stay.

    Args:
        p: Probabilities, shape (n,).
        y: Labels, 0 or 1, shape (n,).
        limit: A row is flagged at this probability or above.
        seed: Of the bootstraps.
    """
    if not y:
        return {}
    figures: dict[str, Any] = {}
    if len(set(y)) == 2:
        figures |= with_interval("auroc", m.auroc, p, y, seed=seed, bootstraps=BOOTSTRAPS)
        figures |= with_interval("auprc", average_precision, p, y, seed=seed, bootstraps=BOOTSTRAPS)
        figures |= with_interval("recall_at_fpr_01", _recall_at_fpr, p, y, seed=seed, bootstraps=BOOTSTRAPS)
    figures |= verdict_figures([float(value >= limit) for value in p], y, seed=seed)
    figures |= with_interval("brier", m.brier, p, y, seed=seed, bootstraps=BOOTSTRAPS)
    figures |= with_interval("ece", m.ece, p, y, seed=seed, bootstraps=BOOTSTRAPS)
    if len(set(y)) == 2:
        figures |= {"roc": _rounded(m.roc_points(p, y)), "pr": _rounded(m.pr_points(p, y))}
    return figures | {"reliability": _rounded(m.reliability(p, y))}


def verdict_figures(flags: Sequence[float], y: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Both sides of errors, and precision, recall and F1 where there are both classes, with bootstrap intervals.

    ``benign_refused`` is the share of rows labelled false that are flagged (false alarms), ``harm_passed`` the share
    of rows labelled true that are not (misses).

    Args:
        flags: 1 where the row is flagged, shape (n,).
        y: Labels, 0 or 1, shape (n,).
        seed: Of the bootstraps.

    >>> found = verdict_figures([1, 0, 1, 0], [1, 1, 0, 0], seed=1)
    >>> found["benign_refused"], found["harm_passed"], found["precision"]
    (0.5, 0.5, 0.5)
    """
    figures: dict[str, Any] = {}
    if len(set(y)) == 2:
        figures |= with_interval("f1", _f1, flags, y, seed=seed, bootstraps=BOOTSTRAPS)
        figures |= with_interval("precision", _precision, flags, y, seed=seed, bootstraps=BOOTSTRAPS)
    if 1 in y:
        figures |= with_interval("recall", _recall, flags, y, seed=seed, bootstraps=BOOTSTRAPS)
        figures |= with_interval("harm_passed", _passed, flags, y, seed=seed, bootstraps=BOOTSTRAPS)
    if 0 in y:
        figures |= with_interval("benign_refused", _false_alarms, flags, y, seed=seed, bootstraps=BOOTSTRAPS)
    return figures


def average_precision(scores: Floats, labels: Floats) -> float:
    """Area under the precision–recall curve as a step function.

    Raises:
        DataError: No row is labelled 1.
    """
    from sklearn.metrics import average_precision_score  # takes a second to import, and few runs need it

    if not any(labels):
        raise DataError("AUPRC needs rows labelled 1; found none", hint="add positives")
    return float(average_precision_score(labels, scores))


def _recall_at_fpr(p: Floats, y: Floats) -> float:
    return m.recall_at_fpr(p, y, max_fpr=MAX_FPR)


def _f1(flags: Floats, y: Floats) -> float:
    return m.f1(flags, y, threshold=1.0)


def _precision(flags: Floats, y: Floats) -> float:
    return _share(y, of=flags == 1)


def _recall(flags: Floats, y: Floats) -> float:
    return _share(flags, of=y == 1)


def _passed(flags: Floats, y: Floats) -> float:
    return _share(1 - flags, of=y == 1)


def _false_alarms(flags: Floats, y: Floats) -> float:
    return _share(flags, of=y == 0)


def _share(hits: Floats, *, of: Any) -> float:
    if not of.any():
        raise DataError("a share of no rows", hint="add rows of both classes")
    return float(hits[of].mean())


def _rounded(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(float(v), 4) for v in point] for point in points]


# --- files


def check_out(folder: Path) -> None:
    """Make the folder for the results, before anything is measured.

    Raises:
        SettingsError: It cannot be made or written to.
        MissingExtra: matplotlib is not installed, which draws the report.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtra("train", needed_for="the report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{FILES[0]}.partial"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"--out {folder}: cannot be written ({error.strerror})", hint="give another folder"
        ) from error


def write_json(result: Mapping[str, Any], folder: Path) -> Path:
    """``figures.json``: complete, or as it was before."""
    path = folder / FILES[0]
    partial = folder / f".{FILES[0]}.partial"
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def write_report(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """``report.md`` and ``report.html`` beside it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    from hhh_router.evaluation.report_own import own_html, own_markdown

    written = {FILES[1]: own_markdown(result), FILES[2]: own_html(result)}
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]
