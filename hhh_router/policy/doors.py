"""What a policy asks of the door it is used at, and whether the door has it.

A condition on a fact that a door does not know would never be measured, and a rule at a checkpoint that it never asks
would never act. Both are found when the door starts, and none is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hhh_router.errors import PolicyError
from hhh_router.policy.decide import steers
from hhh_router.policy.quantities import FAMILIES, QUANTITIES, row_of
from hhh_router.policy.rules import Rule, When
from hhh_router.policy.schema import REQUIRED_CHECKPOINTS, Policy
from hhh_router.policy.values import either
from hhh_router.types import Action

SITUATIONS: frozenset[str] = frozenset(name for name, q in QUANTITIES.items() if not q.of_reading)
"""Rows of conditions that a door has to supply."""

CARRIED: frozenset[str] = frozenset({"upstream", "webhook", "redact", "steering", "hold"})
"""What a rule can ask to be done beyond stopping or passing on."""


_LISTED = 20  # things that a door lacks; more would hide what matters


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What a way to reach the router knows, and can do."""

    name: str
    """For messages: ``the server``."""
    checkpoints: frozenset[str] = frozenset(REQUIRED_CHECKPOINTS)
    """Where it asks the rules."""
    reads_at: frozenset[str] = frozenset(REQUIRED_CHECKPOINTS)
    """Checkpoints at which the model has read something, so that needs, outcomes and the like are known."""
    supplies: frozenset[str] = frozenset()
    """Rows of ``SITUATIONS`` that it knows, and ``rollout`` where it knows what a rollout goes by."""
    carries: frozenset[str] = frozenset()
    """What of ``CARRIED`` it does."""
    redacts_at: frozenset[str] = frozenset()
    """Checkpoints at which it carries out ``redact``."""
    text_while_steering: bool = False
    """True when the reply's text is known where a ``steer`` is decided."""


def lacking(policy: Policy, door: Door) -> list[str]:
    """What the policy asks that the door does not have, one line each; empty when it fits."""
    return list(dict.fromkeys(_lacking(policy, door)))


def check_door(policy: Policy, door: Door) -> None:
    """Refuse a policy that a door could not carry out whole.

    Raises:
        PolicyError: One line for each thing that the door lacks.
    """
    if lines := lacking(policy, door):
        source = policy.source or policy.name
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise PolicyError(
            "\n".join([f"{source}: {line}" for line in lines[:_LISTED]] + more),
            hint="use another policy here, or this one at a door that has it; docs/policies.md lists them under Doors",
        )


def headers_read(policy: Policy) -> frozenset[str]:
    """Names of the headers that the policy's conditions ask for; a door hands over no others."""
    conditions = (c for _, when in _whens(policy) for c in when)
    return frozenset(c.quantity.removeprefix("headers.") for c in conditions if c.quantity.startswith("headers."))


def facts_asked(policy: Policy) -> frozenset[str]:
    """Rows of ``SITUATIONS`` that the policy's conditions ask for."""
    return frozenset(row for _, when in _whens(policy) for c in when if (row := row_of(c.quantity)) in SITUATIONS)


def _lacking(policy: Policy, door: Door) -> Iterator[str]:
    for checkpoint, rule in _rules(policy):
        place = _at(rule.place, rule.line)
        if checkpoint not in door.checkpoints:
            yield f"{place}: {door.name} does not ask at {checkpoint}; it asks at {either(sorted(door.checkpoints))}"
            continue
        yield from (f"{place}.{line}" for line in _unknown(rule.when, door))
        readings = [c.quantity for c in rule.when if row_of(c.quantity) not in SITUATIONS]
        if readings and checkpoint not in door.reads_at:
            yield f"{place}.when: {readings[0]} is not measured at {checkpoint} by {door.name}"
        if rule.rollout is not None and "rollout" not in door.supplies:
            yield f"{place}.rollout: {door.name} does not know users or conversations apart"
        for parameter in ("upstream", "webhook", "redact", "steering"):
            if getattr(rule, parameter) and parameter not in door.carries:
                yield f"{place}.{parameter}: {door.name} does not do this"
        if rule.redact and "redact" in door.carries and checkpoint not in door.redacts_at:
            yield f"{place}.redact: {door.name} redacts at {either(sorted(door.redacts_at))} alone"
        if rule.then is Action.HOLD and "hold" not in door.carries:
            yield f"{place}.then: {door.name} cannot hold a call"
        if checkpoint == "output" and steers(policy) and not door.text_while_steering:
            asked = [c.quantity for c in rule.when if c.quantity in ("text", "length.characters", "language")]
            if asked:
                yield f"{place}.when: {asked[0]} is not known to {door.name} while a reply is steered"
    for floor in (*policy.floors, *(f for o in policy.overlays for f in o.floors)):
        yield from (f"{_at(floor.place, floor.line)}.{line}" for line in _unknown(floor.when, door))
    if policy.overlays and "tenant" not in door.supplies:
        yield f"overlays: {door.name} does not know whose traffic it is"


def _unknown(when: When, door: Door) -> Iterator[str]:
    for condition in when:
        row = row_of(condition.quantity)
        if row in SITUATIONS and row not in door.supplies:
            known = sorted(FAMILIES.get(name, name) for name in door.supplies - {"rollout"})
            yield f"when: {condition.quantity} is not known to {door.name}; it knows {', '.join(known) or 'none'}"


def _at(place: str, line: int | None) -> str:
    return place if line is None else f"line {line}  {place}"


def _rules(policy: Policy) -> Iterator[tuple[str, Rule]]:
    for checkpoints in (policy.checkpoints, *(overlay.checkpoints for overlay in policy.overlays)):
        for checkpoint, rules in checkpoints.items():
            yield from ((checkpoint, rule) for rule in rules)


def _whens(policy: Policy) -> Iterator[tuple[str, When]]:
    for checkpoint, rule in _rules(policy):
        yield checkpoint, rule.when
    for floor in (*policy.floors, *(f for o in policy.overlays for f in o.floors)):
        yield "floors", floor.when
