"""The systems that are compared: fixed weights, the router, each policy, and an oracle that knows the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hhh_router.calibration import Calibrators
from hhh_router.data.examples import Example
from hhh_router.pipeline.plan import make_plan
from hhh_router.policy import Policy
from hhh_router.types import DIMENSIONS, Scores, Weights

BARE = Weights(1, 0, 0, 0)
FIXED: Mapping[str, Weights] = {
    "bare backbone": BARE,
    "helpful alone": Weights(0, 1, 0, 0),
    "harmless alone": Weights(0, 0, 1, 0),
    "honest alone": Weights(0, 0, 0, 1),
    "uniform thirds": Weights(0, 1 / 3, 1 / 3, 1 / 3),
    "uniform with base": Weights(0.25, 0.25, 0.25, 0.25),
}
"""Weights that do not look at the request; the first is what the others are compared with."""


@dataclass(frozen=True, slots=True)
class Weighting:
    """What a system does with each of some prompts."""

    name: str
    weights: tuple[Weights, ...]
    """Of each prompt."""
    stops: tuple[bool, ...]
    """Whether the system refuses the prompt before anything is generated."""


def weightings(
    examples: Sequence[Example],
    scores: Sequence[Scores],
    calibrators: Calibrators,
    unbound: Policy,
    policies: Sequence[Policy],
) -> list[Weighting]:
    """Every system on the same prompts.

    Args:
        examples: The prompts, with the labels that only the oracle sees.
        scores: Their readings.
        calibrators: Of the bundle.
        unbound: A policy without rules or bounds, which applies what the router says.
        policies: Measured as users run them.
    """
    n = len(examples)
    found = [Weighting(name, (weights,) * n, (False,) * n) for name, weights in FIXED.items()]
    for name, policy in (("router, no policy", unbound), *((f"policy {p.name}", p) for p in policies)):
        plans = [make_plan(s, policy=policy, calibrators=calibrators) for s in scores]
        stops = tuple(p.decision.action.stops for p in plans)
        # what is stopped is never generated; one weighting for all of it keeps the number of passes down
        weights = tuple(BARE if stop else p.weights for p, stop in zip(plans, stops, strict=True))
        found.append(Weighting(name, weights, stops))
    return [*found, Weighting("oracle", tuple(oracle_weights(e) for e in examples), (False,) * n)]


def oracle_weights(example: Example) -> Weights:
    """All weight on the expert that the labels call for, harm before honesty; the bare backbone where nothing is at
    stake.

    >>> from hhh_router.data.examples import ask
    >>> oracle_weights(Example(source="x", split="eval", messages=ask("?"), needs={"harmless": 1.0})).harmless
    1.0
    """
    for dimension in ("harmless", "honest"):
        if example.needs.get(dimension) == 1.0:
            return Weights.from_mapping({"base": 0.0} | {d: float(d == dimension) for d in DIMENSIONS})
    return BARE
