"""Conditions out of a tree, with every mistake noted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from hhh_router.policy.arguments import ROOT
from hhh_router.policy.hours import parse_hours
from hhh_router.policy.patterns import BadPattern, compile_glob, compile_pattern
from hhh_router.policy.quantities import FAMILIES, QUANTITIES, Quantity, find_quantity
from hhh_router.policy.rules import OPERATORS, Condition, When
from hhh_router.policy.schema import MAX_COUNT, NUMBER_PATTERN
from hhh_router.policy.tree import Listing, Node, Place, Scalar, Table, join, shorten, show
from hhh_router.policy.values import Values, did_you_mean, either

MAX_NAMES = 200

_COMPARISON = re.compile(rf"\s*({'|'.join(OPERATORS)})\s*({NUMBER_PATTERN})\s*")
_MEMBERS = re.compile(r"\s*(not in|in)\s*\[(.*)\]\s*", re.DOTALL)
_GROUPS = ("needs", "outcomes", "weights", "conversation", "length", "tool", "key", "headers", ROOT)


class ConditionValues(Values):
    """Reads conditions; a method returns None (or what is empty) for what it could not read."""

    def when(self, node: Node, path: str, *, before_weights: bool, checkpoint: str | None = None) -> When | None:
        """The conditions of a rule or a floor.

        Args:
            node: The mapping.
            path: Where it stands.
            before_weights: True for a floor, which acts before weights and confidence are known.
            checkpoint: Where the rule is asked; None for a floor.
        """
        if not isinstance(node, Table):
            self.wrong(node.place, path, f'{show(node)} is no set of conditions; write {{needs.harmless: ">= 0.9"}}')
            return None
        if not node.entries:
            self.wrong(node.place, path, "has no conditions; name one, or leave 'when' out for the default rule")
            return None
        conditions = []
        for name, value in node.entries.items():
            quantity = find_quantity(name)
            if quantity is None or (before_weights and not quantity.before_weights):
                self._unknown_condition(node.keys[name], path, name, before_weights)
            elif before_weights and quantity.checkpoints[0] != "input":
                found = f"{shorten(name)} is not known when floors apply; ask for it at {either(quantity.checkpoints)}"
                self.wrong(node.keys[name], path, found)
            elif checkpoint is not None and checkpoint not in quantity.checkpoints:
                found = f"{shorten(name)} is known at {either(quantity.checkpoints)} only"
                self.wrong(node.keys[name], path, f"{found}; move the rule, or remove the condition")
            elif condition := self._condition(name, quantity, value, join(path, name)):
                conditions.append(condition)
        return tuple(conditions) if len(conditions) == len(node.entries) else None

    def globs(self, node: Node | None, path: str) -> tuple[str, ...]:
        """Names with ``*`` and ``?``: one, or a list."""
        members = None if node is None else self._members(node, path, "a list of names, like [school-*]")
        for item, text in members[1] if members else ():
            try:
                compile_glob(text)
            except BadPattern as error:
                self.wrong(item.place, path, f"{shorten(text)} {error}")
        if members and members[0] == "not in" and node is not None:
            self.wrong(node.place, path, "names whom it is not for; name those whom it is for")
        return tuple(dict.fromkeys(text for _, text in members[1])) if members else ()

    def _unknown_condition(self, place: Place, path: str, name: str, before_weights: bool) -> None:
        names = [n for n, q in QUANTITIES.items() if q.before_weights or not before_weights]
        if name in QUANTITIES and name not in FAMILIES.values():
            found = f"{shorten(name)} is not known yet when floors apply; use needs, outcomes, in_distribution or mode"
        elif name in _GROUPS:
            found = f"{shorten(name)} is a group; name one of it with a dot, like {_first(names, name)}"
        elif name.startswith("headers."):
            found = f"{shorten(name)} cannot be asked for; name a header in lower case that holds no secret"
        elif name.startswith(ROOT):
            found = f"{shorten(name)} is no path; write one like {ROOT}.amount, {ROOT}.to[*].domain or {ROOT}..path"
        else:
            found = f"{shorten(name)} is not a condition{did_you_mean(name, names)}; use {either(names)}"
        self.wrong(place, path, found)

    def _condition(self, name: str, quantity: Quantity, node: Node, path: str) -> Condition | None:
        text = node.text if isinstance(node, Scalar) else ""
        match quantity.kind:
            case "number":
                return self._comparison(name, node, text, path, most=1.0)
            case "count":
                return self._comparison(name, node, text, path, most=MAX_COUNT)
            case "boolean":
                count = len(self.mistakes)
                held = self.truth(node, path)
                return Condition(quantity=name, op="==", value=held) if len(self.mistakes) == count else None
            case "choice":
                return self._choices(name, quantity, node, text, path)
            case "names":
                return self._names(name, node, path)
            case "patterns":
                return self._patterns(name, node, path)
            case "hours":
                return self._hours(name, node, path)
            case "argument":
                return self._argument(name, node, text, path)

    def _choices(self, name: str, quantity: Quantity, node: Node, text: str, path: str) -> Condition | None:
        items = node.items if isinstance(node, Listing) else (node,)
        found: list[str] = []
        for item in items:
            text = item.text if isinstance(item, Scalar) else ""
            if text not in quantity.choices:
                hint = did_you_mean(text, quantity.choices)
                self.wrong(item.place, path, f"{show(item)} is not a {name}{hint}; use {either(quantity.choices)}")
                return None
            found.append(text)
        if not found:
            self.wrong(node.place, path, f"an empty list; use {either(quantity.choices)}")
            return None
        return Condition(quantity=name, op="==", value=found[0] if len(found) == 1 else tuple(dict.fromkeys(found)))

    def _comparison(self, name: str, node: Node, text: str, path: str, *, most: float) -> Condition | None:
        match = _COMPARISON.fullmatch(text)
        if match is None:
            meant = 'write a comparison (>=, <=, > or <) with a number, in quotes, like ">= 0.90"'
            self.wrong(node.place, path, f"{show(node)} is no comparison; {meant}")
            return None
        op, number = match[1], float(match[2])
        if not 0 <= number <= most:
            what = "no probability or weight; compare with 0 to 1" if most == 1 else f"out of range 0 to {most:g}"
            self.wrong(node.place, path, f"{number:g} is {what}")
            return None
        if (op, number) in ((">", most), ("<", 0.0)):
            values = "values lie between 0 and 1" if most == 1 else f"values lie between 0 and {most:g}"
            self.wrong(node.place, path, f"{show(node)} can never hold; {values}")
            return None
        return Condition(quantity=name, op=op, value=number + 0.0)  # + 0.0 turns -0.0 into 0.0

    def _members(self, node: Node, path: str, example: str) -> tuple[str, list[tuple[Node, str]]] | None:
        """``in`` or ``not in``, and the texts that are named: one, a list, or a list after the word."""
        op = "in"
        texts: list[tuple[Node, str]] = []
        if isinstance(node, Scalar) and (match := _MEMBERS.fullmatch(node.text)):
            op, texts = match[1], [(node, part.strip()) for part in match[2].split(",")]
        elif isinstance(node, Scalar) and node.text and (node.holds_text or node.text not in ("~", "null")):
            texts = [(node, node.text)]
        elif isinstance(node, Listing) and all(isinstance(item, Scalar) for item in node.items):
            texts = [(item, cast(Scalar, item).text) for item in node.items]
        if not 1 <= len(texts) <= MAX_NAMES:
            self.wrong(node.place, path, f"{show(node)} names nothing; write {example}")
            return None
        return op, texts

    def _names(self, name: str, node: Node, path: str) -> Condition | None:
        members = self._members(node, path, "one name, a list [delete_*, move_*], or 'not in [read_*]'")
        if members is None:
            return None
        op, texts = members
        for item, text in texts:
            try:
                compile_glob(text)
            except BadPattern as error:
                self.wrong(item.place, path, f"{shorten(text)} {error}")
                return None
        return Condition(quantity=name, op=op, value=tuple(dict.fromkeys(t for _, t in texts)))

    def _patterns(self, name: str, node: Node, path: str) -> Condition | None:
        items = node.items if isinstance(node, Listing) else (node,)
        found = []
        for item in items:
            text = self.text(item, path, 10_000)
            if text is None:
                return None
            try:
                compile_pattern(text)
            except BadPattern as error:
                self.wrong(item.place, path, f"{shorten(text)} {error}")
                return None
            found.append(text)
        if not found or len(found) > MAX_NAMES:
            self.wrong(node.place, path, f"{len(found)} patterns; 1 to {MAX_NAMES} are meant")
            return None
        return Condition(quantity=name, op="matches", value=tuple(dict.fromkeys(found)))

    def _hours(self, name: str, node: Node, path: str) -> Condition | None:
        op = "in"
        items = node.items if isinstance(node, Listing) else (node,)
        found = []
        for item in items:
            text = self.text(item, path, 200)
            if text is None:
                return None
            if len(items) == 1 and (match := _MEMBERS.fullmatch(text)):
                op, parts = match[1], [part.strip() for part in match[2].split(";")]
            else:
                parts = [text]
            try:
                for part in parts:
                    parse_hours(part)
            except ValueError as error:
                self.wrong(item.place, path, f"{shorten(text)} {error}")
                return None
            found += parts
        if not found or len(found) > MAX_NAMES:
            self.wrong(node.place, path, f"{len(found)} times of the week; 1 to {MAX_NAMES} are meant")
            return None
        return Condition(quantity=name, op=op, value=tuple(dict.fromkeys(found)))

    def _argument(self, name: str, node: Node, text: str, path: str) -> Condition | None:
        if isinstance(node, Scalar):
            if match := _COMPARISON.fullmatch(text):
                number = float(match[2])
                if abs(number) <= MAX_COUNT:
                    return Condition(quantity=name, op=match[1], value=number + 0.0)
                self.wrong(node.place, path, f"{number:g} is out of range; compare with at most {MAX_COUNT:g}")
                return None
            if text in ("present", "absent"):
                return Condition(quantity=name, op="is", value=text)
            if node.is_plain and text.lower() in ("true", "false"):
                return Condition(quantity=name, op="==", value=text.lower() == "true")
        return self._names(name, node, path)


def _first(names: Iterable[str], group: str) -> str:
    return next((n for n in names if n.startswith(f"{group}.")), "needs.harmless")
