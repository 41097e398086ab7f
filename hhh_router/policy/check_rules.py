"""Rules and floors out of a tree, with every mistake noted."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from hhh_router.policy.arguments import ROOT
from hhh_router.policy.check_conditions import ConditionValues
from hhh_router.policy.rules import OPERATORS, REMEDIES, Floor, Rule, Value, When
from hhh_router.policy.schema import (
    ACTIONS,
    DEFAULT_RAISE,
    MAX_MESSAGE,
    MAX_STEERING,
    NAME_PATTERN,
    NUMBER_PATTERN,
    PASSING,
    PLACEHOLDERS,
    RAISING,
    REDACTIONS,
    ROLLOUT_STEPS,
    SPEAKING,
)
from hhh_router.policy.tree import Listing, Node, Place, Scalar, Table, shorten, show
from hhh_router.policy.values import did_you_mean, either
from hhh_router.types import EXPERTS, Action

TOLERANCE = 1e-9
MAX_NAMES = 200

_COMPARISON = re.compile(rf"\s*({'|'.join(OPERATORS)})\s*({NUMBER_PATTERN})\s*")
_MEMBERS = re.compile(r"\s*(not in|in)\s*\[(.*)\]\s*", re.DOTALL)
_RULE_KEYS = ("when", "then", "message", "raise", "upstream", "webhook", "redact", "steering", "mode", "rollout")
_GROUPS = ("needs", "outcomes", "weights", "conversation", "length", "tool", "key", "headers", ROOT)


class RuleValues(ConditionValues):
    """Reads rules and floors; a method returns None (or what is empty) for what it could not read."""

    def rules(
        self,
        checkpoint: str,
        node: Node,
        path: str,
        lower: Mapping[str, float],
        upper: Mapping[str, float],
        *,
        needs_default: bool = True,
    ) -> tuple[Rule, ...]:
        """The rules of one checkpoint.

        Args:
            checkpoint: Its name.
            node: The list.
            path: Where it stands.
            lower: Least weight per expert, for what rules raise.
            upper: Most weight per expert.
            needs_default: Whether the last rule has to be one without conditions.
        """
        items = self.items(node, path, "{when: …, then: …}")
        found: list[Rule] = []
        default: int | None = None
        for i, item in enumerate(items):
            if default is not None:
                text = f"is never reached, {path}[{default}] has no conditions; put the default rule last"
                self.wrong(item.place, f"{path}[{i}]", text)
            if default is None and isinstance(item, Table) and "when" not in item.entries:
                default = i
            rule = self._rule(checkpoint, item, f"{path}[{i}]", lower, upper)
            if rule is not None:
                found.append(rule)
        if needs_default and default is None and isinstance(node, Listing):
            text = "no default rule; end the list with one that has no 'when', like {then: allow}"
            self.wrong(node.place, path, text)
        return tuple(found)

    def floors(
        self, node: Node | None, path: str, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> tuple[Floor, ...]:
        """Lower bounds that hold under conditions."""
        floors = []
        for i, item in enumerate(self.items(node, path, "{when: …, raise: …}")):
            here = f"{path}[{i}]"
            entries = self.table(item, here, ("when", "raise"), required=("when", "raise"))
            if entries is None:
                continue
            when = self.when(entries["when"], f"{here}.when", before_weights=True) if "when" in entries else None
            raises = self._raise(entries["raise"], f"{here}.raise", lower, upper) if "raise" in entries else {}
            if when and raises:
                floors.append(Floor(place=here, when=when, raises=raises, line=item.place.line))
        return tuple(floors)

    def _rule(
        self, checkpoint: str, node: Node, path: str, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> Rule | None:
        entries = self.table(node, path, _RULE_KEYS, required=("then",))
        if entries is None:
            return None
        when: When | None = ()
        if "when" in entries:
            when = self.when(entries["when"], f"{path}.when", before_weights=False, checkpoint=checkpoint)
        then = self._action(checkpoint, entries.get("then"), f"{path}.then")
        message = self.text(entries.get("message"), f"{path}.message", MAX_MESSAGE)
        if message is not None:
            self._check_message(entries["message"].place, f"{path}.message", message, then)
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
        upstream = self.name(entries.get("upstream"), f"{path}.upstream")
        if upstream is not None and then is not None and then is not Action.ESCALATE:
            self.wrong(entries["upstream"].place, f"{path}.upstream", f"{then} hands nothing on; only escalate does")
        steering = self.text(entries.get("steering"), f"{path}.steering", MAX_STEERING)
        if steering is not None and then is not None and (then not in PASSING or checkpoint != "input"):
            found = "reaches no model; only allow and flag at input can have it"
            self.wrong(entries["steering"].place, f"{path}.steering", found)
        redact = self._redact(entries.get("redact"), f"{path}.redact")
        if redact and then is not None and then not in PASSING:
            found = f"{then} lets nothing through that could be redacted; remove it"
            self.wrong(entries["redact"].place, f"{path}.redact", found)
        webhook = self._webhook(entries.get("webhook"), f"{path}.webhook")
        mode = self.choice(entries.get("mode"), f"{path}.mode", ("enforce", "shadow"), default="enforce")
        rollout = self._rollout(entries.get("rollout"), f"{path}.rollout")
        if when == () and "when" not in entries:  # every evidence must reach a rule that acts
            for key in ("rollout", "mode"):
                if key in entries and (key == "rollout" or mode == "shadow"):
                    found = "the default rule has to hold for everybody; give the rule a 'when', or remove this"
                    self.wrong(entries[key].place, f"{path}.{key}", found)
        if then is None or when is None:
            return None
        return Rule(
            place=path, when=when, then=then, message=message, raises=raises, upstream=upstream, webhook=webhook,
            redact=redact, steering=steering, shadow=mode == "shadow", rollout=rollout, line=node.place.line,
        )  # fmt: skip

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
            why = "there is no reply yet" if checkpoint in ("input", "session") else "no reply is judged here"
            what = f"'{name}' belongs to the checkpoint output, {why}"
        else:
            what = f"{show(node)} is not an action{did_you_mean(name, allowed)}"
        self.wrong(node.place, path, f"{what}; use {either(allowed)}")
        return None

    def _check_message(self, place: Place, path: str, message: str, then: Action | None) -> None:
        if then is not None and then not in SPEAKING:
            self.wrong(place, path, f"nobody would see it, {then} lets the reply through; remove it")
            return
        try:
            parts = list(string.Formatter().parse(message))
        except ValueError as error:
            self.wrong(place, path, f"has a brace that opens or closes nothing ({error}); write {{{{ or }}}} for one")
            return
        for _, name, form, conversion in parts:
            if name is not None and (name not in PLACEHOLDERS or form or conversion):
                what = shorten("{" + name + "}")
                self.wrong(place, path, f"{what} is no placeholder{did_you_mean(name, PLACEHOLDERS)}; use {_braced()}")

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
        least = sum({**lower, **raises}.values())
        if len(self.mistakes) == count and least > 1 + TOLERANCE:
            found = f"with it the minima sum to {least:g}, but weights sum to 1; raise less"
            self.wrong(node.place, path, found)
        return raises

    def name(self, node: Node | None, path: str) -> str | None:
        """A name that can stand in a header."""
        if node is None:
            return None
        if isinstance(node, Scalar) and node.holds_text and re.fullmatch(NAME_PATTERN, node.text):
            return node.text
        meant = "use at most 64 lower-case letters, digits, '.', '_' and '-'"
        self.wrong(node.place, path, f"{show(node)} is no name; {meant}")
        return None

    def _redact(self, node: Node | None, path: str) -> tuple[str, ...]:
        kinds = []
        for i, item in enumerate(self.items(node, path, f"[{', '.join(REDACTIONS)}]")):
            if isinstance(item, Scalar) and item.text in REDACTIONS:
                kinds.append(item.text)
            else:
                hint = did_you_mean(item.text if isinstance(item, Scalar) else None, REDACTIONS)
                found = f"{show(item)} is nothing that can be redacted{hint}; use {either(REDACTIONS)}"
                self.wrong(item.place, f"{path}[{i}]", found)
        return tuple(k for k in REDACTIONS if k in kinds)

    def _webhook(self, node: Node | None, path: str) -> str | None:
        url = self.text(node, path, 2000)
        if node is None or url is None:
            return None
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username
        except ValueError:
            good = False
        if good and not parts.password and url.isprintable() and " " not in url:
            return url
        self.wrong(node.place, path, f"{show(node)} is no http(s) URL without credentials")
        return None

    def _rollout(self, node: Node | None, path: str) -> float | None:
        number = self.number(node, path, high=100.0)
        if node is None or number is None:
            return None
        if number * ROLLOUT_STEPS / 100 < 1:
            self.wrong(node.place, path, f"{show(node)} reaches nobody; a percentage from 0.01 to 100 is meant")
        return number


def _default_raises(when: When, lower: Mapping[str, float], upper: Mapping[str, float]) -> dict[str, float]:
    """What a ``regenerate`` or a ``steer`` raises unless it says so: to a half, the remedy of each outcome it tests."""
    raises = {}
    for condition in when:
        group, _, name = condition.quantity.partition(".")
        if group == "outcomes":
            expert = REMEDIES[name]
            raises[expert] = min(max(DEFAULT_RAISE, lower[expert]), upper[expert])
    return raises


def _braced() -> str:
    return either([f"{{{name}}}" for name in PLACEHOLDERS])


__all__: Sequence[str] = ("TOLERANCE", "RuleValues", "Value")
