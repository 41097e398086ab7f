"""Posterior + policy prior + bounds → the weights that are applied."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

from hhh_router.types import EXPERTS, Posterior, Weights

TOLERANCE = 1e-9
_SMALLEST = 1e-12  # a share below this counts as this in a logarithm, and as 0 in the projection's ratios


def weigh(
    base: Posterior | Weights,
    *,
    prior: Mapping[str, float],
    train_prior: Posterior,
    strength: float,
    lower: Mapping[str, float],
    upper: Mapping[str, float],
) -> Weights:
    """Tilt shares towards the policy's prior, then hold them within bounds.

    ``log w~ = log p + strength · (log prior − log train_prior)`` with the prior normalised, then `project`.

    Args:
        base: Shares before the policy, p.
        prior: Relative prior per expert, >= 0; an expert that is not named gets 1.0.
        train_prior: The mean posterior on the calibration data.
        strength: 0 leaves the shares alone; 1 is the exact prior-shift correction (METHOD §7.3).
        lower: Least weight per expert.
        upper: Most weight per expert.

    Raises:
        ValueError: The prior is no prior, or the bounds cannot be met.
    """
    return project(tilt(base, prior=prior, train_prior=train_prior, strength=strength), lower, upper)


def tilt(
    base: Posterior | Weights, *, prior: Mapping[str, float], train_prior: Posterior, strength: float
) -> dict[str, float]:
    """The shares after the prior, before the bounds; they sum to 1.

    Raises:
        ValueError: A prior is negative or not finite, all are 0, or strength is outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    omega = {e: float(prior.get(e, 1.0)) for e in EXPERTS}
    total = math.fsum(omega.values())
    if not (math.isfinite(total) and total > 0 and min(omega.values()) >= 0):
        raise ValueError(f"prior must be finite and >= 0, with one above 0; got {omega}")
    if strength == 0:
        return base.as_dict()
    logs = {}
    for e in EXPERTS:
        if base[e] > 0 and omega[e] > 0:  # a prior of 0 rules the expert out
            logs[e] = math.log(base[e]) + strength * (
                math.log(omega[e] / total) - math.log(max(train_prior[e], _SMALLEST))
            )
    if not logs:  # the prior rules out every expert the router wants: the prior alone is left
        return {e: w / total for e, w in omega.items()}
    top = max(logs.values())
    shares = {e: math.exp(logs[e] - top) if e in logs else 0.0 for e in EXPERTS}
    scale = math.fsum(shares.values())
    return {e: s / scale for e, s in shares.items()}


def project(shares: Mapping[str, float], lower: Mapping[str, float], upper: Mapping[str, float]) -> Weights:
    """The weights within bounds that are nearest to some shares, in KL(weights ‖ shares).

    They are ``clip(c · share, lower, upper)`` with the one c that makes them sum to 1. c lies between two of the (at
    most eight) values at which an expert meets a bound; they are found by bisection and the equation between them is
    linear, so the result is exact up to rounding. An expert with share 0 stays at its lower bound, unless the others
    cannot reach 1 even at their upper bounds: then those with share 0 divide the rest evenly, within their bounds.

    Args:
        shares: Relative, >= 0, finite.
        lower: Least weight per expert; an expert that is not named gets 0.
        upper: Most weight per expert; an expert that is not named gets 1.

    >>> project({"base": 0.6, "helpful": 0.3, "harmless": 0.1}, {"harmless": 0.25}, {}).as_dict()
    {'base': 0.5, 'helpful': 0.25, 'harmless': 0.25, 'honest': 0.0}

    Raises:
        ValueError: Shares or bounds are no numbers, or the bounds cannot be met.
    """
    low = {e: float(lower.get(e, 0.0)) for e in EXPERTS}
    high = {e: float(upper.get(e, 1.0)) for e in EXPERTS}
    given = {e: float(shares.get(e, 0.0)) for e in EXPERTS}
    if not all(math.isfinite(s) and s >= 0 for s in given.values()):
        raise ValueError(f"shares must be finite and >= 0, got {given}")
    if not all(0 <= low[e] <= high[e] <= 1 + TOLERANCE for e in EXPERTS):  # also false for NaN
        raise ValueError(f"bounds must satisfy 0 <= lower <= upper <= 1, got {low} and {high}")
    if math.fsum(low.values()) > 1 + TOLERANCE or math.fsum(high.values()) < 1 - TOLERANCE:
        raise ValueError(f"no weights that sum to 1 lie within {low} and {high}")
    top = max(given.values())
    positive = {e: s / top for e, s in given.items() if s > _SMALLEST * top} if top > 0 else {}
    rest = 1.0 - math.fsum(low[e] for e in EXPERTS if e not in positive)
    if math.fsum(high[e] for e in positive) >= rest:
        weights = low | _scale_into(positive, low, high, rest)
    else:
        left = {e: 1.0 for e in EXPERTS if e not in positive}
        full = {e: high[e] for e in positive}
        weights = full | _scale_into(left, low, high, 1.0 - math.fsum(full.values()))
    return Weights.from_mapping(_sum_to_one(weights, low, high))


def _scale_into(
    shares: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], total: float
) -> dict[str, float]:
    """``clip(c · share, low, high)`` for positive shares, with c such that they sum to ``total`` (or come nearest)."""

    def clipped(c: float) -> dict[str, float]:
        return {e: min(high[e], max(low[e], c * s)) for e, s in shares.items()}

    edges = sorted({bound / s for e, s in shares.items() for bound in (low[e], high[e])})
    i = bisect_left(edges, total, key=lambda c: math.fsum(clipped(c).values()))
    if i == 0 or i == len(edges):
        return clipped(edges[min(i, len(edges) - 1)]) if edges else {}
    # between two edges each expert is either at a bound or free
    settled = clipped((edges[i - 1] + edges[i]) / 2)
    free = {e: s for e, s in shares.items() if low[e] < settled[e] < high[e]}
    if not free:
        return settled
    c = (total - math.fsum(w for e, w in settled.items() if e not in free)) / math.fsum(free.values())
    return settled | {e: min(high[e], max(low[e], c * s)) for e, s in free.items()}


def _sum_to_one(weights: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float]) -> dict[str, float]:
    """Takes the last rounding error out where there is room, so that bounds still hold."""
    settled = dict(weights)
    for e in sorted(settled, key=lambda e: -settled[e]):
        settled[e] = min(high[e], max(low[e], settled[e] + (1.0 - math.fsum(settled.values()))))
    return settled


def kl_nats(weights: Weights, posterior: Posterior) -> float:
    """KL(weights ‖ posterior) in nats, >= 0: how far the policy moved the router.

    Finite even where the posterior is 0: such a share counts as 1e-12.

    >>> kl_nats(Weights(0.25, 0.25, 0.25, 0.25), Posterior(0.25, 0.25, 0.25, 0.25))
    0.0
    """
    terms = (weights[e] * math.log(weights[e] / max(posterior[e], _SMALLEST)) for e in EXPERTS if weights[e] > 0)
    return max(0.0, math.fsum(terms))
