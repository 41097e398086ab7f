"""A tree of plain data → a ``Policy``, or every mistake in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

from hhh_router.policy.rules import OPERATORS, QUANTITIES, REMEDIES, Condition, Floor, Quantity, Rule, When
from hhh_router.policy.schema import (
    ACTIONS,
    BASE_PRIOR,
    CHECKPOINTS,
    DEFAULT_RAISE,
    MAX_DESCRIPTION,
    MAX_MESSAGE,
    MAX_PRIOR,
    MAX_WINDOW_TOKENS,
    NAME_PATTERN,
    NUMBER_PATTERN,
    RAISING,
    SPEAKING,
    WINDOW_TOKENS,
    Policy,
    as_document,
    policy_hash,
)
from hhh_router.policy.tree import Listing, Mistake, Node, Place, Scalar, Table, join, shorten, show
from hhh_router.policy.values import Values, did_you_mean, either
from hhh_router.types import DIMENSIONS, EXPERTS, Action

TOLERANCE = 1e-9

_NUMBER = re.compile(NUMBER_PATTERN)
_COMPARISON = re.compile(rf"\s*({'|'.join(OPERATORS)})\s*({NUMBER_PATTERN})\s*")
_KEYS = (
    "version", "name", "description", "extends", "weights", "strength",
    "bounds", "floors", "checkpoints", "on_error", "mode", "stream",
)  # fmt: skip
_REQUIRED = ("version", "name", "weights", "strength", "checkpoints")

# Keys of the full design that this version does not act on. They are named, so that nobody believes them to work.
_LATER_KEYS = frozenset({"budget", "examples"})
_LATER_CHECKPOINTS = frozenset({"tool_call", "tool_result", "session"})
_LATER_CONDITIONS = frozenset({"role", "language", "length", "model", "route", "tenant", "time"})
_LATER_GROUPS = ("tool.", "key.", "headers.", "budget.", "lexical.")


def policy_from_tree(root: Node, *, source: str | None, mistakes: list[Mistake]) -> Policy | None:
    """Build the policy a tree describes.

    Args:
        root: With ``extends`` already applied.
        source: The file, for the record.
        mistakes: Gets everything that is wrong.

    Returns:
        The policy; None when ``mistakes`` is not empty afterwards.
    """
    return _Check(mistakes).policy(root, source)


class _Check(Values):
    """Walks the tree once and collects mistakes; a method returns None for what it could not make sense of."""

    # -- the parts of a policy ------------------------------------------------------------------------------------

    def policy(self, root: Node, source: str | None) -> Policy | None:
        entries = self.table(root, "", _KEYS, required=_REQUIRED, later=_LATER_KEYS)
        if entries is None:
            return None
        version = self.integer(entries.get("version"), "version", low=1, high=10**9)
        name = self._name(entries.get("name"))
        description = self.text(entries.get("description"), "description", MAX_DESCRIPTION)
        prior = self._prior(entries.get("weights"))
        strength = self.number(entries.get("strength"), "strength", high=1.0)
        lower, upper = self._bounds(entries.get("bounds"))
        floors = self._floors(entries.get("floors"), lower, upper)
        checkpoints = self._checkpoints(entries.get("checkpoints"), lower, upper)
        on_error = self.choice(entries.get("on_error"), "on_error", ("closed", "open"), default="closed")
        mode = self.choice(entries.get("mode"), "mode", ("enforce", "shadow"), default="enforce")
        window_tokens = self._stream(entries.get("stream"))
        if self.mistakes or version is None or name is None or strength is None or window_tokens is None:
            return None
        draft = Policy(
            name=name,
            version=version,
            hash="",
            description=description,
            prior=prior,
            strength=strength,
            lower=lower,
            upper=upper,
            floors=floors,
            checkpoints=checkpoints,
            on_error=cast(Literal["closed", "open"], on_error),
            mode=cast(Literal["enforce", "shadow"], mode),
            window_tokens=window_tokens,
            source=source,
        )
        return dataclasses.replace(draft, hash=policy_hash(as_document(draft)))

    def _name(self, node: Node | None) -> str | None:
        if node is None:
            return None
        if isinstance(node, Scalar) and node.holds_text and re.fullmatch(NAME_PATTERN, node.text):
            return node.text
        self.wrong(
            node.place,
            "name",
            f"{show(node)} is no name; use at most 64 lower-case letters, digits, '.', '_' and '-'",
        )
        return None

    def _prior(self, node: Node | None) -> dict[str, float]:
        prior = dict.fromkeys(EXPERTS, BASE_PRIOR)
        entries = self.table(node, "weights", EXPERTS, required=DIMENSIONS, word="expert")
        if node is None or entries is None:
            return prior
        count = len(self.mistakes)
        for expert, value in entries.items():
            number = self.number(value, f"weights.{expert}", high=MAX_PRIOR)
            prior[expert] = prior[expert] if number is None else number
        if len(self.mistakes) == count and sum(prior.values()) <= 0:
            self.wrong(node.place, "weights", "all are 0; give at least one expert a weight above 0")
        return prior

    def _bounds(self, node: Node | None) -> tuple[dict[str, float], dict[str, float]]:
        lower, upper = dict.fromkeys(EXPERTS, 0.0), dict.fromkeys(EXPERTS, 1.0)
        entries = self.table(node, "bounds", EXPERTS, word="expert")
        if node is None or entries is None:
            return lower, upper
        count = len(self.mistakes)
        for expert, value in entries.items():
            path = f"bounds.{expert}"
            if isinstance(value, Scalar):
                self.wrong(value.place, path, f"{show(value)} is no pair of bounds; write {{min: 0.1, max: 0.6}}")
                continue
            pair = self.table(value, path, ("min", "max"))
            if pair is None:
                continue
            if not pair:
                self.wrong(value.place, path, "neither min nor max; write {min: 0.1}, or leave the line out")
            low = self.number(pair.get("min"), f"{path}.min", high=1.0)
            high = self.number(pair.get("max"), f"{path}.max", high=1.0)
            lower[expert] = 0.0 if low is None else low
            upper[expert] = 1.0 if high is None else high
            if low is not None and high is not None and high < low:
                self.wrong(pair["max"].place, f"{path}.max", f"{high:g} is below min {low:g}; min <= max is meant")
        if len(self.mistakes) == count:
            self._check_sums(node.place, lower, upper)
        if len(self.mistakes) > count:  # nothing can be held against bounds that are wrong themselves
            return dict.fromkeys(EXPERTS, 0.0), dict.fromkeys(EXPERTS, 1.0)
        return lower, upper

    def _check_sums(self, place: Place, lower: Mapping[str, float], upper: Mapping[str, float]) -> None:
        if (least := sum(lower.values())) > 1 + TOLERANCE:
            found = f"the minima sum to {least:g}, but weights sum to 1; lower one of them"
            self.wrong(place, "bounds", found)
        if (most := sum(upper.values())) < 1 - TOLERANCE:
            found = f"the maxima sum to {most:g}, but weights sum to 1; raise one of them"
            self.wrong(place, "bounds", found)

    def _floors(self, node: Node | None, lower: Mapping[str, float], upper: Mapping[str, float]) -> tuple[Floor, ...]:
        floors = []
        for i, item in enumerate(self.items(node, "floors", "{when: …, raise: …}")):
            path = f"floors[{i}]"
            entries = self.table(item, path, ("when", "raise"), required=("when", "raise"))
            if entries is None:
                continue
            when = self._when(entries["when"], f"{path}.when", before_weights=True) if "when" in entries else None
            raises = self._raise(entries["raise"], f"{path}.raise", lower, upper) if "raise" in entries else {}
            if when and raises:
                floors.append(Floor(place=path, when=when, raises=raises))
        return tuple(floors)

    def _checkpoints(
        self, node: Node | None, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> dict[str, tuple[Rule, ...]]:
        entries = self.table(
            node, "checkpoints", CHECKPOINTS, required=CHECKPOINTS, later=_LATER_CHECKPOINTS, word="checkpoint"
        )
        return {c: self._rules(c, rules, lower, upper) for c, rules in (entries or {}).items()}

    def _rules(
        self, checkpoint: str, node: Node, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> tuple[Rule, ...]:
        path = f"checkpoints.{checkpoint}"
        items = self.items(node, path, "{when: …, then: …}")
        rules: list[Rule] = []
        default: int | None = None
        for i, item in enumerate(items):
            if default is not None:
                found = f"is never reached, {path}[{default}] has no conditions; put the default rule last"
                self.wrong(item.place, f"{path}[{i}]", found)
            if default is None and isinstance(item, Table) and "when" not in item.entries:
                default = i
            rule = self._rule(checkpoint, item, f"{path}[{i}]", lower, upper)
            if rule is not None:
                rules.append(rule)
        if default is None and isinstance(node, Listing):
            self.wrong(
                node.place, path, "no default rule; end the list with one that has no 'when', like {then: allow}"
            )
        return tuple(rules)

    def _rule(
        self, checkpoint: str, node: Node, path: str, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> Rule | None:
        entries = self.table(node, path, ("when", "then", "message", "raise"), required=("then",))
        if entries is None:
            return None
        when = self._when(entries["when"], f"{path}.when", before_weights=False) if "when" in entries else ()
        then = self._action(checkpoint, entries.get("then"), f"{path}.then")
        message = self.text(entries.get("message"), f"{path}.message", MAX_MESSAGE)
        if message is not None and then is not None and then not in SPEAKING:
            found = f"nobody would see it, {then} lets the reply through; remove it"
            self.wrong(entries["message"].place, f"{path}.message", found)
        raises: dict[str, float] = {}
        if "raise" in entries:
            raises = self._raise(entries["raise"], f"{path}.raise", lower, upper)
            if then is not None and then not in RAISING:
                found = f"{then} changes no weights; only steer and regenerate (at output) have a raise"
                self.wrong(entries["raise"].place, f"{path}.raise", found)
        elif then in RAISING and when is not None:
            raises = _default_raises(when, lower, upper)
            if not raises:
                found = f"{then} needs to know what to raise; add raise: {{harmless: 0.6}}, or test an outcome"
                self.wrong(entries["then"].place, f"{path}.then", found)
        if then is None or when is None:
            return None
        return Rule(place=path, when=when, then=then, message=message, raises=raises)

    def _action(self, checkpoint: str, node: Node | None, path: str) -> Action | None:
        if node is None:
            return None
        allowed = ACTIONS[checkpoint]
        name = node.text if isinstance(node, Scalar) else None
        if name in allowed:
            return Action(name)
        if name == Action.HOLD:
            what = "'hold' belongs to the checkpoint tool_call"
        elif name in RAISING:
            what = f"'{name}' belongs to the checkpoint output, there is no reply yet"
        else:
            what = f"{show(node)} is not an action{did_you_mean(name, allowed)}"
        self.wrong(node.place, path, f"{what}; use {either(allowed)}")
        return None

    def _raise(self, node: Node, path: str, lower: Mapping[str, float], upper: Mapping[str, float]) -> dict[str, float]:
        entries = self.table(node, path, EXPERTS, word="expert")
        if entries is None:
            return {}
        count = len(self.mistakes)
        if not entries:
            self.wrong(node.place, path, "raises nothing; name an expert, like {harmless: 0.5}")
        raises: dict[str, float] = {}
        for expert, value in entries.items():
            number = self.number(value, f"{path}.{expert}", high=1.0)
            if number is None:
                continue
            raises[expert] = number
            if number < lower[expert]:
                found = f"{number:g} is below bounds.{expert}.min {lower[expert]:g}; a raise may raise, never lower"
                self.wrong(value.place, f"{path}.{expert}", found)
            if number > upper[expert]:
                found = f"{number:g} is above bounds.{expert}.max {upper[expert]:g}; raise the maximum or lower this"
                self.wrong(value.place, f"{path}.{expert}", found)
        least = sum((lower | raises).values()) if isinstance(lower, dict) else 0.0
        if len(self.mistakes) == count and least > 1 + TOLERANCE:
            found = f"with it the minima sum to {least:g}, but weights sum to 1; raise less"
            self.wrong(node.place, path, found)
        return raises

    def _stream(self, node: Node | None) -> int | None:
        entries = self.table(node, "stream", ("window_tokens",))
        if not entries:
            return WINDOW_TOKENS
        return self.integer(entries["window_tokens"], "stream.window_tokens", low=1, high=MAX_WINDOW_TOKENS)

    # -- conditions -----------------------------------------------------------------------------------------------

    def _when(self, node: Node, path: str, *, before_weights: bool) -> When | None:
        names = [n for n, q in QUANTITIES.items() if q.before_weights or not before_weights]
        if not isinstance(node, Table):
            self.wrong(node.place, path, f'{show(node)} is no set of conditions; write {{needs.harmless: ">= 0.9"}}')
            return None
        if not node.entries:
            self.wrong(node.place, path, "has no conditions; name one, or leave 'when' out for the default rule")
            return None
        conditions = []
        for name, value in node.entries.items():
            if name not in names:
                self._unknown_condition(node.keys[name], path, name, names)
            elif condition := self._condition(name, QUANTITIES[name], value, join(path, name)):
                conditions.append(condition)
        return tuple(conditions) if len(conditions) == len(node.entries) else None

    def _unknown_condition(self, place: Place, path: str, name: str, names: Sequence[str]) -> None:
        if name in QUANTITIES:
            found = f"{shorten(name)} is not known yet when floors apply; use needs, outcomes, in_distribution or mode"
        elif name in _LATER_CONDITIONS or name.startswith(_LATER_GROUPS):
            found = f"{shorten(name)} is not supported yet; remove the condition"
        elif isinstance(name, str) and name in ("needs", "outcomes", "weights"):
            found = f"{shorten(name)} is a group; name one of it with a dot, like {_first(names, name)}"
        else:
            found = f"{shorten(name)} is not a condition{did_you_mean(name, names)}; use {either(names)}"
        self.wrong(place, path, found)

    def _condition(self, name: str, quantity: Quantity, node: Node, path: str) -> Condition | None:
        text = node.text if isinstance(node, Scalar) else ""
        if quantity.kind == "number":
            return self._comparison(name, node, text, path)
        if quantity.kind == "boolean":
            if isinstance(node, Scalar) and node.is_plain and text.lower() in ("true", "false"):
                return Condition(quantity=name, op="==", value=text.lower() == "true")
            self.wrong(node.place, path, f"{show(node)} is no truth value; write true or false")
            return None
        if text in quantity.choices:
            return Condition(quantity=name, op="==", value=text)
        hint = did_you_mean(text, quantity.choices)
        self.wrong(node.place, path, f"{show(node)} is not a {name}{hint}; use {either(quantity.choices)}")
        return None

    def _comparison(self, name: str, node: Node, text: str, path: str) -> Condition | None:
        match = _COMPARISON.fullmatch(text)
        if match is None:
            meant = 'write a comparison (>=, <=, > or <) with a number, in quotes, like ">= 0.90"'
            self.wrong(node.place, path, f"{show(node)} is no comparison; {meant}")
            return None
        op, number = match[1], float(match[2])
        if not 0 <= number <= 1:
            self.wrong(node.place, path, f"{number:g} is no probability or weight; compare with 0 to 1")
            return None
        if (op, number) in ((">", 1.0), ("<", 0.0)):
            self.wrong(node.place, path, f"{show(node)} can never hold; values lie between 0 and 1")
            return None
        return Condition(quantity=name, op=op, value=number + 0.0)  # + 0.0 turns -0.0 into 0.0


def _default_raises(when: When, lower: Mapping[str, float], upper: Mapping[str, float]) -> dict[str, float]:
    """What a ``regenerate`` or a ``steer`` raises unless it says so: to a half, the remedy of each outcome it tests."""
    raises = {}
    for condition in when:
        group, _, name = condition.quantity.partition(".")
        if group == "outcomes":
            expert = REMEDIES[name]
            raises[expert] = min(max(DEFAULT_RAISE, lower[expert]), upper[expert])
    return raises


def _first(names: Iterable[str], group: str) -> str:
    return next((n for n in names if n.startswith(f"{group}.")), "needs.harmless")
