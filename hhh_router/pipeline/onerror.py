"""What holds when a part fails: readings that say nothing, and plans made without one. Never an allow by accident."""

from __future__ import annotations

import math

from hhh_router.errors import HHHRouterError, ReaderError
from hhh_router.policy import Policy, on_error_decision
from hhh_router.routing import project
from hhh_router.types import Decision, Evidence, Mode, Plan, Posterior, Scores

JUDGING_FAILURES = (HHHRouterError, ArithmeticError, LookupError, TypeError, ValueError)
"""What judging a reading can raise when the reading or a calibrator is broken."""


def check_scores(scores: Scores) -> None:
    """Reject a reading with a number that is none: every comparison with NaN is false, so no rule would ever stop it.

    Raises:
        ReaderError: A head's output is not finite; nothing may be concluded from it.
    """
    heads = {f"needs.{k}": v for k, v in scores.needs.items()} | {
        f"outcomes.{k}": v for k, v in scores.outcomes.items()
    }
    if broken := [f"{name}={value}" for name, value in heads.items() if not math.isfinite(value)]:
        raise ReaderError(
            f"the reading is not finite: {', '.join(broken)}",
            hint="check the bundle (hhh-router bundle verify); an adapter or head holds NaN or infinity",
        )


def failed_decision(policy: Policy, checkpoint: str, error: BaseException) -> Decision:
    """What the policy's ``on_error`` says about a failure."""
    found = error.message if isinstance(error, HHHRouterError) else f"{type(error).__name__}: {error}"
    return on_error_decision(policy, checkpoint, found)


def unread_evidence(mode: Mode = "prompt") -> Evidence:
    """Evidence of a reading that did not happen: no needs, no outcomes, not calibrated."""
    return Evidence(
        mode=mode,
        needs={},
        posterior=Posterior(1.0, 0.0, 0.0, 0.0),
        outcomes={},
        in_distribution=False,
        calibrated=False,
        scores=Scores(mode=mode, needs={}, outcomes={}, distance=math.inf, tokens=0),
    )


def unread_plan(policy: Policy, decision: Decision, *, mode: Mode = "prompt") -> Plan:
    """A plan without a reading: the policy's own prior within its bounds, confidence 0, and the given decision."""
    total = sum(policy.prior.values())
    shares = {expert: value / total for expert, value in policy.prior.items()}
    return Plan(
        evidence=unread_evidence(mode),
        decision=decision,
        weights=project(shares, policy.lower, policy.upper),
        policy_shift_nats=0.0,
        confidence=0.0,
        enforced=policy.mode == "enforce",
    )
