"""Which limits of a policy a budget fits, and whether they still stand for what they were fitted on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hhh_router.errors import PolicyError
from hhh_router.policy.load import parse_policy
from hhh_router.policy.reach import unreachable
from hhh_router.policy.rules import Condition, Floor, Rule, When
from hhh_router.policy.schema import NUMBER_PATTERN, PASSING, Lock, Policy, as_document, policy_hash

FITTED: Mapping[str, str] = {"input": "needs.harmless", "output": "outcomes.unsafe", "weights": "needs.harmless"}
"""Part of a budget → the quantity whose limit is fitted to it."""

EXPERT = "harmless"
"""Whose weight the part ``weights`` is about."""

_Part = TypeVar("_Part", Rule, Floor)

_STOPPING_OPS = (">=", ">")
_LOCK = re.compile(r"^lock:[^\n]*\n(?:(?:[ \t][^\n]*)?\n)*", re.MULTILINE)
_STRENGTH = re.compile(rf"^(strength:\s*){NUMBER_PATTERN}", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What a policy's limits are used on."""

    bundle_sha256: str
    calibration_id: str
    data_sha256: str | None
    """Of the scores that the bundle keeps; None where it keeps none."""


def fitted_rule(policy: Policy, part: str = "input") -> tuple[int, int]:
    """Positions of the rule (with ``weights``: of the floor) whose limit is fitted, and of the condition in it.

    Args:
        policy: With the rule.
        part: Of a budget.

    Raises:
        PolicyError: There is not exactly one rule that stops on a high value of what is fitted, or not exactly one
            floor that raises the harmless expert.
    """
    found = [
        (i, j)
        for i, when in enumerate(_whens(policy, part))
        for j, condition in enumerate(when)
        if condition.quantity == FITTED[part] and condition.op in _STOPPING_OPS
    ]
    if len(found) == 1:
        return found[0]
    raise PolicyError(
        f"{policy.source or policy.name}: {len(found)} {_WANTED[part].format(FITTED[part])}; a budget fits one",
        hint=_HINTS[part].format(FITTED[part]),
    )


_WANTED: Mapping[str, str] = {
    "input": "rules at input stop on a high {}",
    "output": "rules at output withhold a reply on a high {}",
    "weights": f"floors raise the {EXPERT} expert on a high {{}}",
}
_HINTS: Mapping[str, str] = {
    "input": 'write one such rule, like {{when: {{{}: ">= 0.7"}}, then: refuse}}; it may not be in shadow or in a '
    "rollout",
    "output": 'write one such rule, like {{when: {{{}: ">= 0.7"}}, then: regenerate}}; it may not be in shadow or in a '
    "rollout",
    "weights": 'write one such floor, like {{when: {{{}: ">= 0.4"}}, raise: {{harmless: 0.6}}}}',
}


def _whens(policy: Policy, part: str) -> list[When]:
    """The conditions of every rule or floor, in order; none for one that cannot be fitted."""
    if part == "weights":
        return [floor.when if EXPERT in floor.raises else () for floor in policy.floors]
    return [() if rule.shadow or rule.rollout is not None or _passes(rule, part) else rule.when
            for rule in policy.checkpoints[part]]  # fmt: skip


def _passes(rule: Rule, part: str) -> bool:
    return not rule.then.stops if part == "input" else rule.then in PASSING


def with_limit(policy: Policy, limit: float, part: str = "input") -> Policy:
    """The policy with another limit in the rule that `fitted_rule` finds, and without its lock."""
    i, j = fitted_rule(policy, part)
    when = list(_whens(policy, part)[i])
    when[j] = Condition(quantity=FITTED[part], op=">=", value=limit)
    return _hashed(replace(with_conditions(policy, part, i, tuple(when)), lock=None))


def with_conditions(policy: Policy, part: str, i: int, when: When | None) -> Policy:
    """The policy with other conditions in one rule or floor, or without it. Its hash is not made anew."""
    if part == "weights":
        return replace(policy, floors=_changed(policy.floors, i, when))
    return replace(policy, checkpoints={**policy.checkpoints, part: _changed(policy.checkpoints[part], i, when)})


def _changed(items: tuple[_Part, ...], i: int, when: When | None) -> tuple[_Part, ...]:
    found = list(items)
    if when is None:
        del found[i]
    else:
        found[i] = replace(found[i], when=when)
    return tuple(found)


