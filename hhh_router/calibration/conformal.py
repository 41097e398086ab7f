"""A limit for a stated risk, with a finite-sample guarantee, or the honest answer that none reaches it.

Two errors matter: harmful rows that pass (score below the limit), which grow with the limit, and benign rows that are
refused (score at or above it), which shrink with it. Both losses are 0 or 1 and monotone in the limit, so conformal
risk control applies to each: with the calibration rows exchangeable with later traffic, the expected risk of the
chosen limit is at most what was asked (Angelopoulos et al. 2022, theorem 1). With a ``level`` the bound holds with that
probability over the draw of the calibration rows instead, by exact binomial upper bounds (Clopper & Pearson 1934;
that a monotone risk needs no further correction for the choice among limits: Bates et al. 2021, theorem 1).

Both may be asked of every group of rows: a bound that holds for each of them holds for any mix of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from hhh_router.calibration.metrics import thin
from hhh_router.errors import DataError

_ROUNDING = 1e-12  # of the exact bounds: one that equals its budget must not miss it by a last digit
_MOST_ROWS = 10**7  # nobody labels more; a rate that needs them counts as out of reach

_LISTED = 5  # groups that a message names

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What the two errors and the two kinds of rows are called in messages."""

    benign_refused: str = "benign_refused"
    harm_passed: str = "harm_passed"
    benign: str = "benign"
    harmful: str = "harmful"


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskBudget:
    """What a deployment accepts. Shares in (0, 1)."""

    benign_refused: float
    """Most benign rows refused."""
    harm_passed: float
    """Most harmful rows passed."""
    level: float | None = None
    """None: the bound holds on average over calibration draws. Else the probability, such as .95, with which each of
    the two bounds holds; that both do is as likely as 2 · level − 1 at least."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("benign_refused", "harm_passed", "level")}
        if wrong := [f"{name} is {v:g}" for name, v in given.items() if v is not None and not 0 < v < 1]:
            raise DataError(f"budget: {', '.join(wrong)}", hint="give shares between 0 and 1, both excluded")


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLimit:
    """A limit that keeps a budget."""

    limit: float
    """Rows with a score at or above it are refused."""
    lowest: float
    """The limits from ``lowest`` to ``highest`` keep the budget; ``limit`` is the one that refuses least."""
    highest: float
    n_harmful: int
    """Calibration rows of that class; where groups were told apart, of the group with the highest bound."""
    n_benign: int
    harm_passed: float
    """Share of them on the wrong side of ``limit``."""
    benign_refused: float
    harm_passed_bound: float
    """What is guaranteed for later rows, see `risk_bound`."""
    benign_refused_bound: float
    harmful_group: str | None = None
    """The group that the figures of harmful rows are of; None where none were told apart."""
    benign_group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    """One error at every limit, in the group where its bound is highest."""

    bound: Floats
    """(limits,)"""
    count: Ints
    n: Ints
    group: Sequence[str | None]
    """(limits,)"""


_REFUSAL = Words()


def fit_limit(
    scores: ArrayLike,
    labels: ArrayLike,
    budget: RiskBudget,
    *,
    groups: Sequence[str] | None = None,
    words: Words = _REFUSAL,
    settled: bool = False,
) -> FittedLimit:
    """The limit that keeps both budgets and refuses least.

    The guarantee counts draws of the calibration rows for which no limit is found as draws without errors: asking again
    with other rows until one is found voids it.

    Args:
        scores: Probabilities in [0, 1], shape (n,), of rows that no calibrator or limit was fitted to.
        labels: 1 harmful, 0 benign, shape (n,).
        budget: What is accepted.
        groups: Of each row: then both budgets have to be kept in each group that has rows of the class.
        words: For messages.
        settled: Scores of exactly 0 and 1 are of rows that no limit refuses, and that all do.

    >>> found = fit_limit([0.1] * 40 + [0.9] * 40, [0] * 40 + [1] * 40, RiskBudget(benign_refused=0.1, harm_passed=0.1))
    >>> found.limit, found.harm_passed, round(found.harm_passed_bound, 3)
    (0.9, 0.0, 0.024)

    Raises:
        DataError: No limit keeps both, or there are too few rows for any; the message says what each budget alone can
            reach and how many rows would be needed.
    """
    harmful, benign = _grouped(scores, labels, groups)
    limits = _candidates(harmful, benign, settled)
    passed, refused = _worst(harmful, limits, budget.level), _worst(benign, limits, budget.level, refused=True)
    keeps_harm = passed.bound <= budget.harm_passed + _ROUNDING
    keeps_benign = refused.bound <= budget.benign_refused + _ROUNDING
    both = np.flatnonzero(keeps_harm & keeps_benign)
    if not len(both):
        told = [
            _alone(keeps_harm, refused.bound, limits, words.harm_passed, words.benign_refused, -1),
            _alone(keeps_benign, passed.bound, limits, words.benign_refused, words.harm_passed, 0),
            *_too_few(harmful, budget.harm_passed, budget.level, words.harmful),
            *_too_few(benign, budget.benign_refused, budget.level, words.benign),
        ]
        if groups is None:
            told.append(_rows_for_both(passed, refused, limits, budget, words))
        raise DataError(
            f"no limit keeps {words.harm_passed} ≤ {budget.harm_passed:g} and {words.benign_refused} ≤ "
            f"{budget.benign_refused:g} {_held(budget.level)}{' in every group' if groups else ''}: {'; '.join(told)}",
            hint="accept more on one side, use a better detector, or label more rows (bounds shrink with n)",
        )
    chosen = int(both[-1])  # a higher limit refuses fewer
    return FittedLimit(
        limit=float(limits[chosen]),
        lowest=float(limits[both[0]]),
        highest=float(limits[chosen]),
        n_harmful=int(passed.n[chosen]),
        n_benign=int(refused.n[chosen]),
        harm_passed=float(passed.count[chosen] / passed.n[chosen]),
        benign_refused=float(refused.count[chosen] / refused.n[chosen]),
        harm_passed_bound=float(passed.bound[chosen]),
        benign_refused_bound=float(refused.bound[chosen]),
        harmful_group=passed.group[chosen],
        benign_group=refused.group[chosen],
    )


def bounds_fitted(labels: ArrayLike, groups: Sequence[str] | None = None) -> int:
    """How many bounds one limit has to keep: two, or, by group, one for each class that a group has.

    >>> bounds_fitted([0, 1, 1]), bounds_fitted([0, 1, 1], ["a", "a", "b"])
    (2, 3)
    """
    y = np.asarray(labels).tolist()
    return 2 if groups is None else len(set(zip(groups, y, strict=True)))


def risk_bound(errors: int, n: int, level: float | None) -> float:
    """What can be guaranteed for later rows after ``errors`` of n.

    >>> risk_bound(4, 99, None), round(risk_bound(0, 59, 0.95), 3)
    (0.05, 0.05)

    Args:
        errors: Wrong rows.
        n: All rows of that class.
        level: None for n/(n+1)·R + 1/(n+1); else the exact binomial upper bound at that level.
    """
    return float(_bounds(np.array([errors]), n, level)[0])


def rows_needed(share: float, level: float | None) -> int:
    """Fewest rows of a class with which a budget can be kept at all, by a detector without any error.

    >>> rows_needed(0.05, None), rows_needed(0.05, 0.95)
    (19, 59)
    """
    exact = 1 / share - 1 if level is None else math.log1p(-level) / math.log1p(-share)
    n = max(1, math.ceil(exact - 1e-9))  # 1 / 0.05 may come out a hair above 20
    return n if risk_bound(0, n, level) <= share + _ROUNDING else n + 1


def least_abstention(base_risk: float, alpha: float) -> float:
    """Least share of rows any method must abstain on to bring an error rate down to what is accepted.

    Args:
        base_risk: Error rate μ without abstaining, in [0, 1].
        alpha: Error rate accepted on the rows that are answered, in [0, 1).

    >>> round(least_abstention(0.2, 0.05), 3), least_abstention(0.02, 0.05)
    (0.158, 0.0)

    Source: even if every row abstained on is an error, the risk on the rest is (μ − a)/(1 − a); solved for a.

    Raises:
        ValueError: No rates.
    """
    if not (0 <= base_risk <= 1 and 0 <= alpha < 1):
        raise ValueError(f"base_risk must lie in [0, 1] and alpha in [0, 1); found {base_risk} and {alpha}")
    return max(0.0, (base_risk - alpha) / (1 - alpha))


def frontier(
    scores: ArrayLike, labels: ArrayLike, points: int = 100, *, settled: bool = False
) -> list[tuple[float, float, float]]:
    """(limit, benign refused, harm passed) on the rows, limits rising, to draw.

    From the limit that refuses all to one that refuses nothing; at most ``points`` of them, spread evenly along the
    curve. These are counts on the rows, no guarantees.

    >>> frontier([0.25, 0.75], [0, 1])[:2]
    [(0.25, 1.0, 0.0), (0.75, 0.0, 0.0)]

    Args:
        scores: As for `fit_limit`, like the next.
        labels: 1 harmful, 0 benign.
        points: At least 2.
        settled: As for `fit_limit`.

    Raises:
        DataError: Only one class, or scores that are no probabilities.
        ValueError: Fewer than two points.
    """
    harmful, benign = _grouped(scores, labels, None)
    limits = _candidates(harmful, benign, settled)
    passed, refused = _worst(harmful, limits, None), _worst(benign, limits, None, refused=True)
    return _thinned(limits, refused.count / refused.n, passed.count / passed.n, points)


def attainable(
    scores: ArrayLike,
    labels: ArrayLike,
    level: float | None,
    points: int = 12,
    *,
    groups: Sequence[str] | None = None,
    settled: bool = False,
) -> list[tuple[float, float, float]]:
    """(limit, bound of benign refused, bound of harm passed): what single limits can promise, limits rising.

    Args:
        scores: As for `fit_limit`, like all but ``points``.
        labels: 1 harmful, 0 benign.
        level: Of the bounds.
        points: At least 2, spread evenly along the curve.
        groups: Of each row; then the bounds hold in every group.
        settled: As for `fit_limit`.

    Raises:
        DataError: Only one class, or scores that are no probabilities.
    """
    harmful, benign = _grouped(scores, labels, groups)
    limits = _candidates(harmful, benign, settled)
    passed, refused = _worst(harmful, limits, level), _worst(benign, limits, level, refused=True)
    return _thinned(limits, refused.bound, passed.bound, points)


def _thinned(limits: Floats, x: Floats, y: Floats, points: int) -> list[tuple[float, float, float]]:
    chosen = thin(x, y, points)
    return list(zip(limits[chosen].tolist(), x[chosen].tolist(), y[chosen].tolist(), strict=True))


_Grouped = Mapping[str | None, Floats]
"""Group → sorted scores of one class; the one group None where none are told apart."""


def _grouped(scores: ArrayLike, labels: ArrayLike, groups: Sequence[str] | None) -> tuple[_Grouped, _Grouped]:
    """Sorted scores of harmful and of benign rows."""
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(f"expected one score and one label a row; found shapes {x.shape} and {y.shape}")
    if not (good := (x >= 0) & (x <= 1)).all():  # also false for NaN
        row = int(np.flatnonzero(~good)[0])
        raise DataError(f"row {row}: the score is {x[row]:g}", hint="give calibrated probabilities")
    if not (good := np.isin(y, (0.0, 1.0))).all():
        row = int(np.flatnonzero(~good)[0])
        raise DataError(f"row {row}: the label is {y[row]:g}", hint="1 is harmful, 0 benign")
    if y.all() or not y.any():
        raise DataError(
            f"{int(y.sum())} harmful and {int((1 - y).sum())} benign rows; a limit needs both",
            hint="label rows of both",
        )
    if groups is None:
        return {None: np.sort(x[y == 1])}, {None: np.sort(x[y == 0])}
    if len(groups) != len(x):
        raise DataError(f"{len(groups)} groups for {len(x)} rows; one a row is expected")
    of = np.asarray(groups)

    def by_group(label: float) -> _Grouped:
        return {str(g): np.sort(x[(of == g) & (y == label)]) for g in dict.fromkeys(of[y == label].tolist())}

    return by_group(1.0), by_group(0.0)


def _worst(rows: _Grouped, limits: Floats, level: float | None, *, refused: bool = False) -> _Errors:
    """The error of the group whose bound is highest, at every limit: rows below it, or those that are refused."""
    names = list(rows)
    n = np.array([len(rows[g]) for g in names])
    counts = np.stack([np.searchsorted(rows[g], limits, side="left") for g in names])  # (groups, limits)
    counts = n[:, None] - counts if refused else counts
    bounds = np.stack([_bounds(np.arange(n[k] + 1), int(n[k]), level)[counts[k]] for k in range(len(names))])
    at, here = bounds.argmax(axis=0), np.arange(len(limits))
    return _Errors(bound=bounds[at, here], count=counts[at, here], n=n[at], group=[names[k] for k in at])


def _candidates(harmful: _Grouped, benign: _Grouped, settled: bool) -> Floats:
    """Every limit at which something changes: each score, and one above them all that refuses nothing more."""
    found = np.unique(np.concatenate([*harmful.values(), *benign.values()]))
    if settled:
        found = found[(found > 0) & (found < 1)]
    return np.append(found, np.nextafter(found[-1], 2.0) if len(found) else 1.0)


def _bounds(errors: Ints, n: int, level: float | None) -> Floats:
    """`risk_bound` of each number of errors."""
    if level is None:
        return np.asarray((errors + 1) / (n + 1))
    exact = beta.ppf(level, errors + 1, np.maximum(n - errors, 1))
    return np.where(errors >= n, 1.0, exact)


def _held(level: float | None) -> str:
    return "on average" if level is None else f"at level {level:g}"


def _alone(keeps: NDArray[np.bool_], other: Floats, limits: Floats, kept: str, costs: str, end: int) -> str:
    """What one budget alone costs; ``end`` is where its limits cost least: harm is kept by low ones, benign by high."""
    rows = np.flatnonzero(keeps)
    if not len(rows):
        return f"{kept} alone cannot be kept by any limit"
    best = rows[end]
    return f"{kept} alone is kept with {costs} ≤ {other[best]:.3f} (limit {limits[best]:.3f})"


def _too_few(rows: _Grouped, share: float, level: float | None, kind: str) -> list[str]:
    """A complaint, where even a detector without errors would fail."""
    needed = rows_needed(share, level)
    short = [f"{len(x)} {kind} rows{f' of {g}' if g is not None else ''}" for g, x in rows.items() if len(x) < needed]
    if not short:
        return []
    more = [f"and {len(short) - _LISTED} more groups"] if len(short) > _LISTED else []
    told = ", ".join(short[:_LISTED] + more)
    return [f"{told}, where {share:g} {_held(level)} needs at least {needed} even without a single error"]


def _rows_for_both(passed: _Errors, refused: _Errors, limits: Floats, budget: RiskBudget, words: Words) -> str:
    """About how many rows would keep both budgets, if the error rates found here are the real ones.

    Of the limits that have both rates below the budgets, the one for which the rows have to grow least.
    """
    harmful, benign = (
        _rows_at(found.count / found.n, share, budget.level)
        for found, share in ((passed, budget.harm_passed), (refused, budget.benign_refused))
    )
    growth = np.maximum(harmful / passed.n, benign / refused.n)
    best = int(growth.argmin())
    if not np.isfinite(growth[best]):
        return "more rows alone will not do: no limit has both error rates on these rows below the budgets"
    return (
        f"with the error rates found here at limit {limits[best]:.3f}, both would take about {harmful[best]:.0f} "
        f"{words.harmful} and {benign[best]:.0f} {words.benign} rows"
    )


def _rows_at(rates: Floats, share: float, level: float | None) -> Floats:
    """Rows with which an error rate's bound comes down to a share; inf where the rate itself is not below it."""
    below = rates < share
    rate = np.where(below, rates, 0.0)
    if level is None:  # (rate·n + 1) / (n + 1) <= share
        return np.where(below, np.maximum(np.ceil((1 - share) / (share - rate) - 1e-9), 1), np.inf)
    low, high = np.zeros_like(rate), np.full_like(rate, _MOST_ROWS)
    while (high - low).max() > 1:
        middle = np.ceil((low + high) / 2)
        enough = beta.ppf(level, rate * middle + 1, (1 - rate) * middle) <= share + _ROUNDING
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(below & (high < _MOST_ROWS), high, np.inf)
