"""The closed list of conditions, and the rules made of them.

A new condition is one row in ``QUANTITIES``, and its row in docs/policies.md.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hhh_router.types import EXPERTS, NEEDS, OUTCOMES, Action, Mode, Weights

Value = float | bool | str
Kind = Literal["number", "boolean", "choice"]

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
"""Comparisons a numeric condition may use; longer ones first, so that a parser tries them first."""

REMEDIES: Mapping[str, str] = {"unsafe": "harmless", "untruthful": "honest", "unhelpful": "helpful"}
"""Outcome → the dimension that a ``regenerate`` or a ``steer`` raises against it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rules of one checkpoint may ask about."""

    needs: Mapping[str, float]
    """P(the request needs this behaviour), calibrated."""
    outcomes: Mapping[str, float]
    """P(the reply is unsafe / untruthful / unhelpful), calibrated; at ``input`` those of the prompt alone."""
    weights: Weights
    """What is applied."""
    confidence: float | None
    """Calibrated P(every verdict so far is right); None where it is not known yet."""
    in_distribution: bool
    """False where the reading lies outside the calibration data."""
    mode: Mode
    """What the reading saw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One thing a condition can ask about."""

    kind: Kind
    read: Callable[[Facts], Value | None]
    """Its value; None where it was not measured."""
    meaning: str
    """One line for people."""
    choices: tuple[str, ...] = ()
    """The values of a ``choice``."""
    before_weights: bool = True
    """True when it is known before the weights are, so that a floor may ask about it."""


_INJECTION = "P(the request tries to override its instructions)"


def _need(name: str) -> Callable[[Facts], float | None]:
    return lambda facts: facts.needs.get(name)


def _outcome(name: str) -> Callable[[Facts], float | None]:
    return lambda facts: facts.outcomes.get(name)


def _weight(expert: str) -> Callable[[Facts], float | None]:
    return lambda facts: facts.weights[expert]


def _quantities() -> Iterator[tuple[str, Quantity]]:
    for need in NEEDS:
        meaning = _INJECTION if need == "injection" else f"P(the request needs {need} behaviour)"
        yield f"needs.{need}", Quantity(kind="number", read=_need(need), meaning=meaning)
    for o in OUTCOMES:
        yield f"outcomes.{o}", Quantity(kind="number", read=_outcome(o), meaning=f"P(the reply is {o})")
    yield (
        "confidence",
        Quantity(
            kind="number",
            read=lambda facts: facts.confidence,
            meaning="P(every verdict so far is right)",
            before_weights=False,
        ),
    )
    yield (
        "in_distribution",
        Quantity(
            kind="boolean",
            read=lambda facts: facts.in_distribution,
            meaning="whether the reading lies inside the calibration data's support",
        ),
    )
    for e in EXPERTS:
        meaning = f"applied weight of {'the model without adapters' if e == 'base' else f'the {e} expert'}"
        yield f"weights.{e}", Quantity(kind="number", read=_weight(e), meaning=meaning, before_weights=False)
    yield (
        "mode",
        Quantity(
            kind="choice",
            read=lambda facts: facts.mode,
            meaning="what the reading saw",
            choices=("prompt", "response", "both"),
        ),
    )


QUANTITIES: Mapping[str, Quantity] = dict(_quantities())
"""Every condition there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One comparison, such as ``needs.harmless >= 0.9``."""

    quantity: str
    """A key of ``QUANTITIES``."""
    op: str
    """One of ``OPERATORS``, or ``==`` for booleans and choices."""
    value: Value

    def holds(self, facts: Facts) -> bool | None:
        """Whether it holds; None when the quantity was not measured (or is no number)."""
        found = QUANTITIES[self.quantity].read(facts)
        if found is None:
            return None
        if self.op == "==":
            return found == self.value
        if not math.isfinite(found):  # type: ignore[arg-type]  # only numbers have an operator
            return None
        return OPERATORS[self.op](found, self.value)  # type: ignore[arg-type]

    def as_yaml(self) -> Value:
        """The right-hand side as a policy file has it.

        >>> Condition(quantity="needs.harmless", op=">=", value=0.9).as_yaml()
        '>= 0.9'
        """
        return self.value if self.op == "==" else f"{self.op} {self.value}"

    def __str__(self) -> str:
        if self.op == "==":
            return f"{self.quantity} is {str(self.value).lower()}"
        return f"{self.quantity} {self.op} {self.value}"


def show_found(condition: Condition, facts: Facts) -> str:
    """What was found for a condition, for people: ``needs.harmless 0.9342``."""
    found = QUANTITIES[condition.quantity].read(facts)
    if found is None:
        return f"{condition.quantity} not measured"
    return f"{condition.quantity} {found:.4f}" if isinstance(found, float) else f"{condition.quantity} {found}".lower()


When = tuple[Condition, ...]
"""All of them must hold; empty always holds."""


def all_hold(when: When, facts: Facts) -> bool | None:
    """Whether every condition holds.

    Returns:
        False as soon as one is known not to hold, whatever the others are; None when it hangs on a quantity that was
        not measured; True otherwise.
    """
    verdict: bool | None = True
    for condition in when:
        held = condition.holds(facts)
        if held is False:
            return False
        if held is None:
            verdict = None
    return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When its conditions hold, its action is the decision."""

    place: str
    """Where it stands, such as ``checkpoints.input[0]``."""
    when: When
    """Empty for the default rule."""
    then: Action
    message: str | None = None
    """What the caller is told when the action stops the reply."""
    raises: Mapping[str, float] = field(default_factory=dict)
    """Lower bounds per expert under which a ``regenerate`` runs again or a ``steer`` goes on, in [0, 1]."""

    @property
    def is_default(self) -> bool:
        """True when it asks nothing."""
        return not self.when


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """When its conditions hold, some experts get a higher lower bound."""

    place: str
    """Where it stands, such as ``floors[0]``."""
    when: When
    raises: Mapping[str, float]
    """Lower bound per expert, in [0, 1]."""
