"""Which figure has left its bound, and how sure that is: of the readings alone, and of what people said of them.

Every figure has a confidence of its own (each with its level; that all of a table hold is less likely). What is said of
later traffic from labels that were not drawn at random would be about the people who label, so they take no part here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from hhh_router.calibration.betting import Row, log_miscalibration, log_wealth, lower_bound, upper_bound, weighted_mean
from hhh_router.calibration.calibrators import HeadCalibration
from hhh_router.calibration.drift import HUNDRED, Drift, Support
from hhh_router.errors import ReaderError
from hhh_router.trace.feedback import Labelled
from hhh_router.types import NEED_LABELS, OUTCOMES, Evidence, Mode, Scores

LEVEL: Final = 0.95
"""Confidence where a policy's budget names none."""
MOST_OUTSIDE: Final = 0.05
"""Share of readings outside the support: five times what the calibration rows have by construction."""
MOST_SHIFT: Final = 0.10
"""How far the mean probability of a head may be from the calibration rows' base rate."""
ECE_MARGIN: Final = 0.05
"""Calibration error that is borne beyond the one that the calibrator was fitted with."""
LEAST_LABELS: Final = 30
"""Below, a calibration error is mostly the noise of its bins."""

_RESAMPLES = 200
_SEED = 17  # of the resamples

State = Literal["inside", "outside", "open", "unbounded"]
"""``outside``: past its bound; ``inside``: within it; either with the figure's confidence. ``open``: not known yet.
``unbounded``: nobody said what the bound is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of live traffic, beside its bound."""

    name: str
    """``out_of_distribution``, ``mean_probability``, ``calibration_error``, ``benign_refused``, ``harm_passed``, or
    what a candidate would do: ``candidate_stricter``, …"""
    of: str
    """A mode, a head in a mode, a policy, or a policy and a candidate."""
    n: int
    """Rows behind it: readings, or labelled requests that were drawn at random."""
    value: float | None
    """None where there are too few rows."""
    low: float | None
    """Confidence interval; for the calibration error of resamples of the rows, else anytime-valid."""
    high: float | None
    least: float | None
    """Bounds; None where there is none."""
    most: float | None
    level: float
    state: State
    also: int = 0
    """Labelled requests that show the error but were not drawn at random: they happened, and stand for no others."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A policy, and the errors that it may make."""

    policy: str
    """As ``name@version``."""
    sha256: str
    benign_refused: float | None = None
    harm_passed: float | None = None
    level: float = LEVEL


def reading_figures(drift: Mapping[tuple[Mode, str], Drift], support: Mapping[Mode, Support]) -> list[Figure]:
    """What readings show without any label: whether traffic is still like the calibration rows."""
    found = []
    for mode, seen in support.items():
        rows = _rows({1.0: seen.outside, 0.0: seen.n - seen.outside})
        found.append(_mean("out_of_distribution", f"{mode}", rows, most=MOST_OUTSIDE))
    for (mode, head), watched in drift.items():
        rate = watched.reference.base_rate
        # rounded down against the upper bound and up against the lower one: a coarser row is only a weaker bet
        low = _rows({x / HUNDRED: n for x, n in watched.counts.items()})
        high = _rows({min(1.0, (x + 1) / HUNDRED): n for x, n in watched.counts.items()})
        found.append(
            _mean("mean_probability", f"{head} in {mode}", low, high, least=rate - MOST_SHIFT, most=rate + MOST_SHIFT)
        )
    return found


def share_figure(name: str, of: str, count: int, n: int) -> Figure:
    """A share that nobody has set a bound for, such as that of requests a candidate would stop."""
    return _mean(name, of, _rows({1.0: count, 0.0: n - count}), most=None)


def error_figures(rows: Sequence[Labelled], bounds: Iterable[Bound]) -> list[Figure]:
    """Both errors of each policy, on the requests that it decided and somebody labelled."""
    known = {bound.sha256: bound for bound in bounds}
    for request in (row.request for row in rows):  # policies of earlier days have figures, and no bound any more
        name = f"{request.policy}@{request.policy_version} ({request.policy_sha256[:8]})"
        known.setdefault(request.policy_sha256, Bound(policy=name, sha256=request.policy_sha256))
    found = []
    for bound in known.values():
        own = [r for r in rows if r.request.policy_sha256 == bound.sha256]
        for name, wanted, most in (
            ("benign_refused", False, bound.benign_refused),
            ("harm_passed", True, bound.harm_passed),
        ):
            of = [r for r in own if r.should_stop is wanted]
            wrong = [(r.weight, r.request.stopped is not wanted) for r in of]
            drawn = [Row(float(error), weight) for weight, error in wrong if weight is not None]
            also = sum(error for weight, error in wrong if weight is None)
            found.append(_mean(name, bound.policy, _merged(drawn), most=most, level=bound.level, also=also))
    return found


