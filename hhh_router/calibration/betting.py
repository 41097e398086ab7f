"""Has a mean left its bound? A test that may be looked at after every row, and as often as one likes.

A rate is watched without an end, so a test with a fixed number of rows does not do: looked at often enough, it rejects
anything. Here a gambler bets against the claim "the mean is at most m", row by row, with a game that is fair or worse
under the claim. What a stake of 1 has grown to is then a non-negative supermartingale under the claim, and by Ville's
inequality it ever reaches 1/α with probability α at most, whenever one looks (Waudby-Smith & Ramdas 2024, betting
confidence sequences). Beside an exact binomial bound with alpha spent over the looks this needs no schedule of looks,
and it holds for weighted rows, which are no counts of anything.

The claim is about every row given those before it, so rows need not be independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

BETS: Final = tuple(0.9 * 0.65**k for k in range(16))
"""Shares of the stake that are bet on every row, from .9 down to .0014. The gambler splits the stake among them once:
a mixture needs no guess of how large the error is, and costs a factor 16 of stake (2.8 nats) at the very most."""
_TURNS: Final = (0.0, 0.1, 0.25, 0.5, 0.75)
_STEPS = 40  # of bisection: 2⁻⁴⁰ is below anything that is shown


@dataclass(frozen=True, slots=True)
class Row:
    """Rows that are alike."""

    x: float
    """Value, in [0, 1]."""
    weight: float = 1.0
    """How many of the population each stands for, > 0."""
    n: int = 1
    """How many."""


def log_wealth(rows: Sequence[Row], m: float) -> float:
    """What is against "the weighted mean is at most m": ln of what a stake of 1 has grown to.

    The weighted mean is E[w·x] / E[w]; under the claim E[w·(x − m)] ≤ 0, so with s = w over the largest w and a bet c
    each factor 1 + c·s·(x/m − 1) has mean at most 1, and none is below 1 − c.

    Args:
        rows: What was seen, in any order: the bets do not depend on it.
        m: The bound, in (0, 1].

    >>> round(log_wealth([Row(1.0, n=5), Row(0.0, n=20)], 0.05), 2)
    2.04
    """
    top = max((r.weight for r in rows), default=1.0)
    logs = [sum(r.n * math.log1p(c * (r.weight / top) * (r.x / m - 1)) for r in rows) for c in BETS]
    return log_mean_exp(logs)


def log_mean_exp(logs: Sequence[float]) -> float:
    """ln of the mean of exponentials, without overflow."""
    top = max(logs)
    return top + math.log(math.fsum(math.exp(x - top) for x in logs) / len(logs))


def lower_bound(rows: Sequence[Row], alpha: float) -> float:
    """What the weighted mean is at least, whenever one looks, with probability 1 − α; 0 where nothing is known.

    >>> round(lower_bound([Row(1.0, n=5), Row(0.0, n=20)], 0.05), 3)
    0.038
    """
    if not rows:
        return 0.0
    low, high = 0.0, 1.0
    limit = -math.log(alpha)
    for _ in range(_STEPS):  # the wealth falls as m rises: every factor does
        middle = (low + high) / 2
        if log_wealth(rows, middle) >= limit:
            low = middle
        else:
            high = middle
    return low


def upper_bound(rows: Sequence[Row], alpha: float) -> float:
    """What the weighted mean is at most, as `lower_bound`; 1 where nothing is known."""
    return 1.0 - lower_bound([Row(1.0 - r.x, r.weight, r.n) for r in rows], alpha)


def weighted_mean(rows: Iterable[Row]) -> float:
    """Σ w·x / Σ w: with w = 1 / P(drawn), what the population's mean is estimated to be; NaN without rows.

    >>> weighted_mean([Row(1.0, weight=1.0), Row(0.0, weight=3.0)])
    0.25

    Source: Hájek 1971; the numerator alone is Horvitz & Thompson 1952.
    """
    found = list(rows)
    total = math.fsum(r.n * r.weight for r in found)
    return math.fsum(r.n * r.weight * r.x for r in found) / total if total else math.nan


def log_miscalibration(rows: Sequence[tuple[float, bool, float]], margin: float) -> float:
    """What is against "the calibration error is at most ``margin``": ln of what a stake of 1 has grown to.

    The calibration error E|E[y|p] − p| is at least E[(y − p)·g(p)] for every g with values in [−1, 1]. Bets are
    placed on g = ±1, probabilities that are all too low or too high, and on g that changes its sign at one of
    `_TURNS`: probabilities that are too timid or too extreme around it.

    Args:
        rows: (probability, label, weight), in any order.
        margin: In [0, 1).

    Source: sequentially valid tests of calibration by betting as in Arnold, Henzi & Ziegel 2023.
    """
    if not rows:
        return 0.0
    top = max(w for _, _, w in rows)
    logs = []
    for turn in _TURNS:
        for sign in (1.0, -1.0):
            gains = [(w / top) * ((y - p) * (sign if p >= turn else -sign) - margin) / (1 + margin) for p, y, w in rows]
            logs += [sum(math.log1p(c * gain) for gain in gains) for c in BETS[::2]]
    return log_mean_exp(logs)
