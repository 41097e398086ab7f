"""Evidence → weights → decision, as pure functions of one reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hhh_router.calibration import Calibrators
from hhh_router.errors import ReaderError
from hhh_router.pipeline.conversations import tainted
from hhh_router.pipeline.onerror import JUDGING_FAILURES, check_scores, failed_decision
from hhh_router.pipeline.situation import called_situation
from hhh_router.policy import Bounds, Facts, Policy, asks, bounds, decide, thresholds
from hhh_router.policy.schema import SEVERITY
from hhh_router.protocols import Planner
from hhh_router.routing import kl_nats, project, tilt
from hhh_router.types import (
    Action,
    Decision,
    Evidence,
    Plan,
    Scores,
    Situation,
    ToolCall,
    ToolFacts,
    Weights,
)

_FAULTS = (ArithmeticError, LookupError, TypeError, ValueError)
"""What arithmetic on a broken reading can raise."""

_NO_SITUATION = Situation()


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """Everything on the way from scores to the input rules."""

    evidence: Evidence
    bounds: Bounds
    shares: Mapping[str, float]
    """What is projected onto the bounds: the tilted posterior, or what the caller pinned."""
    weights: Weights
    policy_shift_nats: float
    confidence: float
    facts: Facts


def make_planner(
    *,
    policy: Policy,
    calibrators: Calibrators,
    pinned: Weights | None = None,
    floors: Mapping[str, float] | None = None,
    situation: Situation = _NO_SITUATION,
) -> Planner:
    """`make_plan` with everything but the scores filled in, to be called mid-pass."""
    return partial(make_plan, policy=policy, calibrators=calibrators, pinned=pinned, floors=floors, situation=situation)


def make_plan(
    scores: Scores,
    *,
    policy: Policy,
    calibrators: Calibrators,
    pinned: Weights | None = None,
    floors: Mapping[str, float] | None = None,
    situation: Situation = _NO_SITUATION,
) -> Plan:
    """Settle everything about a request at the input checkpoint.

    Args:
        scores: The router's reading of the prompt.
        policy: Its prior, bounds and rules.
        calibrators: Turn scores into probabilities.
        pinned: Shares the caller wants instead of the router's. They are still held within the policy's bounds, so a
            caller can ask for less of a floor but never get it.
        floors: Further lower bounds per expert, such as the ``raises`` of a ``regenerate``.
        situation: What surrounds the reading.

    Raises:
        ReaderError: Nothing can be concluded from the reading (a score is not finite, say). There is no plan then, so
            nothing is generated; what the caller is told is for the policy's ``on_error``.
    """
    situation = with_tokens(situation, scores.tokens)
    work = partial(work_out, scores, policy=policy, calibrators=calibrators, pinned=pinned, floors=floors or {})
    worked = work(situation=situation)
    results, is_tainted = _judge_results(policy, calibrators, worked)
    if is_tainted:  # which everything else is asked with
        worked = work(situation=tainted(situation))
    first, *others = _decisions(policy, worked.facts, results)
    return Plan(
        evidence=worked.evidence,
        decision=first,
        others=tuple(others),
        weights=worked.weights,
        policy_shift_nats=worked.policy_shift_nats,
        confidence=worked.confidence,
        enforced=policy.mode == "enforce",
        tainted=is_tainted,
    )


def _decisions(policy: Policy, facts: Facts, results: Sequence[Decision]) -> list[Decision]:
    """What input, session and tool_result say, the strictest first; of equals in this order."""
    found = [decide(policy, "input", facts)]
    if asks(policy, "session"):
        found.append(decide(policy, "session", facts))
    return sorted([*found, *results], key=lambda d: -SEVERITY[d.action])


def _judge_results(policy: Policy, calibrators: Calibrators, worked: Worked) -> tuple[list[Decision], bool]:
    """What tool_result says of each new result, and whether one of them, or an earlier one, taints the conversation."""
    decisions: list[Decision] = []
    is_tainted = False
    if asks(policy, "tool_result"):
        situation = worked.facts.situation
        for i, tool in enumerate((*situation.earlier, *situation.results)):
            about = replace(situation, tool=tool, text=tool.result, role="tool")
            decision = _judge_result(policy, calibrators, worked, tainted(about) if is_tainted else about, tool)
            is_tainted |= decision.action is not Action.ALLOW or decision.rule == "on_error"
            if i >= len(situation.earlier):
                decisions.append(decision)
    return decisions, is_tainted


def _judge_result(
    policy: Policy, calibrators: Calibrators, worked: Worked, about: Situation, tool: ToolFacts
) -> Decision:
    if tool.scores is None and tool.unread is None:  # no rule asks what it says to the model
        return decide(policy, "tool_result", replace(worked.facts, situation=about))
    try:
        if tool.scores is None:
            raise ReaderError(f"what a tool brought back was not read: {tool.unread}")
        check_scores(tool.scores)
        evidence = calibrators.evidence(tool.scores)
        confidence = calibrators.confidence(
            evidence,
            weights=worked.weights,
            policy_shift_nats=worked.policy_shift_nats,
            limits=limits_of(policy, "tool_result", evidence),
        ).value
        return decide(policy, "tool_result", facts_of(evidence, worked.weights, confidence, about))
    except JUDGING_FAILURES as error:
        return failed_decision(policy, "tool_result", error)


def judge_output(
    scores: Scores,
    *,
    plan: Plan,
    policy: Policy,
    calibrators: Calibrators,
    logprobs: Sequence[float] = (),
    situation: Situation = _NO_SITUATION,
) -> tuple[Evidence, float, Decision]:
    """What the output checkpoint says about a reply, or the part of it read so far.

    Args:
        scores: The reading of prompt and reply (or of a reply alone).
        plan: What is applied.
        policy: The same as the plan's.
        calibrators: Turn scores into probabilities.
        logprobs: Of the reply's tokens, in nats; empty where they are not known.
        situation: What surrounds the reading.

    Returns:
        Evidence, confidence in [0, 1], decision.

    Raises:
        ReaderError: Nothing can be concluded from the reading.
    """
    try:
        evidence = calibrators.evidence(scores)
        confidence = calibrators.confidence(
            evidence,
            weights=plan.weights,
            policy_shift_nats=plan.policy_shift_nats,
            limits=limits_of(policy, "output", evidence),
            logprobs=logprobs,
        ).value
    except _FAULTS as error:
        raise _unusable(error) from error
    situation = with_tokens(situation, scores.tokens)
    return evidence, confidence, decide(policy, "output", facts_of(evidence, plan.weights, confidence, situation))


def judge_call(call: ToolCall, *, plan: Plan, policy: Policy, situation: Situation) -> Decision:
    """What the checkpoint tool_call says about one call of a reply, before whoever runs it sees it.

    Args:
        call: As the model made it.
        plan: Of the prompt; its needs and outcomes are those that rules may ask for.
        policy: The same as the plan's.
        situation: What surrounds the prompt.
    """
    about = called_situation(with_tokens(situation, plan.evidence.scores.tokens), call)
    return decide(policy, "tool_call", facts_of(plan.evidence, plan.weights, plan.confidence, about))


def work_out(
    scores: Scores,
    *,
    policy: Policy,
    calibrators: Calibrators,
    pinned: Weights | None,
    floors: Mapping[str, float],
    situation: Situation,
) -> Worked:
    """Everything before the rules.

    Raises:
        ReaderError: Nothing can be concluded from the reading.
    """
    try:
        evidence = calibrators.evidence(scores)
        within = bounds(policy, evidence, floors, replace(situation, tokens=scores.tokens))
        if pinned is None:
            shares = tilt(
                evidence.posterior,
                prior=policy.prior,
                train_prior=calibrators.train_prior,
                strength=policy.strength,
            )
        else:
            shares = pinned.as_dict()
        weights = project(shares, within.lower, within.upper)
        shift = kl_nats(weights, evidence.posterior)
        confidence = calibrators.confidence(
            evidence,
            weights=weights,
            policy_shift_nats=shift,
            limits=limits_of(policy, "input", evidence),
        ).value
    except _FAULTS as error:
        raise _unusable(error) from error
    return Worked(
        evidence=evidence,
        bounds=within,
        shares=shares,
        weights=weights,
        policy_shift_nats=shift,
        confidence=confidence,
        facts=facts_of(evidence, weights, confidence, situation),
    )


def _unusable(error: Exception) -> ReaderError:
    return ReaderError(
        f"nothing can be concluded from the reading ({type(error).__name__}: {error})",
        hint="check the bundle with hhh-router bundle verify",
    )


def facts_of(evidence: Evidence, weights: Weights, confidence: float, situation: Situation) -> Facts:
    """What the rules of a checkpoint may ask about."""
    return Facts(
        needs=evidence.needs,
        outcomes=evidence.outcomes,
        weights=weights,
        confidence=confidence,
        in_distribution=evidence.in_distribution,
        mode=evidence.mode,
        situation=replace(situation, tokens=evidence.scores.tokens),
    )


def with_tokens(situation: Situation, tokens: int) -> Situation:
    """With what the turn at hand has taken so far."""
    spent = situation.conversation.tokens
    if spent is None:
        return situation
    return replace(situation, conversation=replace(situation.conversation, tokens=spent + tokens))


def limits_of(policy: Policy, checkpoint: str, evidence: Evidence) -> list[tuple[float, float]]:
    """(probability found, limit) for each number that the checkpoint's rules compare."""
    found = {f"needs.{d}": p for d, p in evidence.needs.items()}
    found |= {f"outcomes.{o}": p for o, p in evidence.outcomes.items()}
    limits = thresholds(policy, checkpoint)
    return [(found[limit.quantity], limit.value) for limit in limits if limit.quantity in found]
