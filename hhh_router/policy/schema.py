"""What a policy is: its data, its canonical form and hash, and the JSON schema for editors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hhh_router.policy.rules import OPERATORS, QUANTITIES, Floor, Rule, When
from hhh_router.types import DIMENSIONS, EXPERTS, Action

SCHEMA = "hhh-router/policy/1"

CHECKPOINTS: tuple[str, ...] = ("input", "output")
"""Where rules are asked: before the reply, and for each window and the end of it."""

ACTIONS: Mapping[str, tuple[Action, ...]] = {
    "input": (Action.ALLOW, Action.FLAG, Action.REFUSE, Action.ESCALATE, Action.BLOCK),
    "output": (
        Action.ALLOW,
        Action.FLAG,
        Action.STEER,
        Action.REGENERATE,
        Action.REFUSE,
        Action.ESCALATE,
        Action.BLOCK,
    ),
}
"""Checkpoint → what its rules may lead to."""

RAISING = frozenset({Action.STEER, Action.REGENERATE})
"""Actions that lift lower bounds of the weights."""

SPEAKING = frozenset({Action.REGENERATE, Action.REFUSE, Action.ESCALATE, Action.BLOCK})
"""Actions after which the caller can be told something instead of the reply."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # goes into a header as name@version
NUMBER_PATTERN = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"

BASE_PRIOR = 1.0
DEFAULT_RAISE = 0.5  # half of the mixture: enough to change the reply, and two raised experts still fit
WINDOW_TOKENS = 24
MAX_WINDOW_TOKENS = 4096
MAX_PRIOR = 1e6
MAX_MESSAGE = 2000
MAX_DESCRIPTION = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the numbers may lead to in one deployment. Made by `load_policy`, which checks every part of it."""

    name: str
    version: int
    """The policy's own version, >= 1; it reaches every trace together with the name."""
    hash: str
    """sha256 (64 hex digits) of the canonical form with ``extends`` applied: comments and layout do not change it."""
    description: str | None
    prior: Mapping[str, float]
    """Relative prior per expert, >= 0."""
    strength: float
    """0 leaves the router alone, 1 corrects fully for the prior."""
    lower: Mapping[str, float]
    """Least weight per expert, before floors."""
    upper: Mapping[str, float]
    """Most weight per expert."""
    floors: tuple[Floor, ...]
    checkpoints: Mapping[str, tuple[Rule, ...]]
    """Checkpoint → its rules; the last one is the default."""
    on_error: Literal["closed", "open"]
    """What holds when a part fails: refuse, or allow."""
    mode: Literal["enforce", "shadow"]
    """``shadow`` records what would have happened, and lets everything through."""
    window_tokens: int
    """Tokens of a reply between two readings of it."""
    source: str | None
    """The file it was loaded from."""


def as_document(policy: Policy) -> dict[str, Any]:
    """The policy as its own YAML would say it in full: defaults written out, ``extends`` applied."""
    document: dict[str, Any] = {"version": policy.version, "name": policy.name}
    if policy.description is not None:
        document["description"] = policy.description
    document |= {
        "weights": {e: policy.prior[e] for e in EXPERTS},
        "strength": policy.strength,
        "bounds": {e: {"min": policy.lower[e], "max": policy.upper[e]} for e in EXPERTS},
        "floors": [{"when": _when(f.when), "raise": _in_order(f.raises)} for f in policy.floors],
        "checkpoints": {c: [_rule(r) for r in policy.checkpoints[c]] for c in CHECKPOINTS},
        "on_error": policy.on_error,
        "mode": policy.mode,
        "stream": {"window_tokens": policy.window_tokens},
    }
    return document


def _when(when: When) -> dict[str, Any]:
    return {c.quantity: c.as_yaml() for c in sorted(when, key=lambda c: c.quantity)}


def _in_order(raises: Mapping[str, float]) -> dict[str, float]:
    return {e: raises[e] for e in EXPERTS if e in raises}


def _rule(rule: Rule) -> dict[str, Any]:
    document: dict[str, Any] = {"when": _when(rule.when)} if rule.when else {}
    document["then"] = str(rule.then)
    if rule.message is not None:
        document["message"] = rule.message
    if rule.raises:
        document["raise"] = _in_order(rule.raises)
    return document


def policy_hash(document: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a resolved policy, 64 hex digits."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def policy_schema() -> dict[str, Any]:
    """JSON schema of a policy file, for editors.

    It says what each key may hold; `load_policy` also checks what spans keys, such as bounds that cannot be met.
    """
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA,
        "title": "hhh-router policy",
        **_closed(
            {
                "version": {"type": "integer", "minimum": 1, "description": "the policy's own version"},
                "name": {"type": "string", "pattern": NAME_PATTERN},
                "description": {"type": "string", "maxLength": MAX_DESCRIPTION},
                "extends": {"type": "string", "description": "a shipped policy's name, or a path beside this file"},
                "weights": _closed(
                    {e: {"type": "number", "minimum": 0, "maximum": MAX_PRIOR} for e in EXPERTS},
                    description="relative prior per expert; base is 1.0 unless said",
                ),
                "strength": share | {"description": "0 router alone, 1 full prior correction"},
                "bounds": _closed({e: _closed({"min": share, "max": share}, minProperties=1) for e in EXPERTS}),
                "floors": {
                    "type": "array",
                    "items": _closed(
                        {"when": _when_schema(before_weights=True), "raise": _raise_schema()},
                        required=["when", "raise"],
                    ),
                },
                "checkpoints": _closed(
                    {c: {"type": "array", "minItems": 1, "items": _rule_schema(c)} for c in CHECKPOINTS}
                ),
                "on_error": {"enum": ["closed", "open"], "default": "closed"},
                "mode": {"enum": ["enforce", "shadow"], "default": "enforce"},
                "stream": _closed(
                    {
                        "window_tokens": {
                            "type": "integer",
                            "minimum": 1,
                            "maximum": MAX_WINDOW_TOKENS,
                            "default": WINDOW_TOKENS,
                        }
                    }
                ),
            },
            required=["version", "name"],
        ),
        # what a file leaves out has to come from the one it extends
        "if": {"not": {"required": ["extends"]}},
        "then": {
            "required": ["weights", "strength", "checkpoints"],
            "properties": {
                "weights": {"required": list(DIMENSIONS)},
                "checkpoints": {"required": list(CHECKPOINTS)},
            },
        },
    }


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _raise_schema() -> dict[str, Any]:
    return _closed({e: {"type": "number", "minimum": 0, "maximum": 1} for e in EXPERTS}, minProperties=1)


def _rule_schema(checkpoint: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "when": _when_schema(before_weights=False),
        "then": {"enum": [str(a) for a in ACTIONS[checkpoint]]},
        "message": {"type": "string", "minLength": 1, "maxLength": MAX_MESSAGE},
    }
    if RAISING & set(ACTIONS[checkpoint]):
        keys["raise"] = _raise_schema()
    return _closed(keys, required=["then"])


def _when_schema(*, before_weights: bool) -> dict[str, Any]:
    comparison = rf"^ *(?:{'|'.join(OPERATORS)}) *{NUMBER_PATTERN} *$"
    properties: dict[str, Any] = {}
    for name, quantity in QUANTITIES.items():
        if before_weights and not quantity.before_weights:
            continue
        if quantity.kind == "number":
            kind: dict[str, Any] = {"type": "string", "pattern": comparison}
        elif quantity.kind == "boolean":
            kind = {"type": "boolean"}
        else:
            kind = {"enum": list(quantity.choices)}
        properties[name] = kind | {"description": quantity.meaning}
    return _closed(properties, minProperties=1)
