"""Which rules can never decide: those that contradict themselves, and those that earlier rules leave nothing to.

Numbers are intervals, so that the rules of one checkpoint are boxes, and what reaches a rule is its box without those
of the rules before it. Conditions on names, patterns, hours and arguments are compared as far as that is easy to tell;
a rule is reported only where it is certain. Every policy is total by its default rule, which always matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hhh_router.policy.rules import OPERATORS, QUANTITIES, Condition, Facts, Rule
from hhh_router.types import Action, Situation, ToolFacts, Weights

MAX_PIECES = 12
"""Boxes that are left of one rule; with more of them, nothing is claimed."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers between two ends; an end belongs to it unless it is open."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    @property
    def is_empty(self) -> bool:
        """True when no number lies in it."""
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))

    def meet(self, other: Interval) -> Interval:
        """What lies in both."""
        low, low_open = max((self.low, self.low_open), (other.low, other.low_open))
        high, high_closed = min((self.high, not self.high_open), (other.high, not other.high_open))
        return Interval(low, high, low_open, not high_closed)

    def without(self, other: Interval) -> Iterator[Interval]:
        """What lies here and not in the other."""
        for piece in (
            Interval(self.low, other.low, self.low_open, not other.low_open),
            Interval(other.high, self.high, not other.high_open, self.high_open),
        ):
            inside = self.meet(piece)
            if not inside.is_empty:
                yield inside


Box = Mapping[str, Interval]


def contradiction(rule: Rule, lower: Mapping[str, float], upper: Mapping[str, float]) -> str | None:
    """Why no evidence can ever match a rule; None where some may."""
    least = 0.0
    for condition in rule.when:
        group, _, name = condition.quantity.partition(".")
        if group == "weights":
            inside = interval(condition).meet(Interval(lower[name], upper[name]))
            if inside.is_empty:
                return f"{condition} can never hold, bounds.{name} is {lower[name]:g} to {upper[name]:g}"
            least += inside.low - lower[name]
    if sum(lower.values()) + least > 1 + 1e-9:
        return "the weights it asks for sum to more than 1"
    modes = next((c.values for c in rule.when if c.quantity == "mode"), ())
    needs = next((c.quantity for c in rule.when if c.quantity.startswith("needs.")), None)
    if needs and set(modes) == {"response"}:
        return f"{needs} is never measured where a response alone was read"
    return None


def unreachable(rules: Sequence[Rule]) -> Iterator[tuple[int, list[int]]]:
    """Rules that earlier ones leave nothing to: its position, and theirs. The default rule is never among them.

    A rule in shadow mode or for a part of the traffic takes nothing away from those after it.
    """
    boxes, others = [box_of(rule) for rule in rules], [_other(rule) for rule in rules]
    taking: list[int] = []  # positions of the rules so far that take something away
    for j, rule in enumerate(rules):
        if not rule.is_default:
            covering = [i for i in taking if _implies(rule, rules[i])][:1]
            if not covering:
                touching = [i for i in taking if others[i] <= others[j] and _touch(boxes[j], boxes[i])]
                covering = touching if touching and not _left(boxes[j], [boxes[i] for i in touching]) else []
            if covering:
                yield j, covering
        if not rule.shadow and rule.rollout is None:
            taking.append(j)


def may_pass(rules: Sequence[Rule], tool: str) -> bool:
    """Whether some call of a tool may pass; False where the rules stop every one of them by the name alone.

    A call that is held may pass. A rule in shadow mode, or for a part of the traffic, stops nobody for certain.
    """
    named = Facts(
        needs={}, outcomes={}, weights=Weights(1.0, 0.0, 0.0, 0.0), confidence=None, in_distribution=None, mode=None,
        situation=Situation(tool=ToolFacts(name=tool)),
    )  # fmt: skip
    for rule in rules:
        names = [c for c in rule.when if c.quantity == "tool.name"]
        if rule.shadow or not all(c.holds(named) for c in names):
            continue
        stops = rule.then.stops and rule.then is not Action.HOLD
        if not stops:
            return True
        if len(names) == len(rule.when) and rule.rollout is None:
            return False
    return True


def interval(condition: Condition) -> Interval:
    """The numbers that satisfy a comparison."""
    most = 1.0 if QUANTITIES[condition.quantity].kind == "number" else float("inf")
    limit = float(condition.value)  # type: ignore[arg-type]  # a number
    if condition.op[0] == ">":
        return Interval(limit, most, condition.op == ">", False)
    return Interval(0.0, limit, False, condition.op == "<")


def box_of(rule: Rule) -> Box:
    """The numbers that a rule asks for, by quantity."""
    return {c.quantity: interval(c) for c in rule.when if _is_numeric(c)}


def _is_numeric(condition: Condition) -> bool:
    quantity = QUANTITIES.get(condition.quantity)
    return quantity is not None and quantity.kind in ("number", "count") and condition.op in OPERATORS


def _other(rule: Rule) -> frozenset[Condition]:
    """The conditions that are no intervals. A box may be cut off only under the same ones, or fewer."""
    return frozenset(c for c in rule.when if not _is_numeric(c))


def _implies(narrow: Rule, wide: Rule) -> bool:
    return all(any(c.implies(w) for c in narrow.when) for w in wide.when)


def _touch(one: Box, other: Box) -> bool:
    return all(not one[q].meet(i).is_empty for q, i in other.items() if q in one)


def _left(whole: Box, cut: Sequence[Box]) -> bool:
    """Whether something of a box is left after others are cut off; True where that takes too many pieces to tell."""
    pieces = [dict(whole)]
    for box in cut:
        following: list[dict[str, Interval]] = []
        for piece in pieces:
            following.extend(_cut(piece, box))
            if len(following) > MAX_PIECES:
                return True
        pieces = following
    return bool(pieces)


def _cut(piece: Mapping[str, Interval], box: Box) -> Iterator[dict[str, Interval]]:
    if not _touch(piece, box):
        yield dict(piece)
        return
    rest = dict(piece)
    for quantity, inside in box.items():
        most = 1.0 if QUANTITIES[quantity].kind == "number" else float("inf")
        mine = rest.get(quantity, Interval(0.0, most))
        for outside in mine.without(inside):
            yield {**rest, quantity: outside}
        rest[quantity] = mine.meet(inside)
