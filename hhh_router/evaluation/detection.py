"""Measure detectors on the same rows: AUROC, recall at 1 % false positives, F1, NLL, Brier, ECE, intervals, curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from hhh_router.calibration import Calibrators
from hhh_router.calibration import metrics as m
from hhh_router.data.examples import Example, data_hash
from hhh_router.errors import HHHRouterError
from hhh_router.evaluation.tasks import Task, task_rows
from hhh_router.model.encode import Encoder
from hhh_router.model.reader import HeadReader
from hhh_router.training.features import scored, token_states
from hhh_router.types import NEEDS, OUTCOMES, Evidence, ReadRequest, Scores

BOOTSTRAPS = 1000
THRESHOLD = 0.5
_LATENCY_PROMPTS = 40


class Detector(Protocol):
    """Something that says how likely a text is what a head asks about."""

    @property
    def name(self) -> str:
        """As the tables name it."""

    @property
    def heads(self) -> frozenset[str]:
        """The heads it can stand in for."""

    def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
        """P(head) of each text."""


class BundleDetector:
    """A bundle's heads and calibrators; token states of the rows are read once and kept."""

    heads = frozenset((*NEEDS, *OUTCOMES))

    def __init__(
        self,
        name: str,
        reader: HeadReader,
        encoder: Encoder,
        calibrators: Calibrators,
        *,
        max_tokens: int,
        folder: Path,
    ) -> None:
        self.name = name
        self.reader = reader
        self.encoder = encoder
        self.calibrators = calibrators
        self.max_tokens = max_tokens
        self.folder = folder

    def scores(self, texts: Sequence[ReadRequest]) -> list[Scores]:
        """Raw scores of each text, cut to ``max_tokens``."""
        states = token_states(texts, self.reader, self.encoder, max_tokens=self.max_tokens, folder=self.folder)
        return [given for given, _ in scored(self.reader.heads, states, layers_run=self.reader.first_adapted_layer)]

    def evidence(self, texts: Sequence[ReadRequest]) -> list[Evidence]:
        """Calibrated evidence of each text."""
        return [self.calibrators.evidence(s) for s in self.scores(texts)]

    def probabilities(self, texts: Sequence[ReadRequest], head: str) -> list[float]:
        """P(head) of each text."""
        return [e.needs[head] if head in e.needs else e.outcomes[head] for e in self.evidence(texts)]

    def read_one(self, text: ReadRequest) -> None:
        """Read one text as a request would be, without kept states; for timing."""
        self.calibrators.evidence(self.reader.score([self.encoder.encode(text)])[0])


def task_requests(task: Task, rows: Sequence[Example]) -> list[ReadRequest]:
    """What is read of each row: the prompt alone, or with its response."""
    return [ReadRequest(messages=e.messages, response=None if task.mode == "prompt" else e.response) for e in rows]


def detection_figures(
    detectors: Sequence[Detector],
    tasks: Sequence[Task],
    data: Path,
    *,
    seed: int,
    on_task: Callable[[int, int, str], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """One row of figures per task and detector, each with n, positives, data hash and 95 % bootstrap intervals.

    A detector that fails on a task is reported as such (``error``), not left out.
    """
    figures = []
    for number, task in enumerate(tasks, start=1):
        on_task(number, len(tasks), task.name)
        rows = task_rows(task, data)
        requests = task_requests(task, rows)
        labels = [getattr(e, task.kind)[task.head] for e in rows]
        for detector in detectors:
            if task.head not in detector.heads:
                continue
            row: dict[str, Any] = {
                "suite": task.suite,
                "task": task.name,
                "system": detector.name,
                "sets": list(task.sets),
                "head": f"{task.kind}.{task.head}",
                "mode": task.mode,
                "n": len(rows),
                "positives": int(sum(labels)),
                "data_sha256": data_hash(rows),
                "seed": seed,
                "target": task.target,
            }
            try:
                probabilities = detector.probabilities(requests, task.head)
            except HHHRouterError as error:
                figures.append(row | {"error": error.message})
                continue
            row |= measured(probabilities, labels, seed)
            if task.target is not None:
                row["meets"] = row["auroc"] >= task.target
            figures.append(row)
    return figures


def measured(p: Sequence[float], y: Sequence[float], seed: int) -> dict[str, Any]:
    """Every metric of one detector on one task, with intervals and thinned curves."""
    metrics: Mapping[str, Callable[..., float]] = {
        "auroc": m.auroc,
        "recall_at_fpr_01": partial(m.recall_at_fpr, max_fpr=0.01),
        "f1": partial(m.f1, threshold=THRESHOLD),
        "nll": m.nll,
        "brier": m.brier,
        "ece": m.ece,
    }
    result: dict[str, Any] = {name: metric(p, y) for name, metric in metrics.items()}
    result["auroc_interval"] = m.bootstrap_interval(m.auroc, p, y, n=BOOTSTRAPS, seed=seed)
    result["ece_interval"] = m.bootstrap_interval(m.ece, p, y, n=BOOTSTRAPS, seed=seed)
    positives = sum(y)
    for limit in (0.5, 0.9):
        flagged = [float(x >= limit) for x in p]
        result[f"false_positive_rate_at_{limit}"] = sum(f for f, t in zip(flagged, y, strict=True) if not t) / (
            len(y) - positives
        )
        result[f"recall_at_{limit}"] = sum(f for f, t in zip(flagged, y, strict=True) if t) / positives
    result["roc"] = _rounded(m.roc_points(p, y))
    result["pr"] = _rounded(m.pr_points(p, y))
    result["reliability"] = _rounded(m.reliability(p, y))
    return result


def _rounded(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(float(v), 4) for v in point] for point in points]


def latency_ms(read: Callable[[ReadRequest], object], texts: Sequence[ReadRequest]) -> dict[str, float]:
    """Milliseconds per text, one at a time: median and 95th percentile over the first texts, after two to warm up."""
    for text in texts[:2]:
        read(text)
    taken = []
    for text in texts[:_LATENCY_PROMPTS]:
        started = time.perf_counter()
        read(text)
        taken.append(1000 * (time.perf_counter() - started))
    return {"n": len(taken), "median_ms": median(taken), "p95_ms": sorted(taken)[int(0.95 * (len(taken) - 1))]}
