"""The figures that monitors watch, of labelled requests and of a whole store of them, beside the policies' budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hhh_router.calibration import Calibrators
from hhh_router.calibration.drift import Drift, Support
from hhh_router.calibration.monitor import (
    LEVEL,
    Bound,
    Figure,
    calibration_figures,
    error_figures,
    reading_figures,
)
from hhh_router.errors import ReaderError
from hhh_router.policy import Policy
from hhh_router.trace.feedback import Labelled, Remembered


def label_figures(rows: Sequence[Labelled], calibrators: Calibrators, policies: Iterable[Policy]) -> list[Figure]:
    """What labels say: of the calibrators' probabilities, and of both errors of each policy.

    Args:
        rows: Labelled requests.
        calibrators: Those in use; rows under others say nothing about them.
        policies: Whose budgets are the bounds.
    """
    found = calibration_figures(rows, calibrators.id, calibrators.references(), calibrators.evidence)
    return found + error_figures(rows, bounds_of(policies))


def stored_figures(requests: Iterable[Remembered], calibrators: Calibrators) -> list[Figure]:
    """What the readings of a store say without labels, as `reading_figures` does of a server's since its start."""
    drift = {place: Drift(reference) for place, reference in calibrators.references().items()}
    support = {mode: Support() for mode in dict.fromkeys(mode for mode, _ in drift)}
    for request in requests:
        if request.calibration_id != calibrators.id:
            continue
        scores = request.prompt if request.reply is None else request.reply  # as the block tells the latest reading
        if scores is None or scores.mode not in support:
            continue
        try:
            evidence = calibrators.evidence(scores)
        except ReaderError:
            continue  # scores of other heads
        support[scores.mode].add(evidence.in_distribution)
        for kind, heads in (("needs", evidence.needs), ("outcomes", evidence.outcomes)):
            for head, p in heads.items():
                if (watched := drift.get((scores.mode, f"{kind}.{head}"))) is not None:
                    watched.add(p)
    return reading_figures(drift, support)


def bounds_of(policies: Iterable[Policy]) -> list[Bound]:
    """What each policy's budget allows."""
    found = []
    for policy in policies:
        budget, name = policy.budget, f"{policy.name}@{policy.version}"
        most = {} if budget is None else budget.most.get("input", {})
        found.append(
            Bound(
                policy=name,
                sha256=policy.hash,
                benign_refused=most.get("benign_refused"),
                harm_passed=most.get("harm_passed"),
                level=LEVEL if budget is None or budget.level is None else budget.level,
            )
        )
    return found


def bound_text(figure: Figure) -> str:
    """A figure's bound, such as ``≤ 0.05``.

    >>> from hhh_router.calibration.monitor import _mean
    >>> bound_text(_mean("harm_passed", "p@1", [], most=0.05))
    '≤ 0.05'
    """
    if figure.least is not None and figure.most is not None:
        return f"{figure.least:.2f} … {figure.most:.2f}"
    return "none" if figure.most is None else f"≤ {figure.most:.2g}"
