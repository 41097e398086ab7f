"""How often a candidate would have decided otherwise than the policy in force, since the start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from hhh_router.calibration.monitor import Figure, share_figure
from hhh_router.trace.block import Compared, Metadata, PolicyRef
from hhh_router.types import Action

MOST_PAIRS: Final = 32
"""Pairs of policies that are counted apart; a further one, after many reloads, takes the oldest one's place."""
FIGURES: Final = ("stricter", "looser", "unknown", "newly_stopped", "newly_passed")
"""Shares of requests: the candidate is stricter or looser where both first differ, is not known to agree or differ; and
of these differences those that a caller would have noticed."""


@dataclass(slots=True)
class Counts:
    """Two policies on the same requests."""

    policy: str
    """That in force, as ``name@version``."""
    candidate: str
    requests: int = 0
    shares: Counter[str] = field(default_factory=Counter)
    """By the names of `FIGURES`."""
    actions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(checkpoint, action in force, action of the candidate) → requests."""

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; of the actions only those that differ."""
        differing = sorted((key, n) for key, n in self.actions.items() if key[1] != key[2])
        return {
            "policy": self.policy,
            "candidate": self.candidate,
            "requests": self.requests,
            "disagreements": [
                {"checkpoint": at, "enforced": enforced, "candidate": candidate, "n": n}
                for (at, enforced, candidate), n in differing
            ],
        }


class Comparisons:
    """Counts what blocks say of candidates."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], Counts] = {}

    def add(self, block: Metadata) -> None:
        """Count a finished request; nothing where no candidate was asked."""
        found = block.candidate
        if found is None:
            return
        key = (block.policy.hash, found.policy.hash)
        counts = self._pairs.get(key)
        if counts is None:
            if len(self._pairs) >= MOST_PAIRS:
                del self._pairs[next(iter(self._pairs))]
            counts = self._pairs[key] = Counts(policy=_name(block.policy), candidate=_name(found.policy))
        counts.requests += 1
        if found.relation != "same":
            counts.shares[found.relation] += 1
        for c in found.compared:
            counts.actions[c.checkpoint, c.enforced, c.candidate] += 1
        if (change := _change(found.compared)) is not None:
            counts.shares[change] += 1

    @property
    def pairs(self) -> list[Counts]:
        """Each pair of policies, the latest last."""
        return list(self._pairs.values())

    def figures(self) -> list[Figure]:
        """Shares of requests with intervals that hold whenever one looks."""
        return [
            share_figure(f"candidate_{name}", f"{pair.policy} → {pair.candidate}", pair.shares[name], pair.requests)
            for pair in self.pairs
            for name in FIGURES
        ]


def _change(compared: list[Compared]) -> str | None:
    """What the caller would have noticed at the first checkpoint where one of the two stops and the other does not."""
    for c in compared:
        enforced, candidate = Action(c.enforced).stops, Action(c.candidate).stops
        if enforced != candidate:
            return "newly_stopped" if candidate else "newly_passed"
    return None


def _name(policy: PolicyRef) -> str:
    return f"{policy.name}@{policy.version}"
