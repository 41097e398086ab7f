"""Figures of merit for probabilities, rankings and abstention. Needs numpy.

Shapes: every array is one-dimensional with one entry per row. Labels are 0 or 1. Probabilities lie in [0, 1]; scores
are any finite numbers that rise with P(label = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hhh_router.errors import DataError

ECE_BINS = 15  # as Guo et al. 2017, table 1; ours are equal-mass, which leaves no bin empty or tiny
_ROWS_PER_BIN = 20  # below, a subgroup's error is mostly the noise of its bins' frequencies
_CLIP = 1e-12  # a probability of exactly 0 or 1 that is wrong costs 27.6 nats, not infinity

Floats = NDArray[np.float64]
_Group = TypeVar("_Group", bound=Hashable)


def nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative log-likelihood, in nats; 0 is perfect, ln 2 is a coin.

    >>> round(nll([0.5, 0.5], [0, 1]), 6)
    0.693147

    Source: the logarithmic score of Good 1952.
    """
    return float(np.mean(nll_per_row(probabilities, labels)))


def nll_per_row(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """Negative log-likelihood of each row, in nats."""
    p, y = _pair(probabilities, labels, unit=True)
    p = np.clip(p, _CLIP, 1 - _CLIP)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared error of the probability of label 1; 0 is perfect, 0.25 is a coin.

    >>> brier([1.0, 0.8], [1, 0])
    0.32000000000000006

    Source: Brier 1950, in the binary form (half of his sum over two classes).
    """
    p, y = _pair(probabilities, labels, unit=True)
    return float(np.mean((p - y) ** 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Rows with similar probabilities."""

    n: int
    """Rows in the bin."""
    probability: float
    """Their mean probability."""
    frequency: float
    """Share of them labelled 1."""


def reliability_table(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS) -> list[ReliabilityBin]:
    """Rows sorted by probability and cut into at most ``bins`` parts of equal size.

    Equal probabilities always share a bin (a cut between them would depend on the order of the rows), so there are
    fewer bins where many are equal.

    >>> [(b.n, b.probability, b.frequency) for b in reliability_table([0.2, 0.2, 0.6, 0.6], [0, 0, 1, 0], bins=2)]
    [(2, 0.2, 0.0), (2, 0.6, 0.5)]
    """
    p, y = _pair(probabilities, labels, unit=True)
    ordered = np.sort(p)
    cuts = np.unique(ordered[[len(p) * k // bins for k in range(1, bins)]])
    which = np.searchsorted(cuts, p, side="right")
    return [
        ReliabilityBin(n=int(rows.sum()), probability=float(p[rows].mean()), frequency=float(y[rows].mean()))
        for rows in (which == b for b in range(len(cuts) + 1))
        if rows.any()
    ]


def ece(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean over rows of |frequency − mean probability| of the row's bin, in [0, 1].

    Biased upwards on few rows (about √(p(1−p)·bins/n)), so read it beside NLL and Brier, never alone.

    >>> round(ece([0.2, 0.2, 0.6, 0.6], [0, 0, 1, 0], bins=2), 6)
    0.15

    Source: Guo et al. 2017, eq. 3; equal-mass bins as in Nixon et al. 2019.
    """
    table = reliability_table(probabilities, labels, bins=bins)
    return sum(b.n * abs(b.frequency - b.probability) for b in table) / sum(b.n for b in table)


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS) -> list[tuple[float, float, int]]:
    """`reliability_table` as (mean probability, frequency, rows) per bin, to draw.

    >>> reliability([0.2, 0.2, 0.6, 0.6], [0, 0, 1, 0], bins=2)
    [(0.2, 0.0, 2), (0.6, 0.5, 2)]
    """
    return [(b.probability, b.frequency, b.n) for b in reliability_table(probabilities, labels, bins=bins)]


def subgroup_ece(
    probabilities: ArrayLike, labels: ArrayLike, groups: Sequence[_Group], *, least: int = 40
) -> dict[_Group, tuple[int, float]]:
    """Rows and calibration error of every group by itself: a small error over all rows can hide bad groups.

    A group of fewer than 300 rows is cut into fewer than 15 bins, so that each holds about 20: with 15, the error of a
    perfect forecaster on 40 rows would be near 0.2, and the order of the groups that of their sizes. Small groups
    still read too high, so compare groups of about one size.

    Args:
        probabilities: Of label 1, shape (n,).
        labels: 0 or 1, shape (n,).
        groups: The name of each row's group, length n.
        least: Groups with fewer rows are left out.

    Returns:
        Group → (rows, ECE), in the order in which the groups first appear.

    >>> subgroup_ece([0.9, 0.9, 0.1], [1, 0, 0], ["chat", "chat", "mail"], least=2)
    {'chat': (2, 0.4)}

    Raises:
        DataError: Columns differ in length.
    """
    p, y = _pair(probabilities, labels, unit=True)
    if len(groups) != len(p):
        raise DataError(f"{len(groups)} groups for {len(p)} rows", hint="pass one group a row")
    rows_of: dict[_Group, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    return {
        group: (len(rows), ece(p[rows], y[rows], bins=min(ECE_BINS, max(1, len(rows) // _ROWS_PER_BIN))))
        for group, rows in rows_of.items()
        if len(rows) >= least
    }


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """P(a random positive scores above a random negative), ties counting half; 0.5 is no skill.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75

    Source: Mann–Whitney U over mid-ranks, Hanley & McNeil 1982.

    Raises:
        DataError: Only one class.
    """
    s, y = _pair(scores, labels)
    positives, negatives = _classes(y)
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(counts) - (counts - 1) / 2  # ranks count from 1
    return float((mid_rank[place][y == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def roc_points(scores: ArrayLike, labels: ArrayLike, points: int = 100) -> list[tuple[float, float]]:
    """The ROC curve as (false positive rate, true positive rate), from (0, 0) to (1, 1), to draw.

    One point for every rule ``score >= t``, rows of equal score together; of these at most ``points``, both ends
    among them, spread evenly along the curve.

    >>> roc_points([0.9, 0.8, 0.7], [1, 0, 1])
    [(0.0, 0.0), (0.0, 0.5), (1.0, 0.5), (1.0, 1.0)]

    Source: Fawcett 2006, algorithm 1.

    Raises:
        DataError: Only one class.
        ValueError: Fewer than two points.
    """
    s, y = _pair(scores, labels)
    positives, negatives = _classes(y)
    found, flagged = _flagged_from_the_top(s, y)
    return _drawn(np.r_[0.0, flagged / negatives], np.r_[0.0, found / positives], points)


def pr_points(scores: ArrayLike, labels: ArrayLike, points: int = 100) -> list[tuple[float, float]]:
    """The precision–recall curve as (recall, precision), to draw.

    From the rows of the highest score (with nothing flagged there is no precision) to all rows, where the precision
    is the share of positives. Thinned as in `roc_points`. Do not join the points by straight lines to take an area:
    precision between two of them is no linear mix (Davis & Goadrich 2006).

    >>> pr_points([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0])
    [(0.5, 1.0), (0.5, 0.5), (1.0, 0.6666666666666666), (1.0, 0.5)]

    Raises:
        DataError: Only one class.
        ValueError: Fewer than two points.
    """
    s, y = _pair(scores, labels)
    positives, _ = _classes(y)
    found, flagged = _flagged_from_the_top(s, y)
    return _drawn(found / positives, found / (found + flagged), points)


def thin(x: ArrayLike, y: ArrayLike, points: int) -> NDArray[np.int64]:
    """The places of at most ``points`` of a curve's points: both ends, the others near equal steps along the curve.

    Args:
        x: Abscissae in the curve's order, shape (n,), n >= 1; the unit of both axes counts alike.
        y: Ordinates, shape (n,).
        points: >= 2.

    >>> thin([0.0, 0.01, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0], points=3).tolist()
    [0, 2, 3]

    Raises:
        ValueError: Fewer than two points.
    """
    if points < 2:
        raise ValueError(f"a curve has two ends; points must be >= 2, found {points}")
    n = len(np.asarray(x))
    if n <= points:
        return np.arange(n)
    along = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    inner = np.searchsorted(along, np.linspace(0.0, along[-1], points)[1:-1])
    return np.unique(np.r_[0, inner, n - 1])


def recall_at_fpr(scores: ArrayLike, labels: ArrayLike, max_fpr: float = 0.01) -> float:
    """Largest share of positives found by a rule ``score >= t`` that flags at most ``max_fpr`` of the negatives.

    >>> recall_at_fpr([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0], max_fpr=0.0)
    0.5

    Raises:
        DataError: Only one class.
    """
    s, y = _pair(scores, labels)
    positives, negatives = _classes(y)
    found, flagged = _flagged_from_the_top(s, y)
    allowed = flagged <= max_fpr * negatives + 1e-9  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is below 29
    return float(found[allowed].max(initial=0.0) / positives)


def f1(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Harmonic mean of precision and recall of the rule ``score >= threshold``; 0 where nothing is found.

    >>> f1([0.9, 0.8, 0.2], [1, 0, 1], threshold=0.5)
    0.5

    Source: van Rijsbergen 1979, with equal weight of both.

    Raises:
        DataError: No row is labelled 1.
    """
    s, y = _pair(scores, labels)
    if not y.any():
        raise DataError("F1 needs rows labelled 1; found none", hint="add positives, or report another figure")
    flagged = s >= threshold
    return float(2 * (flagged * y).sum() / (flagged.sum() + y.sum()))


def over_refusal(refused: ArrayLike, benign: ArrayLike) -> float:
    """Share of benign requests that were refused.

    >>> over_refusal([1, 0, 1, 0], [1, 1, 0, 0])
    0.5

    Source: Röttger et al. 2024 (XSTest), full refusals of safe prompts.

    Raises:
        DataError: No row is benign.
    """
    r, b = _pair(refused, benign)
    if not b.any():
        raise DataError("over-refusal needs benign rows; found none", hint="add benign rows")
    return float(r[b == 1].mean())


def aurc(confidences: ArrayLike, right: ArrayLike) -> float:
    """Area under the risk–coverage curve: mean error rate over all ways to keep only the k most confident rows.

    0 is perfect. Rows of equal confidence enter together, each with the group's error rate, so that the order of
    the rows does not matter.

    >>> round(aurc([0.9, 0.8, 0.7], [1, 1, 0]), 6)
    0.111111

    Source: Geifman et al. 2019; the mean over coverages 1/n … 1.
    """
    c, y = _pair(confidences, right)
    _, place, counts = np.unique(-c, return_inverse=True, return_counts=True)
    group_error = np.bincount(place, weights=1 - y) / counts
    errors = np.repeat(group_error, counts).cumsum()
    return float(np.mean(errors / np.arange(1, len(c) + 1)))


def risk_coverage_points(confidences: ArrayLike, right: ArrayLike, points: int = 100) -> list[tuple[float, float]]:
    """The risk–coverage curve as (coverage, risk), to draw: error rate of the rows kept when the most confident are.

    From the rows of the highest confidence to all rows, rows of equal confidence together. Thinned as in `roc_points`.

    >>> risk_coverage_points([0.9, 0.8, 0.7, 0.7], [1, 0, 1, 1])
    [(0.25, 0.0), (0.5, 0.5), (1.0, 0.25)]

    Source: El-Yaniv & Wiener 2010.

    Raises:
        DataError: No rows, or columns that do not pair.
        ValueError: Fewer than two points.
    """
    c, y = _pair(confidences, right)
    _, place, counts = np.unique(-c, return_inverse=True, return_counts=True)
    kept = counts.cumsum()
    wrong = np.bincount(place, weights=1 - y).cumsum()
    return _drawn(kept / len(c), wrong / kept, points)


def bootstrap_interval(
    metric: Callable[..., float], *arrays: ArrayLike, n: int = 1000, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a metric over ``n`` resamples of the rows, drawn with replacement.

    Args:
        metric: Takes the arrays, returns a number; a resample on which it raises `DataError` (such as one with a
            single class) is left out.
        arrays: Of equal length, resampled together.
        n: Resamples.
        seed: Same seed, same interval.
        level: Coverage, in (0, 1).

    Returns:
        (low, high), the (1 ± level) / 2 quantiles.

    Source: Efron & Tibshirani 1993, section 13.3.

    Raises:
        DataError: Lengths differ, no rows, or more than half of the resamples have no value.
    """
    columns = [np.asarray(a) for a in arrays]
    rows = len(columns[0]) if columns else 0
    if not rows or any(len(c) != rows for c in columns):
        raise DataError(
            f"bootstrap needs arrays of one length above 0; found {[len(c) for c in columns]}",
            hint="pass paired columns",
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n):
        chosen = rng.integers(0, rows, rows)
        try:
            values.append(metric(*(c[chosen] for c in columns)))
        except DataError:
            continue
    if len(values) * 2 < n:
        raise DataError(
            f"bootstrap: the metric has a value on only {len(values)} of {n} resamples of {rows} rows",
            hint="the rarer class has too few rows",
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pair(values: ArrayLike, labels: ArrayLike, *, unit: bool = False) -> tuple[Floats, Floats]:
    x = np.asarray(values, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise DataError(
            f"expected two columns of one length above 0; found shapes {x.shape} and {y.shape}",
            hint="pass paired columns",
        )
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x))[0])
        raise DataError(f"row {row}: value is {x[row]}", hint="drop or repair rows whose values are not finite")
    if not np.isin(y, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(y, (0.0, 1.0)))[0])
        raise DataError(f"row {row}: label is {y[row]:g}", hint="labels are 0 or 1")
    if unit and (x.min() < 0 or x.max() > 1):
        row = int(np.flatnonzero((x < 0) | (x > 1))[0])
        raise DataError(f"row {row}: probability is {x[row]:g}", hint="pass probabilities, not logits")
    return x, y


def _classes(labels: Floats) -> tuple[int, int]:
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        found = "1" if positives else "0"
        raise DataError(
            f"all {len(labels)} labels are {found}", hint="a ranking figure needs both classes; add rows of the other"
        )
    return positives, negatives


def _flagged_from_the_top(scores: Floats, labels: Floats) -> tuple[Floats, Floats]:
    """Positives and negatives at or above each distinct score, the highest score first."""
    _, place = np.unique(scores, return_inverse=True)
    found = np.bincount(place, weights=labels)[::-1].cumsum()
    flagged = np.bincount(place, weights=1 - labels)[::-1].cumsum()
    return found, flagged


def _drawn(x: Floats, y: Floats, points: int) -> list[tuple[float, float]]:
    chosen = thin(x, y, points)
    return list(zip(x[chosen].tolist(), y[chosen].tolist(), strict=True))


def standard_error(values: ArrayLike) -> float:
    """Standard error of a mean over independent rows; 0 for a single row.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    x = np.asarray(values, dtype=np.float64)
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
