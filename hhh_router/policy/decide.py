"""Facts + policy → a decision, and the bounds its floors lead to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hhh_router.errors import ReaderError
from hhh_router.policy.rules import QUANTITIES, Facts, Rule, When, all_hold, show_found
from hhh_router.policy.schema import REQUIRED_CHECKPOINTS, ROLLOUT_STEPS, SEVERITY, Policy
from hhh_router.types import EXPERTS, Action, Decision, Evidence, Situation, Weights

DEFAULT_MESSAGES: Mapping[Action, str] = {
    Action.REFUSE: "I can't help with that request.",
    Action.ESCALATE: "This request needs a person's attention and was not answered here.",
    Action.HOLD: "This call is held until a person has approved it.",
    Action.BLOCK: "This request was blocked by the policy of this service.",
    Action.REGENERATE: "The reply did not meet the policy of this service and was withheld.",
}
"""What the caller is told when a rule stops the reply and has no message of its own."""

ERROR_MESSAGE = "This request could not be checked, so it was not answered. Please try again later."

_WORDS = {True: "yes", False: "no", None: "not measured"}
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


_NO_SITUATION = Situation()


def bounds(
    policy: Policy,
    evidence: Evidence,
    floors: Mapping[str, float] | None = None,
    situation: Situation = _NO_SITUATION,
) -> Bounds:
    """The bounds in force for one reading.

    Args:
        policy: Its ``bounds``, and those of its ``floors`` whose conditions hold.
        evidence: What the floors ask about.
        floors: Further lower bounds per expert, such as the ``raises`` of a ``regenerate`` or a ``steer``.
        situation: What surrounds the reading.

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
        situation=situation,
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
    A rule in shadow mode never decides: what it would have said is in the decision's ``shadow``. Where a tenant's
    overlay has rules of its own, the stricter of both decisions holds.

    Raises:
        ValueError: The policy has no such checkpoint.
    """
    rules = rules_at(policy, checkpoint)
    decision = _first(policy, checkpoint, rules, facts)
    if checkpoint not in policy.stricter:
        return decision
    other = _first(policy, checkpoint, policy.stricter[checkpoint], facts, total=False)
    return stricter_of(decision, other)


def asks(policy: Policy, checkpoint: str) -> bool:
    """Whether the policy has rules for a checkpoint."""
    return bool(policy.checkpoints.get(checkpoint) or policy.stricter.get(checkpoint))


def asked_for(policy: Policy, checkpoint: str | None = None) -> frozenset[str]:
    """Names of all conditions: those of one checkpoint's rules, or everywhere, floors included."""
    rules = [
        rule
        for checkpoints in (policy.checkpoints, policy.stricter)
        for name, its in checkpoints.items()
        if checkpoint in (None, name)
        for rule in its
    ]
    whens = [rule.when for rule in rules] + ([floor.when for floor in policy.floors] if checkpoint is None else [])
    return frozenset(condition.quantity for when in whens for condition in when)


def _first(policy: Policy, checkpoint: str, rules: tuple[Rule, ...], facts: Facts, *, total: bool = True) -> Decision:
    """The first rule that matches; without one, nothing is decided where the rules need not be ``total``."""
    shadow: list[Decision] = []
    decision = None
    for rule in rules:
        verdict = all_hold(rule.when, facts)
        if verdict is not False and rule.rollout is not None:
            inside = in_rollout(policy.name, rule.rollout, facts.situation)
            verdict = False if inside is False else None if inside is None else verdict
        if verdict is False:
            continue
        if rule.shadow:
            shadow.append(said(policy, checkpoint, rule, facts, verdict))
            continue
        decision = said(policy, checkpoint, rule, facts, verdict)
        break
    if decision is None:
        if total:
            decision = on_error_decision(policy, checkpoint, "no rule matched")  # the loader demands a default rule
        else:
            decision = Decision(checkpoint=checkpoint, action=Action.ALLOW, rule="none", reason="no rule matched")
    return replace(decision, shadow=tuple(shadow)) if shadow else decision


def stricter_of(one: Decision, other: Decision) -> Decision:
    """The stricter of two decisions, with the raises, redactions and shadow records of both."""
    first, second = (other, one) if SEVERITY[other.action] > SEVERITY[one.action] else (one, other)
    raises = dict(first.raises)
    if first.action is second.action:
        for expert, least in second.raises.items():
            raises[expert] = max(raises.get(expert, 0.0), least)
    redact = first.redact + tuple(kind for kind in second.redact if kind not in first.redact)
    return replace(
        first,
        raises=raises,
        redact=redact,
        steering=first.steering or second.steering,
        shadow=one.shadow + other.shadow,
    )


