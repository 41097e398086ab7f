"""A tree of plain data → a ``Policy``, or every mistake in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from hhh_router.policy.check_extras import ExtraValues
from hhh_router.policy.check_rules import TOLERANCE, RuleValues
from hhh_router.policy.reach import contradiction, unreachable
from hhh_router.policy.rules import CHECKPOINTS, Floor, Rule
from hhh_router.policy.schema import (
    BASE_PRIOR,
    MAX_DESCRIPTION,
    MAX_PRIOR,
    MAX_WINDOW_TOKENS,
    PROTECTING,
    REQUIRED_CHECKPOINTS,
    WINDOW_TOKENS,
    Overlay,
    Policy,
    as_document,
    policy_hash,
)
from hhh_router.policy.tree import Listing, Mistake, Node, Place, Scalar, show
from hhh_router.types import DIMENSIONS, EXPERTS

_KEYS = (
    "version", "name", "description", "extends", "weights", "strength",
    "bounds", "floors", "checkpoints", "on_error", "mode", "stream", "overlays", "budget", "lock", "examples",
)  # fmt: skip
_REQUIRED = ("version", "name", "weights", "strength", "checkpoints")
_OVERLAY_KEYS = ("tenants", "may_loosen", "bounds", "floors", "checkpoints", "on_error", "mode")


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


class _Check(RuleValues):
    """Walks the tree once and collects mistakes; a method returns None for what it could not make sense of."""

    # -- the parts of a policy ------------------------------------------------------------------------------------

    def policy(self, root: Node, source: str | None) -> Policy | None:
        entries = self.table(root, "", _KEYS, required=_REQUIRED)
        if entries is None:
            return None
        version = self.integer(entries.get("version"), "version", low=1, high=10**9)
        name = self.name(entries.get("name"), "name")
        description = self.text(entries.get("description"), "description", MAX_DESCRIPTION)
        prior = self._prior(entries.get("weights"))
        strength = self.number(entries.get("strength"), "strength", high=1.0)
        lower, upper = self._bounds(entries.get("bounds"))
        floors = self.floors(entries.get("floors"), "floors", lower, upper)
        checkpoints = self._checkpoints(entries.get("checkpoints"), lower, upper)
        overlays = self._overlays(entries.get("overlays"), lower, upper)
        extras = ExtraValues(self.mistakes)
        budget = extras.budget(entries.get("budget"))
        lock = extras.lock(entries.get("lock"), budget)
        examples = extras.examples(entries.get("examples"))
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
            overlays=overlays,
            budget=budget,
            lock=lock,
            examples=examples,
        )
        return dataclasses.replace(draft, hash=policy_hash(as_document(draft)))

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
        count = len(self.mistakes)
        low, high = self._pairs(node, "bounds")
        lower |= low
        upper |= high
        if node is not None and len(self.mistakes) == count:
            self._check_sums(node.place, "bounds", lower, upper)
        if len(self.mistakes) > count:  # nothing can be held against bounds that are wrong themselves
            return dict.fromkeys(EXPERTS, 0.0), dict.fromkeys(EXPERTS, 1.0)
        return lower, upper

    def _pairs(self, node: Node | None, where: str) -> tuple[dict[str, float], dict[str, float]]:
        """The least and most weights that are named."""
        lower: dict[str, float] = {}
        upper: dict[str, float] = {}
        for expert, value in (self.table(node, where, EXPERTS, word="expert") or {}).items():
            path = f"{where}.{expert}"
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
            lower |= {} if low is None else {expert: low}
            upper |= {} if high is None else {expert: high}
            if low is not None and high is not None and high < low:
                self.wrong(pair["max"].place, f"{path}.max", f"{high:g} is below min {low:g}; min <= max is meant")
        return lower, upper

    def _check_sums(self, place: Place, path: str, lower: Mapping[str, float], upper: Mapping[str, float]) -> None:
        if (least := sum(lower.values())) > 1 + TOLERANCE:
            found = f"the minima sum to {least:g}, but weights sum to 1; lower one of them"
            self.wrong(place, path, found)
        if (most := sum(upper.values())) < 1 - TOLERANCE:
            found = f"the maxima sum to {most:g}, but weights sum to 1; raise one of them"
            self.wrong(place, path, found)

    def _checkpoints(
        self, node: Node | None, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> dict[str, tuple[Rule, ...]]:
        entries = self.table(node, "checkpoints", CHECKPOINTS, required=REQUIRED_CHECKPOINTS, word="checkpoint")
        found = {}
        for checkpoint, rules in (entries or {}).items():
            count = len(self.mistakes)
            found[checkpoint] = self.rules(checkpoint, rules, f"checkpoints.{checkpoint}", lower, upper)
            if len(self.mistakes) == count and isinstance(rules, Listing):
                self._check_reach(rules, found[checkpoint], lower, upper)
        return found

    def _check_reach(
        self,
        node: Listing,
        rules: Sequence[Rule],
        lower: Mapping[str, float],
        upper: Mapping[str, float],
    ) -> None:
        """Report the rules that can never decide. Without a mistake so far, there is a rule for each item."""
        wrong = set()
        for item, rule in zip(node.items, rules, strict=True):
            if why := contradiction(rule, lower, upper):
                self.wrong(item.place, rule.place, f"{why}; correct the conditions, or remove the rule")
                wrong.add(rule.place)
        for i, before in unreachable(rules):
            if rules[i].place not in wrong:
                places = ", ".join(rules[j].place for j in before)
                found = f"is never reached, whatever it asks for is settled by {places}; put it before, or remove it"
                self.wrong(node.items[i].place, rules[i].place, found)

    # -- overlays -------------------------------------------------------------------------------------------------

    def _overlays(
        self, node: Node | None, lower: Mapping[str, float], upper: Mapping[str, float]
    ) -> tuple[Overlay, ...]:
        found = []
        for i, item in enumerate(self.items(node, "overlays", "{tenants: [school-*], checkpoints: …}")):
            overlay = self._overlay(item, f"overlays[{i}]", lower, upper)
            if overlay is not None:
                found.append(overlay)
        return tuple(found)

    def _overlay(self, node: Node, path: str, lower: Mapping[str, float], upper: Mapping[str, float]) -> Overlay | None:
        count = len(self.mistakes)
        entries = self.table(node, path, _OVERLAY_KEYS, required=("tenants",))
        if entries is None:
            return None
        tenants = self.globs(entries.get("tenants"), f"{path}.tenants")
        may_loosen = self.truth(entries.get("may_loosen"), f"{path}.may_loosen")
        low, high = self._overlay_bounds(entries.get("bounds"), f"{path}.bounds", lower, upper, may_loosen)
        least, most = {**lower, **low}, {**upper, **high}
        floors = self.floors(entries.get("floors"), f"{path}.floors", least, most)
        if not may_loosen:
            self._check_floors(entries.get("floors"), floors, f"{path}.floors")
        checkpoints = self.table(entries.get("checkpoints"), f"{path}.checkpoints", CHECKPOINTS, word="checkpoint")
        rules = {
            c: self.rules(c, rules, f"{path}.checkpoints.{c}", least, most, needs_default=False)
            for c, rules in (checkpoints or {}).items()
        }
        words = {}
        for key, strict, lax in (("on_error", "closed", "open"), ("mode", "enforce", "shadow")):
            if key in entries:
                words[key] = self.choice(entries[key], f"{path}.{key}", (strict, lax), default=strict)
                if words[key] == lax and not may_loosen:
                    self._loosens(entries[key], f"{path}.{key}", f"{lax} is less strict")
        if len(self.mistakes) > count or not tenants:
            return None
        return Overlay(
            place=path,
            tenants=tenants,
            may_loosen=may_loosen,
            lower=low,
            upper=high,
            floors=floors,
            checkpoints=rules,
            on_error=cast(Literal["closed", "open"] | None, words.get("on_error")),
            mode=cast(Literal["enforce", "shadow"] | None, words.get("mode")),
        )

    def _overlay_bounds(
        self,
        node: Node | None,
        path: str,
        lower: Mapping[str, float],
        upper: Mapping[str, float],
        may_loosen: bool,
    ) -> tuple[dict[str, float], dict[str, float]]:
        low, high = self._pairs(node, path)
        if node is not None and not may_loosen:
            for expert in (*low, *high):
                protects = expert in PROTECTING
                if (expert in low) is not protects or (expert in high) is protects:
                    what = "max" if protects else "min"
                    why = f"a {what} for {expert} may weaken {' or '.join(PROTECTING)}"
                    self._loosens(node, f"{path}.{expert}.{what}", why)
                elif expert in low and low[expert] < lower[expert]:
                    self._loosens(node, f"{path}.{expert}.min", f"{low[expert]:g} is below {lower[expert]:g}")
                elif expert in high and high[expert] > upper[expert]:
                    self._loosens(node, f"{path}.{expert}.max", f"{high[expert]:g} is above {upper[expert]:g}")
        if node is not None:
            self._check_sums(node.place, path, {**lower, **low}, {**upper, **high})
            for expert in EXPERTS:
                least, most = {**lower, **low}[expert], {**upper, **high}[expert]
                if least > most and (expert in low) is not (expert in high):
                    found = f"min {least:g} is above max {most:g}, with the policy's own bounds; min <= max is meant"
                    self.wrong(node.place, f"{path}.{expert}", found)
        return low, high

    def _check_floors(self, node: Node | None, floors: Sequence[Floor], path: str) -> None:
        for floor in floors:
            if wrong := [e for e in floor.raises if e not in PROTECTING]:
                assert node is not None
                self._loosens(node, f"{path}.raise.{wrong[0]}", f"{wrong[0]} may weaken {' or '.join(PROTECTING)}")

    def _loosens(self, node: Node, path: str, why: str) -> None:
        self.wrong(node.place, path, f"{why}; an overlay may only tighten, unless it has may_loosen: true")

    def _stream(self, node: Node | None) -> int | None:
        entries = self.table(node, "stream", ("window_tokens",))
        if not entries:
            return WINDOW_TOKENS
        return self.integer(entries["window_tokens"], "stream.window_tokens", low=1, high=MAX_WINDOW_TOKENS)