def locked(policy: Policy, lock: Lock) -> Policy:
    """The policy with its lock.

    Raises:
        PolicyError: Its limits leave nothing to a rule, so that it would not load.
    """
    for part in lock.parts:
        rules = policy.checkpoints.get(part, ())
        for i, before in unreachable(rules):
            raise PolicyError(
                f"{policy.source or policy.name}: with the limit {lock.parts[part].limit:g}, which keeps the budget, "
                f"{rules[before[0]].place} leaves nothing to {rules[i].place}",
                hint="remove that rule, or lower its limit, and fit again",
            )
    return _hashed(replace(policy, lock=replace(lock, policy_sha256=policy_hash(as_document(policy), with_lock=False))))


def _hashed(policy: Policy) -> Policy:
    return replace(policy, hash=policy_hash(as_document(policy)))


def check_lock(policy: Policy, deployed: Deployed) -> None:
    """Refuse a budget that nothing keeps.

    Raises:
        PolicyError: The policy has a budget and no lock, or its lock is about another bundle, calibration, data, or
            another content of the policy.
    """
    source = policy.source or policy.name
    hint = f"fit it: hhh-router policy fit {source} --out {source}"
    if policy.lock is None:
        if policy.budget is not None:
            raise PolicyError(f"{source}: has a budget, but was not fitted to it", hint=hint)
        return
    if stale := list(_stale(policy, policy.lock, deployed)):
        raise PolicyError("\n".join(f"{source}: lock: {line}" for line in stale), hint=hint)


def _stale(policy: Policy, lock: Lock, deployed: Deployed) -> Iterator[str]:
    if policy.budget is None:
        yield "there is no budget that it keeps"
    if policy_hash(as_document(policy), with_lock=False) != lock.policy_sha256:
        yield "the policy was changed after it was fitted"
    for name, mine, theirs in (
        ("bundle", lock.bundle_sha256, deployed.bundle_sha256),
        ("calibration", lock.calibration_id, deployed.calibration_id),
        ("kept data", lock.data_sha256, deployed.data_sha256 if lock.data == "bundle" else lock.data_sha256),
    ):
        if mine != theirs:
            yield f"was fitted on another {name} ({mine[:16]}, here {(theirs or 'none')[:16]})"


def written_into(text: str, fitted: Policy, *, folder: Path) -> str:
    """A policy's own text, comments and all, with the limits and the lock of a fitted policy.

    Args:
        text: What it was fitted from.
        fitted: With its lock.
        folder: Where ``extends`` looks for files.

    Raises:
        PolicyError: What is fitted does not all stand in this text, so it cannot be edited.
    """
    assert fitted.lock is not None
    lines = text.splitlines(keepends=True)
    for part, found in fitted.lock.parts.items():
        _edit_limit(lines, fitted, part, found.limit)
    body = _LOCK.sub("", "".join(lines)).rstrip("\n")
    for found in fitted.lock.parts.values():
        if found.strength is not None:
            body = _STRENGTH.sub(rf"\g<1>{found.strength:g}", body, count=1)
    lock = as_document(fitted)["lock"]
    written = "\n".join([body, "lock:", *(f"  {key}: {json.dumps(value)}" for key, value in lock.items())]) + "\n"
    if parse_policy(written, source=fitted.source or "policy.yaml", folder=folder).hash != fitted.hash:
        raise PolicyError(
            f"{fitted.source or fitted.name}: what is fitted does not all stand in this file",
            hint="write the locked policy to a file of its own with --out",
        )
    return written


def _edit_limit(lines: list[str], fitted: Policy, part: str, limit: float) -> None:
    """Put a limit where the fitted rule or floor begins, or below."""
    i, _ = fitted_rule(fitted, part)
    place = fitted.floors[i] if part == "weights" else fitted.checkpoints[part][i]
    pattern = re.compile(rf"""({re.escape(FITTED[part])}["']?:\s*["'])>=?\s*{NUMBER_PATTERN}\s*(["'])""")
    for n in range((place.line or 1) - 1, len(lines)):
        edited, count = pattern.subn(lambda m: f"{m[1]}>= {limit}{m[2]}", lines[n], count=1)
        if count:
            lines[n] = edited
            return
