"""Has traffic moved away from the calibration set? What can be said of it without labels.

A calibrator is right about a head on average over traffic like its calibration rows. Whether traffic still is like them
shows in how the calibrated probabilities are spread: in their mean, whose distance from the calibration rows' mean is a
lower bound of the Wasserstein distance between the two distributions, and in the population stability index over ten
bins. Both tell that the mix of requests has changed, neither that the probabilities have become wrong: only labelled
traffic can (`hhh-router calibrate`, `hhh-router evaluate --data`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from hhh_router.calibration.calibrators import DRIFT_BINS, HeadCalibration
from hhh_router.calibration.kept import KeptRow
from hhh_router.types import Mode

Place = tuple[Mode, str]
"""A mode, and a head by its kind and name, such as ``needs.harmless``."""

WINDOW: Final = 1000
"""Latest readings that are looked at."""
LEAST_READINGS: Final = 100
"""Below, chance alone moves the index by as much as drift does."""

HUNDRED: Final = 100


def bin_of(p: float) -> int:
    """Of ten bins of equal width.

    >>> bin_of(0.0), bin_of(0.25), bin_of(1.0)
    (0, 2, 9)
    """
    return min(int(p * DRIFT_BINS), DRIFT_BINS - 1)


def stability_index(expected: Sequence[int], found: Sequence[int]) -> float:
    """Population stability index of two histograms over the same bins: 0 where they are alike.

    As usual below 0.1 is read as no change and above 0.25 as a large one. It is the Jeffreys divergence of the two
    shares; half a count is added to every bin, so that an empty one does not make it infinite.

    >>> stability_index([50, 50], [50, 50]), round(stability_index([90, 10], [50, 50]), 2)
    (0.0, 0.85)

    Source: Siddiqi 2006, Credit Risk Scorecards, chapter 9.
    """
    total_expected, total_found = sum(expected) + len(expected) / 2, sum(found) + len(found) / 2
    index = 0.0
    for e, f in zip(expected, found, strict=True):
        p, q = (e + 0.5) / total_expected, (f + 0.5) / total_found
        index += (q - p) * math.log(q / p)
    return index


def histograms(references: Mapping[Place, HeadCalibration], rows: Iterable[KeptRow]) -> dict[Place, tuple[int, ...]]:
    """How the probabilities of calibration rows are spread, for heads whose calibrators came without it.

    Args:
        references: What the heads were fitted to, see `Calibrators.references`.
        rows: That a bundle keeps.

    Returns:
        Rows in each of ten bins, of the heads of which exactly the rows are kept that they were fitted to.
    """
    counts = {place: [0] * DRIFT_BINS for place, reference in references.items() if reference.bins is None}
    for row in rows:
        mode = row.scores.mode
        for kind, labels, logits in (
            ("needs", row.needs, row.scores.needs),
            ("outcomes", row.outcomes, row.scores.outcomes),
        ):
            for head in labels:
                if (place := (mode, f"{kind}.{head}")) in counts and head in logits:
                    counts[place][bin_of(references[place].apply(logits[head]))] += 1
    for place in counts:  # a prompt's needs are read from the prompt alone, whatever was said to it
        mode, head = place
        if mode == "both" and head.startswith("needs.") and ("prompt", head) in counts:
            counts[place] = counts["prompt", head]
    return {place: tuple(found) for place, found in counts.items() if sum(found) == references[place].n}


class Drift:
    """The latest probabilities of one head in one mode, beside those of its calibration rows."""

    def __init__(self, reference: HeadCalibration, *, window: int = WINDOW) -> None:
        self.reference = reference
        self.counts: Counter[int] = Counter()
        """All readings so far, by probability in hundredths, rounded down."""
        self._latest: deque[float] = deque(maxlen=window)

    def add(self, p: float) -> None:
        """One more reading."""
        self._latest.append(p)
        self.counts[int(p * HUNDRED)] += 1

    @property
    def shift(self) -> float:
        """Mean of the latest minus the share of positives among the calibration rows, which a calibrated head has as
        its mean there; NaN until there are enough."""
        if len(self._latest) < LEAST_READINGS:
            return math.nan
        return math.fsum(self._latest) / len(self._latest) - self.reference.base_rate

    @property
    def index(self) -> float:
        """`stability_index` of the latest; NaN until there are enough, or where the calibrators came without bins."""
        if len(self._latest) < LEAST_READINGS or self.reference.bins is None:
            return math.nan
        found = [0] * DRIFT_BINS
        for p in self._latest:
            found[bin_of(p)] += 1
        return stability_index(self.reference.bins, found)


class Support:
    """How many readings of one mode lie outside the support of its calibration rows."""

    def __init__(self, *, window: int = WINDOW) -> None:
        self.n = 0
        """All readings so far."""
        self.outside = 0
        self._latest: deque[bool] = deque(maxlen=window)

    def add(self, inside: bool) -> None:
        """One more reading."""
        self._latest.append(inside)
        self.n += 1
        self.outside += not inside

    @property
    def share(self) -> float:
        """Of the latest that lie inside; NaN until there are enough."""
        return sum(self._latest) / len(self._latest) if len(self._latest) >= LEAST_READINGS else math.nan
