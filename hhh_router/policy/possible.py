"""What a policy may decide where some facts are not known any more: every decision that is left open, instead of one.

When a request is decided live, a rule that asks for what was not measured goes to ``on_error``: that is a fact about
the request. When it is decided again later, its text, say, was known then and is not known now. What its rules said
then cannot be told, so both ways are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hhh_router.policy.decide import in_rollout, on_error_decision, rules_at, said, stricter_of
from hhh_router.policy.quantities import find_quantity
from hhh_router.policy.rules import Facts, Rule, When, all_hold
from hhh_router.policy.schema import Policy
from hhh_router.types import Action, Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Possible:
    """What one checkpoint may have concluded."""

    decisions: tuple[Decision, ...]
    """One where it is known; else each that is possible."""
    missing: tuple[str, ...]
    """What would tell which."""

    @property
    def settled(self) -> Decision | None:
        """The decision where all that are possible lead to the same action (by other rules perhaps); else None."""
        actions = {d.action for d in self.decisions}
        return self.decisions[0] if len(actions) == 1 else None


def possible_decisions(policy: Policy, checkpoint: str, facts: Facts) -> Possible:
    """Every decision that a checkpoint may have come to.

    Args:
        policy: From `load_policy`, as it is for the tenant.
        checkpoint: Where.
        facts: None in the situation stands for what is not known any more, not for what was not measured. Rules in
            shadow are left out: they decide nothing.

    Raises:
        ValueError: The policy has no such checkpoint.
    """
    missing: dict[str, None] = {}
    own = list(_reached(policy, checkpoint, rules_at(policy, checkpoint), facts, missing))
    if checkpoint not in policy.stricter:
        return Possible(decisions=tuple(own), missing=tuple(missing))
    nothing = Decision(checkpoint=checkpoint, action=Action.ALLOW, rule="none", reason="no rule matched")
    others = list(_reached(policy, checkpoint, policy.stricter[checkpoint], facts, missing, otherwise=nothing))
    decisions = dict.fromkeys((a, b) for a in range(len(own)) for b in range(len(others)))
    return Possible(decisions=tuple(stricter_of(own[a], others[b]) for a, b in decisions), missing=tuple(missing))


def forgotten(when: When, facts: Facts) -> list[str]:
    """Conditions that cannot be told for want of facts that are not known any more."""
    if all_hold(when, facts) is not None:
        return []
    return [c.quantity for c in when if c.holds(facts) is None and not _is_measured(c.quantity)]


def _reached(
    policy: Policy,
    checkpoint: str,
    rules: tuple[Rule, ...],
    facts: Facts,
    missing: dict[str, None],
    *,
    otherwise: Decision | None = None,
) -> Iterator[Decision]:
    """What each rule that may be the first to match would decide."""
    for rule in rules:
        if rule.shadow:
            continue
        verdict = all_hold(rule.when, facts)
        inside = True if rule.rollout is None else in_rollout(policy.name, rule.rollout, facts.situation)
        if verdict is False or inside is False:
            continue
        unknown = forgotten(rule.when, facts) + (["rollout"] if inside is None else [])
        missing |= dict.fromkeys(unknown)
        measured = [c for c in rule.when if c.holds(facts) is None and _is_measured(c.quantity)]
        yield said(policy, checkpoint, rule, facts, None if measured else True)
        if not unknown:
            return
    yield otherwise or on_error_decision(policy, checkpoint, "no rule matched")


def _is_measured(quantity: str) -> bool:
    row = find_quantity(quantity)
    return row is not None and row.of_reading
