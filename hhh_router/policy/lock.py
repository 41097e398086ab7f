"""Whether a policy's fitted limit still stands for what it was fitted on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hhh_router.errors import PolicyError
from hhh_router.policy.load import parse_policy
from hhh_router.policy.rules import Condition, Rule
from hhh_router.policy.schema import NUMBER_PATTERN, Lock, Policy, as_document, policy_hash

FITTED = "needs.harmless"
"""The quantity whose limit is fitted."""

_STOPPING_OPS = (">=", ">")
_LIMIT = re.compile(rf"""(needs\.harmless["']?:\s*["'])>=?\s*{NUMBER_PATTERN}\s*(["'])""")
_LOCK = re.compile(r"^lock:[^\n]*\n(?:(?:[ \t][^\n]*)?\n)*", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What a policy's limit is used on."""

    bundle_sha256: str
    calibration_id: str
    data_sha256: str | None
    """Of the scores that the bundle keeps; None where it keeps none."""


def fitted_rule(policy: Policy) -> tuple[int, int]:
    """Positions of the rule at input whose limit is fitted, and of the condition in it.

    Raises:
        PolicyError: There is not exactly one rule that stops on a high ``needs.harmless``.
    """
    found = [
        (i, j)
        for i, rule in enumerate(policy.checkpoints["input"])
        if rule.then.stops and not rule.shadow and rule.rollout is None
        for j, condition in enumerate(rule.when)
        if condition.quantity == FITTED and condition.op in _STOPPING_OPS
    ]
    if len(found) != 1:
        raise PolicyError(
            f"{policy.source or policy.name}: {len(found)} rules at input stop on a high {FITTED}; a budget fits one",
            hint=f'write one such rule, like {{when: {{{FITTED}: ">= 0.7"}}, then: refuse}}; it may not be in shadow '
            "or in a rollout",
        )
    return found[0]


def with_limit(policy: Policy, limit: float) -> Policy:
    """The policy with another limit in the rule that `fitted_rule` finds, and without its lock."""
    i, j = fitted_rule(policy)
    rules = list(policy.checkpoints["input"])
    when = list(rules[i].when)
    when[j] = Condition(quantity=FITTED, op=">=", value=limit)
    rules[i] = replace(rules[i], when=tuple(when))
    return _hashed(replace(policy, checkpoints={**policy.checkpoints, "input": tuple(rules)}, lock=None))


def locked(policy: Policy, lock: Lock) -> Policy:
    """The policy with its lock."""
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
            raise PolicyError(f"{source}: has a budget, but its limit was not fitted to it", hint=hint)
        return
    if stale := list(_stale(policy, policy.lock, deployed)):
        raise PolicyError("\n".join(f"{source}: lock: {line}" for line in stale), hint=hint)


def _stale(policy: Policy, lock: Lock, deployed: Deployed) -> Iterator[str]:
    if policy.budget is None:
        yield "there is no budget that it keeps"
    if policy_hash(as_document(policy), with_lock=False) != lock.policy_sha256:
        yield "the policy was changed after its limit was fitted"
    for name, mine, theirs in (
        ("bundle", lock.bundle_sha256, deployed.bundle_sha256),
        ("calibration", lock.calibration_id, deployed.calibration_id),
        ("kept data", lock.data_sha256, deployed.data_sha256 if lock.data == "bundle" else lock.data_sha256),
    ):
        if mine != theirs:
            yield f"was fitted on another {name} ({mine[:16]}, here {(theirs or 'none')[:16]})"


def written_into(text: str, fitted: Policy, *, folder: Path) -> str:
    """A policy's own text, comments and all, with the limit and the lock of a fitted policy.

    Args:
        text: What it was fitted from.
        fitted: With its lock.
        folder: Where ``extends`` looks for files.

    Raises:
        PolicyError: The rule that is fitted does not stand in this text, so it cannot be edited.
    """
    assert fitted.lock is not None
    limit = fitted.lock.limit
    lines = text.splitlines(keepends=True)
    i, _ = fitted_rule(fitted)
    begin = (fitted.checkpoints["input"][i].line or 1) - 1
    for n in range(begin, len(lines)):
        edited, count = _LIMIT.subn(lambda m: f"{m[1]}>= {limit}{m[2]}", lines[n], count=1)
        if count:
            lines[n] = edited
            break
    body = _LOCK.sub("", "".join(lines)).rstrip("\n")
    lock = as_document(fitted)["lock"]
    written = "\n".join([body, "lock:", *(f"  {key}: {json.dumps(value)}" for key, value in lock.items())]) + "\n"
    if parse_policy(written, source=fitted.source or "policy.yaml", folder=folder).hash != fitted.hash:
        raise PolicyError(
            f"{fitted.source or fitted.name}: the rule that is fitted does not stand in this file",
            hint="write the locked policy to a file of its own with --out",
        )
    return written


def limit_of(rule: Rule, condition: int) -> float:
    """The number that a rule's condition compares with."""
    return float(rule.when[condition].value)  # type: ignore[arg-type]  # `fitted_rule` names numbers only
