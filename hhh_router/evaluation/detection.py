"""Measure the heads on detection tasks: AUROC, recall at 1 % false positives, F1, NLL, Brier, ECE, intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hhh_router.calibration import Calibrators
from hhh_router.calibration import metrics as m
from hhh_router.data.examples import Example, data_hash
from hhh_router.evaluation.tasks import TASKS, Task, task_rows
from hhh_router.model.encode import Encoder
from hhh_router.model.reader import HeadReader
from hhh_router.training.features import BATCH_TOKENS, encode_cut
from hhh_router.types import ReadRequest

BOOTSTRAPS = 1000
THRESHOLD = 0.5


def detection_figures(
    reader: HeadReader,
    encoder: Encoder,
    calibrators: Calibrators,
    data: Path,
    *,
    seed: int,
    max_tokens: int,
    on_task: Callable[[int, int, str], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """One row of figures per task, each with n, positives, data hash and 95 % bootstrap intervals."""
    figures = []
    for number, task in enumerate(TASKS, start=1):
        on_task(number, len(TASKS), task.name)
        rows = task_rows(task, data)
        probabilities = _probabilities(task, rows, reader, encoder, calibrators, max_tokens)
        labels = [getattr(e, task.kind)[task.head] for e in rows]
        figures.append(
            {
                "task": task.name,
                "sets": list(task.sets),
                "head": f"{task.kind}.{task.head}",
                "mode": task.mode,
                "n": len(rows),
                "positives": int(sum(labels)),
                "data_sha256": data_hash(rows),
            }
            | _metrics(probabilities, labels, seed)
        )
    return figures


def _probabilities(
    task: Task, rows: Sequence[Example], reader: HeadReader, encoder: Encoder, calibrators: Calibrators, max_tokens: int
) -> list[float]:
    requests = [ReadRequest(messages=e.messages, response=None if task.mode == "prompt" else e.response) for e in rows]
    texts = [encode_cut(encoder, r, max_tokens) for r in requests]
    found = [0.0] * len(texts)
    for batch in reader.batches(texts, BATCH_TOKENS):
        for i, scores in zip(batch, reader.score([texts[i] for i in batch]), strict=True):
            found[i] = getattr(calibrators.evidence(scores), task.kind)[task.head]
    return found


def _metrics(p: Sequence[float], y: Sequence[float], seed: int) -> dict[str, Any]:
    measured: dict[str, Callable[..., float]] = {
        "auroc": m.auroc,
        "recall_at_fpr_01": partial(m.recall_at_fpr, max_fpr=0.01),
        "f1": partial(m.f1, threshold=THRESHOLD),
        "nll": m.nll,
        "brier": m.brier,
        "ece": m.ece,
    }
    result: dict[str, Any] = {name: metric(p, y) for name, metric in measured.items()}
    result["auroc_interval"] = m.bootstrap_interval(m.auroc, p, y, n=BOOTSTRAPS, seed=seed)
    result["ece_interval"] = m.bootstrap_interval(m.ece, p, y, n=BOOTSTRAPS, seed=seed)
    for limit in (0.5, 0.9):
        flagged = [float(x >= limit) for x in p]
        positives = sum(y)
        result[f"false_positive_rate_at_{limit}"] = sum(f for f, t in zip(flagged, y, strict=True) if not t) / (
            len(y) - positives
        )
        result[f"recall_at_{limit}"] = sum(f for f, t in zip(flagged, y, strict=True) if t) / positives
    return result
