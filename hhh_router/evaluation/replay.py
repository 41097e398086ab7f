"""Two policies on the same traffic: which requests flip, and what that does to both errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hhh_router.data.examples import Example, data_hash
from hhh_router.evaluation.intervals import with_interval
from hhh_router.evaluation.systems import Readings
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision, unread_plan
from hhh_router.pipeline.plan import judge_output, make_plan
from hhh_router.pipeline.situation import answered_situation, asked_situation
from hhh_router.policy import Policy, for_tenant
from hhh_router.policy.schema import SEVERITY
from hhh_router.routing import kl_nats
from hhh_router.types import Caller, Decision, Posterior, ReadRequest, Scores, Weights

SCHEMA = "hhh-router/replay/1"
BOOTSTRAPS = 2000
NEED = "harmless"

Flip = Literal["newly stopped", "newly passed", "other action", "same"]
Side = Literal["benign_refused", "harm_passed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one policy makes of one request."""

    decision: Decision
    """The stricter of those at input and, where there is a reply, at output."""
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One request under both policies."""

    row: int
    """Counted from 1, in the file's order."""
    example: Example
    before: Judged
    after: Judged
    answers: tuple[str, str] | None = None
    """What is answered under each, with the same seed; None where nothing was generated."""

    @property
    def flip(self) -> Flip:
        """What changes for whoever asked."""
        one, other = self.before.decision.action, self.after.decision.action
        if one.stops != other.stops:
            return "newly stopped" if other.stops else "newly passed"
        return "same" if one is other else "other action"

    @property
    def shift_nats(self) -> float:
        """KL(weights after ‖ weights before): how differently the reply would be made."""
        return kl_nats(self.after.weights, Posterior(**self.before.weights.as_dict()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What may get worse before a replay fails. None: anything."""

    benign_refused: float | None = None
    """Most that the share of benign requests stopped may have risen, at the upper end of its interval."""
    harm_passed: float | None = None
    flips: int | None = None
    """Most requests that are stopped under one policy only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Two policies on the same traffic."""

    before: Policy
    after: Policy
    pairs: tuple[Pair, ...]
    figures: Mapping[str, Any]
    """JSON-ready."""
    failed: tuple[str, ...] = field(default=())
    """Gates that did not hold, one line each."""


def replay(
    before: Policy,
    after: Policy,
    examples: Sequence[Example],
    readings: Readings,
    *,
    seed: int,
    gate: Gate,
    command: str,
) -> Replay:
    """Put every request to both policies, on the same readings.

    Args:
        before: What is in force.
        after: What may replace it.
        examples: Traffic; labels of ``harmful`` are needed for the errors, not for the flips.
        readings: A bundle's.
        seed: Of the bootstraps.
        gate: What may get worse.
        command: How this was asked for.
    """
    wanted = list(dict.fromkeys(request for e in examples for request in _reads(e)))
    scores = dict(zip(wanted, readings.scores(wanted), strict=True))
    pairs = tuple(
        Pair(
            row=i,
            example=e,
            before=_judge(before, e, scores, readings),
            after=_judge(after, e, scores, readings),
        )
        for i, e in enumerate(examples, start=1)
    )
    figures = _figures(before, after, pairs, readings.about, seed, command)
    return Replay(before=before, after=after, pairs=pairs, figures=figures, failed=tuple(_failed(figures, gate)))


def _reads(example: Example) -> list[ReadRequest]:
    prompt = ReadRequest(messages=example.messages)
    if example.response is None:
        return [prompt]
    return [prompt, ReadRequest(messages=example.messages, response=example.response)]


def _judge(policy: Policy, example: Example, scores: Mapping[ReadRequest, Scores | None], readings: Readings) -> Judged:
    policy = for_tenant(policy, "")
    asked, *answered = _reads(example)
    situation = asked_situation(example.messages, Caller(tenant=""), None)
    try:
        plan = make_plan(_known(scores[asked]), policy=policy, calibrators=readings.calibrators, situation=situation)
    except JUDGING_FAILURES as error:
        plan = unread_plan(policy, failed_decision(policy, "input", error))
    decisions = [plan.decision]
    if answered and not plan.decision.action.stops:
        try:
            _, _, decision = judge_output(
                _known(scores[answered[0]]),
                plan=plan,
                policy=policy,
                calibrators=readings.calibrators,
                situation=answered_situation(situation, example.response),
            )
        except JUDGING_FAILURES as error:
            decision = failed_decision(policy, "output", error)
        decisions.append(decision)
    return Judged(decision=max(decisions, key=lambda d: SEVERITY[d.action]), weights=plan.weights)


def _known(scores: Scores | None) -> Scores:
    if scores is None:
        raise ValueError("the model's template does not take this conversation")
    check_scores(scores)
    return scores


def _figures(
    before: Policy, after: Policy, pairs: Sequence[Pair], about: str, seed: int, command: str
) -> dict[str, Any]:
    kinds: tuple[Flip, ...] = ("newly stopped", "newly passed", "other action", "same")
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "bundle": about,
        "before": {"name": before.name, "version": before.version, "hash": before.hash},
        "after": {"name": after.name, "version": after.version, "hash": after.hash},
        "data_sha256": data_hash([p.example for p in pairs]),
        "n": len(pairs),
        "flips": {kind: sum(p.flip == kind for p in pairs) for kind in kinds},
        "errors": {},
    }
    for side, harmful in (("benign_refused", False), ("harm_passed", True)):
        rows = [p for p in pairs if p.example.needs.get(NEED) == float(harmful)]
        if rows:
            figures["errors"][side] = {"n": len(rows)} | _paired(rows, harmful, seed)
    return figures


def _paired(rows: Sequence[Pair], harmful: bool, seed: int) -> dict[str, Any]:
    """Both shares and their difference; rows are drawn as pairs, so that what both policies do alike cancels out."""
    one, other = (
        np.array([float(judged.decision.action.stops is not harmful) for judged in side])
        for side in ([p.before for p in rows], [p.after for p in rows])
    )

    def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.mean(b) - np.mean(a))

    return {"before": float(one.mean()), "after": float(other.mean())} | with_interval(
        "difference", difference, one, other, seed=seed, bootstraps=BOOTSTRAPS
    )


def _failed(figures: Mapping[str, Any], gate: Gate) -> list[str]:
    found = []
    for side in ("benign_refused", "harm_passed"):
        most = getattr(gate, side)
        if most is None:
            continue
        errors = figures["errors"].get(side)
        if errors is None:
            found.append(f"{side}: no row is labelled for it, so nothing says that it rose by at most {most:g}")
            continue
        upper = errors["difference_interval"][1] if errors["difference_interval"] else 1.0
        if upper > most:
            found.append(f"{side}: may have risen by {upper:.4f}, at most {most:g} is accepted")
    flips = figures["flips"]["newly stopped"] + figures["flips"]["newly passed"]
    if gate.flips is not None and flips > gate.flips:
        found.append(f"flips: {flips}, at most {gate.flips} are accepted")
    return found


def most_changed(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The requests that both policies answer with the most different weights, whose answers are worth comparing."""
    answered = [p for p in pairs if not p.before.decision.action.stops and not p.after.decision.action.stops]
    return sorted(answered, key=lambda p: -p.shift_nats)[:count]


Answer = Callable[[Example, Policy], str]
"""What is answered under a policy; the seed is the same for all."""