def in_rollout(policy_name: str, percent: float, situation: Situation) -> bool | None:
    """Whether a user or conversation belongs to the first so many percent; None where nobody says who it is.

    The same key always gives the same answer, and a higher percentage keeps everybody it had.
    """
    key = situation.caller.sticky
    if key is None:
        return None
    digest = hashlib.sha256(f"{policy_name}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % ROLLOUT_STEPS < percent * ROLLOUT_STEPS / 100


def attempts(policy: Policy, checkpoint: str, facts: Facts) -> list[Attempt]:
    """Each rule that `decide` tries, up to the one that settles it; for people."""
    tried = []
    for rule in rules_at(policy, checkpoint):
        holds = all_hold(rule.when, facts)
        found = []
        for condition in rule.when:
            verdict = _WORDS[condition.holds(facts)]
            found.append(f"{show_found(condition, facts)} {condition.asked()}? {verdict}")
        if holds is not False and rule.rollout is not None:
            inside = in_rollout(policy.name, rule.rollout, facts.situation)
            found.append(f"in the first {rule.rollout:g} %? {_WORDS[inside]}")
            holds = False if inside is False else None if inside is None else holds
        tried.append(Attempt(rule=rule, found=tuple(found), holds=holds))
        if holds is not False and not rule.shadow:
            break
    return tried


def thresholds(policy: Policy, checkpoint: str) -> tuple[Threshold, ...]:
    """The numeric limits on needs and outcomes at which a checkpoint's rules act, each once, in order.

    A rule that allows, flags or steers passes no verdict on the reply, and one in shadow mode enforces none, so their
    limits are left out.
    """
    limits = {
        Threshold(quantity=c.quantity, op=c.op, value=float(c.value)): None  # type: ignore[arg-type]  # a number
        for rule in (*rules_at(policy, checkpoint), *policy.stricter.get(checkpoint, ()))
        if rule.then not in (Action.ALLOW, Action.FLAG, Action.STEER) and not rule.shadow
        for c in rule.when
        if c.quantity.startswith(("needs.", "outcomes.")) and QUANTITIES[c.quantity].kind == "number"
    }
    return tuple(limits)


def steers(policy: Policy) -> bool:
    """True when a rule may change the weights while the reply is made."""
    rules = (*policy.checkpoints["output"], *policy.stricter.get("output", ()))
    return any(rule.then is Action.STEER and not rule.shadow for rule in rules)


def on_error_decision(policy: Policy, checkpoint: str, reason: str) -> Decision:
    """What the policy's ``on_error`` says when a part failed: stop when ``closed``, allow when ``open``.

    Stopping is a refusal; what concerns a tool is blocked, there is nobody to refuse.
    """
    closed = policy.on_error == "closed"
    stop = Action.BLOCK if checkpoint in ("tool_call", "tool_result") else Action.REFUSE
    return Decision(
        checkpoint=checkpoint,
        action=stop if closed else Action.ALLOW,
        rule="on_error",
        reason=reason,
        message=ERROR_MESSAGE if closed else None,
    )


_ALLOW_REST = (Rule(place="none", when=(), then=Action.ALLOW),)
"""What a policy says at a checkpoint that only a tenant's overlay asks."""


def rules_at(policy: Policy, checkpoint: str) -> tuple[Rule, ...]:
    """The rules that are asked at a checkpoint, in order.

    Raises:
        ValueError: The policy has no such checkpoint.
    """
    if checkpoint in policy.checkpoints:
        return policy.checkpoints[checkpoint]
    if checkpoint in policy.stricter and checkpoint not in REQUIRED_CHECKPOINTS:
        return _ALLOW_REST
    raise ValueError(f"policy {policy.name} has no checkpoint {checkpoint!r}")


def said(policy: Policy, checkpoint: str, rule: Rule, facts: Facts, verdict: bool | None) -> Decision:
    """What a rule that was reached decides; ``on_error`` where it hangs on what was not measured."""
    if verdict is None:
        return _unmeasured_decision(policy, checkpoint, rule, facts)
    return _decision(policy, checkpoint, rule, facts)


def _unmeasured_decision(policy: Policy, checkpoint: str, rule: Rule, facts: Facts) -> Decision:
    found = _unmeasured(rule.when, facts)
    if rule.rollout is not None and facts.situation.caller.sticky is None:
        found = ", ".join(filter(None, (found, "whose rollout it is")))
    return on_error_decision(policy, checkpoint, f"{rule.place} asks for what was not measured ({found})")


def _decision(policy: Policy, checkpoint: str, rule: Rule, facts: Facts) -> Decision:
    asked = [f"{show_found(c, facts)} {c.asked()}" for c in rule.when]
    message = rule.message if rule.message is not None else DEFAULT_MESSAGES.get(rule.then)
    return Decision(
        checkpoint=checkpoint,
        action=rule.then,
        rule=rule.place,
        reason=", ".join(asked) or "no other rule matched",
        message=message if rule.message is None else _filled(message or "", policy, checkpoint, rule, facts),
        raises={e: rule.raises[e] for e in EXPERTS if e in rule.raises},
        upstream=rule.upstream,
        webhook=rule.webhook,
        redact=rule.redact,
        steering=rule.steering,
    )


def _filled(message: str, policy: Policy, checkpoint: str, rule: Rule, facts: Facts) -> str:
    if "{" not in message and "}" not in message:
        return message
    tool = facts.situation.tool
    return message.format(
        policy=policy.name, version=policy.version, checkpoint=checkpoint, rule=rule.place, action=rule.then,
        tool=tool.name if tool else "none",
    )  # fmt: skip


def _unmeasured(when: When, facts: Facts) -> str:
    return ", ".join(c.quantity for c in when if c.holds(facts) is None)
