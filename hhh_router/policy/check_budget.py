"""A budget, and the lock that keeps it, out of a tree."""

from __future__ import annotations

import re
from typing import Any

from hhh_router.policy.schema import ERRORS, MAX_STRENGTHS, Budget, Counted, FittedPart, Lock
from hhh_router.policy.tree import Node, Table, show
from hhh_router.policy.values import Values, either

_COMMON = ("level", "per_group")
_WEIGHT_KEYS = ("weight", "strengths")
_LOCK_KEYS = ("bundle_sha256", "calibration_id", "data", "data_sha256", "policy_sha256")
_HASHES = ("bundle_sha256", "data_sha256", "policy_sha256")
_COUNTED_KEYS = ("n", "share", "bound", "group")
_EARLIER = {"benign_refused": "n_benign", "harm_passed": "n_harmful"}
"""Errors in locks of the form that had one limit, and where their rows were counted."""
_EARLIER_KEYS = ("limit", *_EARLIER.values(), *_EARLIER, *(f"{name}_bound" for name in _EARLIER))


class BudgetValues(Values):
    """Reads what is accepted and what keeps it."""

    def budget(self, node: Node | None) -> Budget | None:
        """The errors that are accepted: those at input alone, or by part."""
        count = len(self.mistakes)
        together = isinstance(node, Table) and not any(name in node.entries for name in ERRORS["input"])
        if together:
            entries = self.table(node, "budget", (*ERRORS, *_COMMON))
            if node is not None and entries is not None and not set(entries) - set(_COMMON):
                self.wrong(node.place, "budget", f"accepts nothing; name what at {either(tuple(ERRORS))}")
        else:
            entries = self.table(node, "budget", (*ERRORS["input"], *_COMMON), required=ERRORS["input"])
        if entries is None:
            return None
        if together:
            most = {part: self._accepted(part, entries[part], f"budget.{part}") for part in ERRORS if part in entries}
        else:
            most = {"input": {name: self._share(entries.get(name), f"budget.{name}") for name in ERRORS["input"]}}
        level = self._share(entries.get("level"), "budget.level")
        weight, strengths = self._weights(entries.get("weights"), level)
        per_group = self.truth(entries.get("per_group"), "budget.per_group")
        if len(self.mistakes) > count:
            return None
        return Budget(
            most={part: {name: float(most[part][name] or 0.0) for name in ERRORS[part]} for part in most},
            level=level, together=together, per_group=per_group, weight=weight, strengths=strengths,
        )  # fmt: skip

    def _accepted(self, part: str, node: Node, path: str) -> dict[str, float | None]:
        more = _WEIGHT_KEYS if part == "weights" else ()
        entries = self.table(node, path, (*ERRORS[part], *more), required=(*ERRORS[part], *more[:1])) or {}
        return {name: self._share(entries.get(name), f"{path}.{name}") for name in ERRORS[part]}

    def _weights(self, node: Node | None, level: float | None) -> tuple[float | None, tuple[float, ...]]:
        if not isinstance(node, Table):
            return None, ()
        weight = self._share(node.entries.get("weight"), "budget.weights.weight")
        listed = node.entries.get("strengths")
        items = self.items(listed, "budget.weights.strengths", "[0.2, 0.6, 1.0]")
        found = [self.number(item, f"budget.weights.strengths[{i}]", high=1.0) for i, item in enumerate(items)]
        strengths = tuple(dict.fromkeys(s for s in found if s is not None))
        if listed is not None and not 1 <= len(strengths) <= MAX_STRENGTHS:
            text = f"{len(strengths)} strengths; 1 to {MAX_STRENGTHS} are meant"
            self.wrong(listed.place, "budget.weights.strengths", text)
        if listed is not None and level is None:
            text = "the rows choose one of them, which only a level can account for; add level, such as 0.95"
            self.wrong(listed.place, "budget.weights.strengths", text)
        return weight, strengths

    def _share(self, node: Node | None, path: str) -> float | None:
        number = self.number(node, path, high=1.0)
        if node is not None and number in (0.0, 1.0):
            self.wrong(node.place, path, f"{show(node)} can never be kept, or always; a share between 0 and 1 is meant")
            return None
        return number

    def lock(self, node: Node | None, budget: Budget | None) -> Lock | None:
        """What ``policy fit`` wrote; a lock of the form that had one limit is read as well.

        Args:
            node: Where it stands.
            budget: Whose level an earlier lock did not repeat.
        """
        count = len(self.mistakes)
        earlier = isinstance(node, Table) and "limit" in node.entries
        more = _EARLIER_KEYS if earlier else ("level", *ERRORS)
        entries = self.table(node, "lock", (*_LOCK_KEYS, *more), required=(*_LOCK_KEYS, *(more if earlier else ())))
        if node is None or entries is None:
            return None
        texts = {key: self.text(entries.get(key), f"lock.{key}", 200) for key in _LOCK_KEYS}
        for key in _HASHES:
            if (found := texts[key]) is not None and not re.fullmatch("[0-9a-f]{64}", found):
                self.wrong(
                    entries[key].place, f"lock.{key}", f"{show(entries[key])} is no sha256; fit the policy again"
                )
        if len(self.mistakes) > count:
            return None
        if earlier:
            level = None if budget is None else budget.level
            parts = {"input": self._part("input", _as_part(entries, node), "lock")}
        else:
            level = self._share(entries.get("level"), "lock.level")
            parts = {part: self._part(part, entries[part], f"lock.{part}") for part in ERRORS if part in entries}
            if not parts:
                self.wrong(node.place, "lock", "has no limit; fit the policy again")
        if len(self.mistakes) > count:
            return None
        return Lock(**{k: str(v) for k, v in texts.items()}, level=level, parts={k: v for k, v in parts.items() if v})

    def _part(self, part: str, node: Node, path: str) -> FittedPart | None:
        names = ERRORS[part]
        entries = self.table(node, path, ("limit", *names, "strength"), required=("limit", *names))
        if entries is None:
            return None
        limit = self.number(entries.get("limit"), f"{path}.limit", high=1.0)
        strength = self.number(entries.get("strength"), f"{path}.strength", high=1.0)
        errors = {name: self._counted(entries[name], f"{path}.{name}") for name in names if name in entries}
        if limit is None or not all(errors.values()):
            return None
        return FittedPart(limit=limit, errors={k: v for k, v in errors.items() if v}, strength=strength)

    def _counted(self, node: Node, path: str) -> Counted | None:
        entries: dict[str, Any] = self.table(node, path, _COUNTED_KEYS, required=_COUNTED_KEYS[:3]) or {}
        n = self.integer(entries.get("n"), f"{path}.n", low=1, high=10**9)
        share = self.number(entries.get("share"), f"{path}.share", high=1.0)
        bound = self.number(entries.get("bound"), f"{path}.bound", high=1.0)
        group = self.text(entries.get("group"), f"{path}.group", 200)
        return (
            None if n is None or share is None or bound is None else Counted(n=n, share=share, bound=bound, group=group)
        )


def _as_part(entries: dict[str, Node], node: Node) -> Table:
    """The figures of an earlier lock as its part ``input`` has them now."""

    def table(found: dict[str, Node | None]) -> Table:
        there = {key: value for key, value in found.items() if value is not None}
        return Table(node.place, there, {key: value.place for key, value in there.items()})

    errors = {
        name: table({"n": entries.get(n), "share": entries.get(name), "bound": entries.get(f"{name}_bound")})
        for name, n in _EARLIER.items()
    }
    return table({"limit": entries.get("limit"), **errors})
