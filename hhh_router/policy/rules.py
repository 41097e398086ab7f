"""Conditions, and the rules made of them."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hhh_router.policy.hours import parse_hours
from hhh_router.policy.patterns import MAX_TEXT, compile_glob, compile_pattern, covers
from hhh_router.policy.quantities import CHECKPOINTS, QUANTITIES, Facts, Kind, Quantity, find_quantity
from hhh_router.types import Action

__all__ = [
    "CHECKPOINTS",
    "OPERATORS",
    "QUANTITIES",
    "REMEDIES",
    "Condition",
    "Facts",
    "Floor",
    "Kind",
    "Quantity",
    "Rule",
    "Value",
    "When",
    "all_hold",
    "show_found",
]

Value = float | bool | str | tuple[str, ...]

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
"""Comparisons a numeric condition may use; longer ones first, so that a parser tries them first."""

REMEDIES: Mapping[str, str] = {"unsafe": "harmless", "untruthful": "honest", "unhelpful": "helpful"}
"""Outcome → the dimension that a ``regenerate`` or a ``steer`` raises against it."""

Test = Callable[[Any], bool | None]
"""Whether a value that was found satisfies a condition; None where that cannot be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One comparison, such as ``needs.harmless >= 0.9``."""

    quantity: str
    """A name that `find_quantity` knows."""
    op: str
    """One of ``OPERATORS``; ``==`` for booleans and choices; ``in`` or ``not in`` for names and hours; ``matches`` for
    patterns; ``is`` for what is there or not."""
    value: Value
    """What it is compared with; several values are a tuple."""
    _read: Callable[[Facts], Any] = field(init=False, repr=False, compare=False)
    _test: Test = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        quantity = find_quantity(self.quantity)
        if quantity is None:
            raise ValueError(f"{self.quantity!r} is no condition")
        object.__setattr__(self, "_read", quantity.read)
        object.__setattr__(self, "_test", _make_test(quantity.kind, self.op, self.value))

    def __reduce__(self) -> tuple[Any, ...]:  # what reads and tests is made again
        return _condition, (self.quantity, self.op, self.value)

    def holds(self, facts: Facts) -> bool | None:
        """Whether it holds; None when the quantity was not measured, or is nothing that can be compared."""
        found = self._read(facts)
        return None if found is None else self._test(found)

    def found(self, facts: Facts) -> Any:
        """What it would be compared with; None where it was not measured."""
        return self._read(facts)

    def implies(self, other: Condition) -> bool:
        """Whether ``other`` surely holds where this does; False where that cannot be told easily."""
        if self.quantity != other.quantity:
            return False
        if self.op in OPERATORS and other.op in OPERATORS:
            return _within(self, other)
        mine, theirs = self.values, other.values
        match self.op, other.op:
            case ("in", "in") if _is_names(self.quantity):
                return all(any(covers(wide, one) for wide in theirs) for one in mine)
            case ("not in", "not in") if _is_names(self.quantity):
                return all(any(covers(wide, one) for wide in mine) for one in theirs)
            case ("matches", "matches") | ("in", "in") | ("==", "=="):
                return set(mine) <= set(theirs)
        return self.op == other.op and set(mine) == set(theirs)

    @property
    def values(self) -> tuple[Any, ...]:
        """What it is compared with, always as a tuple."""
        return self.value if isinstance(self.value, tuple) else (self.value,)

    def as_yaml(self) -> Any:
        """The right-hand side as a policy file has it.

        >>> Condition(quantity="needs.harmless", op=">=", value=0.9).as_yaml()
        '>= 0.9'
        >>> Condition(quantity="tool.name", op="not in", value=("read_*", "list_*")).as_yaml()
        'not in [read_*, list_*]'
        """
        if self.op in OPERATORS:
            return f"{self.op} {self.value}"
        if self.op == "not in":
            return f"not in [{('; ' if self.quantity == 'time' else ', ').join(self.values)}]"
        return list(self.value) if isinstance(self.value, tuple) else self.value

    def __str__(self) -> str:
        return f"{self.quantity} {self.asked()}"

    def asked(self) -> str:
        """The comparison for people: ``>= 0.9``, ``is prompt``, ``in [read_*]``."""
        if self.op in OPERATORS:
            return f"{self.op} {self.value}"
        if self.op in ("==", "is") and not isinstance(self.value, tuple):
            return f"is {str(self.value).lower()}"
        op = "in" if self.op == "==" else self.op
        return f"{op} [{', '.join(map(str, self.values))}]"


def _condition(quantity: str, op: str, value: Value) -> Condition:
    return Condition(quantity=quantity, op=op, value=value)


def _is_names(name: str) -> bool:
    """Whether a condition compares names with globs."""
    quantity = find_quantity(name)
    return quantity is not None and quantity.kind in ("names", "argument")


def _make_test(kind: Kind, op: str, value: Value) -> Test:
    """How a value that was found is compared."""
    values = value if isinstance(value, tuple) else (value,)
    if kind == "argument":
        return _argument_test(op, value)
    if op in OPERATORS:
        compare, limit = OPERATORS[op], value
        return lambda found: compare(found, limit) if math.isfinite(found) else None  # type: ignore[arg-type]
    if kind == "names":
        globs, wanted = [compile_glob(str(v)) for v in values], op == "in"
        return lambda found: _fits(found, globs) is wanted
    if kind == "patterns":
        patterns = [compile_pattern(str(v)) for v in values]
        return lambda text: None if len(text) > MAX_TEXT else any(p.search(text) for p in patterns)
    if kind == "hours":
        hours, wanted = [parse_hours(str(v)) for v in values], op == "in"
        return lambda at: None if at.tzinfo is None else any(h.holds(at) for h in hours) is wanted
    return lambda found: found in values


def _fits(found: str | tuple[str, ...], globs: list[Any]) -> bool:
    names = (found,) if isinstance(found, str) else found
    return any(glob.fullmatch(name) for glob in globs for name in names)


def _argument_test(op: str, value: Value) -> Test:
    """Whether one of the selected values satisfies a condition; none selected satisfies only ``absent``.

    A value of another type than the comparison's cannot be compared, so ``"5000"`` is not waved through by a limit on
    numbers.
    """
    if op == "is":
        return lambda found: bool(found) is (value == "present")
    if op in OPERATORS:
        compare, limit = OPERATORS[op], value
        return lambda found: _any(_number(x, compare, limit) for x in found)
    if op == "==":
        return lambda found: _any(x is value if isinstance(x, bool) else None for x in found)
    globs = [compile_glob(str(v)) for v in (value if isinstance(value, tuple) else (value,))]
    wanted = op == "in"
    return lambda found: _any(None if (s := _as_name(x)) is None else _fits(s, globs) is wanted for x in found)


def _any(verdicts: Any) -> bool | None:
    found: list[bool | None] = list(verdicts)
    return True if True in found else None if None in found else False


def _number(found: Any, compare: Callable[[float, float], bool], limit: Any) -> bool | None:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return compare(found, limit) if isinstance(found, int) or math.isfinite(found) else None


def _as_name(found: Any) -> str | None:
    if isinstance(found, str):
        return found
    return None if isinstance(found, list | dict) else json.dumps(found)


def _within(narrow: Condition, wide: Condition) -> bool:
    """Whether all numbers of one comparison satisfy another."""
    a, b = float(narrow.value), float(wide.value)  # type: ignore[arg-type]  # only numbers have an operator
    if narrow.op[0] != wide.op[0]:
        return False
    inside = a > b if narrow.op[0] == ">" else a < b
    return inside or (a == b and (wide.op.endswith("=") or not narrow.op.endswith("=")))


def show_found(condition: Condition, facts: Facts) -> str:
    """What was found for a condition, for people: ``needs.harmless 0.9342``.

    Never what a client wrote (the text, a header, an argument): this goes into logs and replies.
    """
    found = condition.found(facts)
    if found is None:
        return f"{condition.quantity} not measured"
    if condition.op == "matches":
        return f"{condition.quantity} of {len(found):,} characters"
    if condition.quantity.startswith(("tool.arguments", "headers.")):
        return f"{condition.quantity} {'given' if found else 'absent'}"
    if isinstance(found, float):
        return f"{condition.quantity} {found:.4f}"
    if isinstance(found, datetime):
        return f"{condition.quantity} {found.isoformat(timespec='minutes')}"
    if isinstance(found, tuple):
        return f"{condition.quantity} {', '.join(found) or 'none'}"
    return f"{condition.quantity} {found}".lower() if isinstance(found, bool) else f"{condition.quantity} {found}"


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
    """What the caller is told when the action stops the reply; may name ``{policy}``, ``{rule}`` and the like."""
    raises: Mapping[str, float] = field(default_factory=dict)
    """Lower bounds per expert under which a ``regenerate`` runs again or a ``steer`` goes on, in [0, 1]."""
    upstream: str | None = None
    """Name of the upstream that an ``escalate`` hands the request to."""
    webhook: str | None = None
    """URL that is told when the rule decides."""
    redact: tuple[str, ...] = ()
    """Kinds of text that are taken out before the judged text goes on."""
    steering: str | None = None
    """A further instruction for the model."""
    shadow: bool = False
    """True when the rule only records what it would decide."""
    rollout: float | None = None
    """Percent of users or conversations that the rule is for; None is all."""
    line: int | None = field(default=None, compare=False)
    """Of its file."""

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
    line: int | None = field(default=None, compare=False)
    """Of its file."""