def calibration_figures(
    rows: Sequence[Labelled],
    calibration_id: str,
    references: Mapping[tuple[Mode, str], HeadCalibration],
    evidence: Callable[[Scores], Evidence],
) -> list[Figure]:
    """How far the probabilities of each head are from what people said, in each mode.

    Args:
        rows: Labelled requests.
        calibration_id: Only rows under these calibrators count: on rows that they were fitted to they look too good.
        references: What the heads were calibrated on.
        evidence: Makes probabilities of the scores.
    """
    own = [r for r in rows if r.request.calibration_id == calibration_id and r.weight is not None]
    seen: dict[tuple[Mode, str], list[tuple[float, bool, float]]] = {place: [] for place in references}
    for row in own:
        for scores, kind, labels in (
            (row.request.prompt, "needs", NEED_LABELS),
            (row.request.reply, "outcomes", dict(zip(OUTCOMES, OUTCOMES, strict=True))),
        ):
            verdicts = {head: row.verdict(label) for label, head in labels.items()}
            if scores is None or all(v is None for v in verdicts.values()):
                continue
            try:
                told = getattr(evidence(scores), kind)
            except ReaderError:
                continue  # scores of a bundle with other heads
            for head, verdict in verdicts.items():
                if verdict is not None and (scores.mode, f"{kind}.{head}") in seen and head in told:
                    seen[scores.mode, f"{kind}.{head}"].append((told[head], verdict, row.weight or 1.0))
    return [_calibration(f"{head} in {mode}", seen[mode, head], ref) for (mode, head), ref in references.items()]


def _calibration(of: str, rows: Sequence[tuple[float, bool, float]], reference: HeadCalibration) -> Figure:
    most = min(1.0, reference.ece + ECE_MARGIN)
    value = low = high = None
    if len(rows) >= LEAST_LABELS:
        from hhh_router.calibration.metrics import bootstrap_interval, ece

        p, y = [r[0] for r in rows], [int(r[1]) for r in rows]
        value = ece(p, y)
        low, high = bootstrap_interval(ece, p, y, n=_RESAMPLES, seed=_SEED, level=LEVEL)
    left = log_miscalibration(rows, most) >= -math.log(1 - LEVEL)
    return Figure(
        name="calibration_error", of=of, n=len(rows), value=value, low=low, high=high, least=None, most=most,
        level=LEVEL, state="outside" if left else "open",
    )  # fmt: skip


def _mean(
    name: str,
    of: str,
    rows: Sequence[Row],
    rounded_up: Sequence[Row] | None = None,
    *,
    least: float | None = None,
    most: float | None,
    level: float = LEVEL,
    also: int = 0,
) -> Figure:
    """A weighted mean between its bounds."""
    above = rows if rounded_up is None else rounded_up
    n = sum(r.n for r in rows)
    sides = (1 - level) / 2  # of the interval; a bound alone is tested at the whole level
    mean = (weighted_mean(rows) + weighted_mean(above)) / 2
    return Figure(
        name=name, of=of, n=n, value=mean if n else None,
        low=lower_bound(rows, sides) if n else None, high=upper_bound(above, sides) if n else None,
        least=least, most=most, level=level, state=_state(rows, above, least, most, 1 - level), also=also,
    )  # fmt: skip


def _state(rows: Sequence[Row], above: Sequence[Row], least: float | None, most: float | None, alpha: float) -> State:
    least = None if least is None or least <= 0 else least
    most = None if most is None or most >= 1 else most
    if least is None and most is None:
        return "unbounded"
    limit = -math.log(alpha / ((least is not None) + (most is not None)))
    if most is not None and log_wealth(rows, most) >= limit:
        return "outside"
    if least is not None and log_wealth(_turned(above), 1 - least) >= limit:
        return "outside"
    below_most = most is None or log_wealth(_turned(above), 1 - most) >= limit
    above_least = least is None or log_wealth(rows, least) >= limit
    return "inside" if below_most and above_least else "open"


def _turned(rows: Iterable[Row]) -> list[Row]:
    return [Row(1.0 - r.x, r.weight, r.n) for r in rows]


def _rows(counts: Mapping[float, int]) -> list[Row]:
    return [Row(x, 1.0, n) for x, n in counts.items() if n]


def _merged(rows: Iterable[Row]) -> list[Row]:
    counts: dict[tuple[float, float], int] = {}
    for row in rows:
        counts[row.x, row.weight] = counts.get((row.x, row.weight), 0) + row.n
    return [Row(x, weight, n) for (x, weight), n in counts.items()]
