"""How a reading leads to a decision, step by step: what `hhh-router policy explain` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hhh_router.calibration import Calibrators
from hhh_router.pipeline.plan import Worked, work_out
from hhh_router.policy import Bounds, Facts, Policy, attempts, decide, thresholds
from hhh_router.types import EXPERTS, NEEDS, OUTCOMES, Decision, Evidence, Scores, Situation, Weights

_NO_SITUATION = Situation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step from a reading to a decision, for people and for programs."""

    title: str
    """One or two words, such as ``posterior``."""
    detail: str
    """What happened, with the numbers; one or more lines."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The same, JSON-ready."""


def explain(
    scores: Scores,
    *,
    policy: Policy,
    calibrators: Calibrators,
    pinned: Weights | None = None,
    situation: Situation = _NO_SITUATION,
) -> list[Step]:
    """How one prompt's reading leads to its weights and decision, step by step.

    Raises:
        ReaderError: Nothing can be concluded from the reading.
    """
    worked = work_out(scores, policy=policy, calibrators=calibrators, pinned=pinned, floors={}, situation=situation)
    decision = decide(policy, "input", worked.facts)
    return [
        _evidence_step(worked.evidence),
        _posterior_step(worked.evidence, calibrators.gate),
        _prior_step(worked, policy, calibrators) if pinned is None else _pinned_step(worked),
        _bounds_step(worked.bounds, policy),
        _weights_step(worked),
        _confidence_step(worked, policy),
        *_rule_steps(policy, worked.facts),
        _decision_step(policy, decision),
    ]


def _evidence_step(evidence: Evidence) -> Step:
    needs: dict[str, float] = {n: evidence.needs[n] for n in NEEDS if n in evidence.needs}
    outcomes = {o: evidence.outcomes[o] for o in OUTCOMES if o in evidence.outcomes}
    quality = "calibrated" if evidence.calibrated else "NOT calibrated"
    inside = "inside" if evidence.in_distribution else "OUTSIDE"
    return Step(
        title="evidence",
        detail=(
            f"needs     {_row(needs)}\noutcomes  {_row(outcomes)}\n"
            f"{quality}, {inside} the support of the calibration data"
        ),
        data={
            "mode": evidence.mode,
            "needs": needs,
            "outcomes": outcomes,
            "calibrated": evidence.calibrated,
            "in_distribution": evidence.in_distribution,
        },
    )


def _posterior_step(evidence: Evidence, gate: str) -> Step:
    shares = evidence.posterior.as_dict()
    how = "in proportion to the odds of each need, base to 1" if gate == "odds" else f"by the gate {gate}"
    return Step(title="posterior", detail=f"{_row(shares)}\n{how}", data={"posterior": shares, "gate": gate})


def _prior_step(worked: Worked, policy: Policy, calibrators: Calibrators) -> Step:
    total = sum(policy.prior.values())
    prior = {e: policy.prior[e] / total for e in EXPERTS}
    train = calibrators.train_prior.as_dict()
    return Step(
        title="prior",
        detail=(
            f"policy    {_row(prior)}\ntraining  {_row(train)}\n"
            f"posterior · (policy / training)^{policy.strength:g}\n→         {_row(worked.shares)}"
        ),
        data={"prior": prior, "train_prior": train, "strength": policy.strength, "shares": dict(worked.shares)},
    )


def _pinned_step(worked: Worked) -> Step:
    return Step(
        title="pinned",
        detail=f"{_row(worked.shares)}\nasked for by the caller in place of the router's share",
        data={"shares": dict(worked.shares)},
    )


def _bounds_step(within: Bounds, policy: Policy) -> Step:
    lines = [f"least     {_row(within.lower)}", f"most      {_row(within.upper)}"]
    for floor in policy.floors:
        why = ", ".join(map(str, floor.when))
        verdict = f"raises to {_row(floor.raises)}" if floor.place in within.raised else "does not hold"
        lines.append(f"{floor.place} ({why}) {verdict}")
    data = {"lower": dict(within.lower), "upper": dict(within.upper), "raised": list(within.raised)}
    return Step(title="bounds", detail="\n".join(lines), data=data)


def _weights_step(worked: Worked) -> Step:
    weights = worked.weights
    return Step(
        title="weights",
        detail=(
            f"{_row(weights.as_dict())}\nmixture {weights.mixture}, "
            f"{worked.policy_shift_nats:.3f} nats away from the posterior"
        ),
        data={
            "weights": weights.as_dict(),
            "mixture": weights.mixture,
            "policy_shift_nats": worked.policy_shift_nats,
        },
    )


def _confidence_step(worked: Worked, policy: Policy) -> Step:
    limits = [f"{t.quantity} {t.op} {t.value:g}" for t in thresholds(policy, "input")]
    return Step(
        title="confidence",
        detail=f"{worked.confidence:.3f} that every verdict here is right; limits: {', '.join(limits) or 'none'}",
        data={"confidence": worked.confidence, "limits": limits},
    )


def _rule_steps(policy: Policy, facts: Facts) -> list[Step]:
    words = {True: "matches", False: "does not match", None: "cannot be told"}
    steps = []
    for attempt in attempts(policy, "input", facts):
        asked = attempt.found or ("asks nothing, the default",)
        steps.append(
            Step(
                title=f"{attempt.rule.place} → {attempt.rule.then}",
                detail="\n".join((*asked, words[attempt.holds])),
                data={
                    "rule": attempt.rule.place,
                    "then": str(attempt.rule.then),
                    "found": list(attempt.found),
                    "matches": attempt.holds,
                },
            )
        )
    return steps


def _decision_step(policy: Policy, decision: Decision) -> Step:
    shadow = " (shadow: recorded, not enforced)" if policy.mode == "shadow" else ""
    lines = [f"{decision.action}{shadow} by {decision.rule}: {decision.reason}"]
    if decision.message is not None:
        lines.append(f"tells the caller: {decision.message}")
    data = {
        "action": str(decision.action),
        "rule": decision.rule,
        "reason": decision.reason,
        "message": decision.message,
        "enforced": policy.mode == "enforce",
    }
    return Step(title="decision", detail="\n".join(lines), data=data)


def _row(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()) or "not measured"
