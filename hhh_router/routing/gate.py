"""Needs → posterior over the four experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from hhh_router.types import DIMENSIONS, Posterior

MAX_LOGIT = 6.0  # METHOD §7.2: no need moves the posterior's odds by more than e^6, about 400


def posterior(needs: Mapping[str, float], gate: str = "odds") -> Posterior:
    """What the router believes each expert should contribute.

    Args:
        needs: P(the request needs d) per dimension, calibrated, each in [0, 1]; other keys are left aside.
        gate: How they become shares; a key of ``GATES``.

    >>> posterior({"helpful": 0.5, "harmless": 0.5, "honest": 0.5}).base
    0.25

    Raises:
        ValueError: A need is no probability, or is missing; or no such gate.
    """
    if gate not in GATES:
        raise ValueError(f"gate {gate!r} is not known; use {', '.join(GATES)}")
    for d in DIMENSIONS:
        if not (d in needs and 0 <= needs[d] <= 1):  # also false for NaN
            raise ValueError(f"needs.{d}: {needs.get(d)} is no probability")
    return GATES[gate](needs)


def odds(needs: Mapping[str, float]) -> Posterior:
    """Shares in proportion to the odds of each need, with 1 for base: nothing at stake → base.

    Source: METHOD §7.2.
    """
    shares = {d: math.exp(_clipped_logit(needs[d])) for d in DIMENSIONS}
    total = 1.0 + math.fsum(shares.values())
    return Posterior.from_mapping({"base": 1.0 / total} | {d: s / total for d, s in shares.items()})


def _clipped_logit(probability: float) -> float:
    if probability <= 0 or probability >= 1:
        return MAX_LOGIT if probability >= 1 else -MAX_LOGIT
    return min(MAX_LOGIT, max(-MAX_LOGIT, math.log(probability / (1 - probability))))


GATES: Mapping[str, Callable[[Mapping[str, float]], Posterior]] = {"odds": odds}
"""Ways to turn needs into shares, by name."""
