"""Facts + policy → a decision, and the bounds its floors lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hhh_router.errors import ReaderError
from hhh_router.policy.rules import QUANTITIES, Facts, Rule, When, all_hold, show_found
from hhh_router.policy.schema import Policy
from hhh_router.types import EXPERTS, Action, Decision, Evidence, Weights

DEFAULT_MESSAGES: Mapping[Action, str] = {
    Action.REFUSE: "I can't help with that request.",
    Action.ESCALATE: "This request needs a person's attention and was not answered here.",
    Action.BLOCK: "This request was blocked by the policy of this service.",
    Action.REGENERATE: "The reply did not meet the policy of this service and was withheld.",
}
"""What the caller is told when a rule stops the reply and has no message of its own."""

ERROR_MESSAGE = "This request could not be checked, so it was not answered. Please try again later."

_NOWHERE = Weights(1.0, 0.0, 0.0, 0.0)  # floors never ask about weights; the loader sees to that


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Least and most weight per expert, with the floors that held. Always feasible: Σ lower <= 1 <= Σ upper."""

    lower: Mapping[str, float]
    upper: Mapping[str, float]
    raised: tuple[str, ...]
    """Places of the floors that held, such as ``floors[0]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A numeric limit that a rule of one checkpoint compares with."""

    quantity: str
    """Such as ``needs.harmless``."""
    op: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One rule, tried."""

    rule: Rule
    found: tuple[str, ...]
    """Per condition what it asked, what was found, and whether it held."""
    holds: bool | None
    """None when it hangs on a quantity that was not measured."""


def bounds(policy: Policy, evidence: Evidence, floors: Mapping[str, float] | None = None) -> Bounds:
    """The bounds in force for one reading.

    Args:
        policy: Its ``bounds``, and those of its ``floors`` whose conditions hold.
        evidence: What the floors ask about.
        floors: Further lower bounds per expert, such as the ``raises`` of a ``regenerate`` or a ``steer``.

    Raises:
        ReaderError: A floor hangs on a quantity that was not measured. (Where a response alone was read, such a floor
            does not hold: needs are the request's, and nothing is generated under these weights.)
    """
    facts = Facts(
        needs=evidence.needs,
        outcomes=evidence.outcomes,
        weights=_NOWHERE,
        confidence=None,
        in_distribution=evidence.in_distribution,
        mode=evidence.mode,
    )
    wanted = dict(floors or {})
    held = []
    for floor in policy.floors:
        verdict = all_hold(floor.when, facts)
        if verdict is None and evidence.mode != "response":  # a response alone says nothing about the request's needs
            raise ReaderError(f"{floor.place} asks for what was not measured ({_unmeasured(floor.when, facts)})")
        if verdict:
            held.append(floor.place)
            for expert, least in floor.raises.items():
                wanted[expert] = max(wanted.get(expert, 0.0), least)
    return Bounds(lower=raise_lower(policy.lower, policy.upper, wanted), upper=policy.upper, raised=tuple(held))


def raise_lower(
    lower: Mapping[str, float], upper: Mapping[str, float], wanted: Mapping[str, float]
) -> dict[str, float]:
    """Lower bounds raised as far as all of them can be met together.

    A wanted bound above the maximum is cut to it. When the result would sum to more than 1, every raise is shortened by
    the same factor, so that the policy's own minima stay whole and no raised bound takes from another without need.

    >>> raise_lower({"base": 0.0, "harmless": 0.25}, {"base": 1.0, "harmless": 1.0}, {"base": 0.75, "harmless": 1.0})
    {'base': 0.375, 'harmless': 0.625}
    """
    raised = {e: max(low, min(wanted.get(e, 0.0), upper[e])) for e, low in lower.items()}
    least, total = sum(lower.values()), sum(raised.values())
    if total <= 1:
        return raised
    share = max(0.0, (1 - least) / (total - least))
    return {e: low + share * (raised[e] - low) for e, low in lower.items()}


def decide(policy: Policy, checkpoint: str, facts: Facts) -> Decision:
    """What the first matching rule of a checkpoint says.

    A rule that hangs on a quantity nobody measured is not skipped (that could allow by accident): the policy's
    ``on_error`` decides. A policy in shadow mode decides like any other; whoever acts on decisions asks for the mode.

    Raises:
        ValueError: The policy has no such checkpoint.
    """
    for rule in _rules(policy, checkpoint):
        verdict = all_hold(rule.when, facts)
        if verdict is None:
            found = _unmeasured(rule.when, facts)
            return on_error_decision(policy, checkpoint, f"{rule.place} asks for what was not measured ({found})")
        if verdict:
            return _decision(checkpoint, rule, facts)
    return on_error_decision(policy, checkpoint, "no rule matched")  # the loader demands a default rule


def attempts(policy: Policy, checkpoint: str, facts: Facts) -> list[Attempt]:
    """Each rule that `decide` tries, up to the one that settles it; for people."""
    tried = []
    for rule in _rules(policy, checkpoint):
        holds = all_hold(rule.when, facts)
        found = []
        for condition in rule.when:
            verdict = {True: "yes", False: "no", None: "not measured"}[condition.holds(facts)]
            found.append(f"{show_found(condition, facts)} {_asked(condition.op, condition.value)}? {verdict}")
        tried.append(Attempt(rule=rule, found=tuple(found), holds=holds))
        if holds is not False:
            break
    return tried


def thresholds(policy: Policy, checkpoint: str) -> tuple[Threshold, ...]:
    """The numeric limits on needs and outcomes at which a checkpoint's rules act, each once, in order.

    A rule that allows, flags or steers passes no verdict on the reply, so its limits are left out.
    """
    limits = {
        Threshold(quantity=c.quantity, op=c.op, value=float(c.value)): None
        for rule in _rules(policy, checkpoint)
        if rule.then not in (Action.ALLOW, Action.FLAG, Action.STEER)
        for c in rule.when
        if c.quantity.startswith(("needs.", "outcomes.")) and QUANTITIES[c.quantity].kind == "number"
    }
    return tuple(limits)


def steers(policy: Policy) -> bool:
    """True when a rule may change the weights while the reply is made."""
    return any(rule.then is Action.STEER for rule in policy.checkpoints["output"])


def on_error_decision(policy: Policy, checkpoint: str, reason: str) -> Decision:
    """What the policy's ``on_error`` says when a part failed: refuse when ``closed``, allow when ``open``."""
    closed = policy.on_error == "closed"
    return Decision(
        checkpoint=checkpoint,
        action=Action.REFUSE if closed else Action.ALLOW,
        rule="on_error",
        reason=reason,
        message=ERROR_MESSAGE if closed else None,
    )


def _rules(policy: Policy, checkpoint: str) -> tuple[Rule, ...]:
    try:
        return policy.checkpoints[checkpoint]
    except KeyError:
        raise ValueError(f"policy {policy.name} has no checkpoint {checkpoint!r}") from None


def _decision(checkpoint: str, rule: Rule, facts: Facts) -> Decision:
    asked = [f"{show_found(c, facts)} {_asked(c.op, c.value)}" for c in rule.when]
    return Decision(
        checkpoint=checkpoint,
        action=rule.then,
        rule=rule.place,
        reason=", ".join(asked) or "no other rule matched",
        message=rule.message if rule.message is not None else DEFAULT_MESSAGES.get(rule.then),
        raises={e: rule.raises[e] for e in EXPERTS if e in rule.raises},
    )


def _asked(op: str, value: float | bool | str) -> str:
    return f"is {str(value).lower()}" if op == "==" else f"{op} {value}"


def _unmeasured(when: When, facts: Facts) -> str:
    return ", ".join(c.quantity for c in when if c.holds(facts) is None)
