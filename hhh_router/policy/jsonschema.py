"""The JSON schema of policy files, for editors."""

from __future__ import annotations

from typing import Any

from hhh_router.policy.quantities import CHECKPOINTS, QUANTITIES, Quantity
from hhh_router.policy.rules import OPERATORS
from hhh_router.policy.schema import (
    ACTIONS,
    ERRORS,
    MAX_DESCRIPTION,
    MAX_EXAMPLE,
    MAX_EXAMPLES,
    MAX_MESSAGE,
    MAX_PRIOR,
    MAX_STEERING,
    MAX_STRENGTHS,
    MAX_WINDOW_TOKENS,
    NAME_PATTERN,
    NUMBER_PATTERN,
    PASSING,
    RAISING,
    REDACTIONS,
    REQUIRED_CHECKPOINTS,
    WINDOW_TOKENS,
)
from hhh_router.types import DIMENSIONS, EXPERTS, Action

SCHEMA = "hhh-router/policy/1"


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
                "bounds": _bounds_schema(),
                "floors": _floors_schema(),
                "checkpoints": _checkpoints_schema(),
                "on_error": {"enum": ["closed", "open"], "default": "closed"},
                "mode": {"enum": ["enforce", "shadow"], "default": "enforce"},
                "overlays": {
                    "type": "array",
                    "items": _closed(
                        {
                            "tenants": _words(),
                            "may_loosen": {"type": "boolean", "default": False},
                            "bounds": _bounds_schema(),
                            "floors": _floors_schema(),
                            "checkpoints": _checkpoints_schema(),
                            "on_error": {"enum": ["closed", "open"]},
                            "mode": {"enum": ["enforce", "shadow"]},
                        },
                        required=["tenants"],
                        description="what is different for some tenants; it can only tighten unless it may loosen",
                    ),
                },
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
                "budget": _budget_schema(),
                "lock": {"type": "object", "description": "written by hhh-router policy fit; not to be edited"},
                "examples": {"type": "array", "maxItems": MAX_EXAMPLES, "items": _example_schema()},
            },
            required=["version", "name"],
        ),
        # what a file leaves out has to come from the one it extends
        "if": {"not": {"required": ["extends"]}},
        "then": {
            "required": ["weights", "strength", "checkpoints"],
            "properties": {
                "weights": {"required": list(DIMENSIONS)},
                "checkpoints": {"required": list(REQUIRED_CHECKPOINTS)},
            },
        },
    }


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _bounds_schema() -> dict[str, Any]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return _closed({e: _closed({"min": share, "max": share}, minProperties=1) for e in EXPERTS})


def _floors_schema() -> dict[str, Any]:
    item = _closed({"when": _when_schema(), "raise": _raise_schema()}, required=["when", "raise"])
    return {"type": "array", "items": item}


def _checkpoints_schema() -> dict[str, Any]:
    return _closed({c: {"type": "array", "minItems": 1, "items": _rule_schema(c)} for c in CHECKPOINTS})


def _raise_schema() -> dict[str, Any]:
    return _closed({e: {"type": "number", "minimum": 0, "maximum": 1} for e in EXPERTS}, minProperties=1)


def _rule_schema(checkpoint: str) -> dict[str, Any]:
    actions = ACTIONS[checkpoint]
    keys: dict[str, Any] = {
        "when": _when_schema(checkpoint),
        "then": {"enum": [str(a) for a in actions]},
        "message": {"type": "string", "minLength": 1, "maxLength": MAX_MESSAGE},
        "webhook": {"type": "string", "format": "uri", "pattern": "^https?://"},
        "mode": {"enum": ["enforce", "shadow"], "default": "enforce"},
        "rollout": {"type": "number", "exclusiveMinimum": 0, "maximum": 100, "description": "percent, sticky"},
    }
    if RAISING & set(actions):
        keys["raise"] = _raise_schema()
    if PASSING & set(actions):
        keys["redact"] = {"type": "array", "items": {"enum": list(REDACTIONS)}}
    if Action.ESCALATE in actions:
        keys["upstream"] = {"type": "string", "pattern": NAME_PATTERN}
    if checkpoint == "input":
        keys["steering"] = {"type": "string", "minLength": 1, "maxLength": MAX_STEERING}
    return _closed(keys, required=["then"])


def _budget_schema() -> dict[str, Any]:
    share = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    common = {
        "level": share | {"description": "probability with which the bounds hold; without it, on average"},
        "per_group": {"type": "boolean", "default": False, "description": "the bounds hold in each group of the rows"},
    }
    accepted = {part: dict.fromkeys(names, share) for part, names in ERRORS.items()}
    parts = {part: _closed(keys, required=list(keys)) for part, keys in accepted.items()}
    strengths = {
        "type": "array",
        "items": {"type": "number", "minimum": 0, "maximum": 1},
        "minItems": 1,
        "maxItems": MAX_STRENGTHS,
        "description": "that a fit may choose from, the preferred ones first",
    }
    parts["weights"] = _closed(
        accepted["weights"] | {"weight": share, "strengths": strengths}, required=[*accepted["weights"], "weight"]
    )
    by_part = _closed(
        parts | common,
        anyOf=[{"required": [part]} for part in parts],
        description="what all bounds together keep, with the level",
        dependentSchemas={
            "weights": {
                "if": {"properties": {"weights": {"required": ["strengths"]}}},
                "then": {"required": ["level"]},
            }
        },
    )
    return {"anyOf": [_closed(accepted["input"] | common, required=list(accepted["input"])), by_part]}


def _example_schema() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_EXAMPLE}
    expected = {"enum": ["pass", "stop", *(str(a) for a in Action)]}
    return _closed(
        {
            "prompt": text,
            "response": text,
            "tenant": text,
            "tool": _closed(
                {"name": {"type": "string", "minLength": 1, "maxLength": 200}, "arguments": {}}, required=["name"]
            ),
            "expect": {"anyOf": [expected, {"type": "array", "minItems": 1, "items": expected}]},
        },
        required=["expect"],
        anyOf=[{"required": [key]} for key in ("prompt", "response", "tool")],
        **{"not": {"required": ["tool", "response"]}},
    )


def _when_schema(checkpoint: str | None = None) -> dict[str, Any]:
    """What a rule of a checkpoint may ask; without one, what a floor may."""
    properties: dict[str, Any] = {}
    patterns: dict[str, Any] = {}
    for name, quantity in QUANTITIES.items():
        if checkpoint is None and not quantity.before_weights:
            continue
        if (checkpoint or "input") not in quantity.checkpoints:
            continue
        value = _value_schema(quantity) | {"description": quantity.meaning}
        if name == "headers.NAME":
            patterns[r"^headers\.[a-z0-9][a-z0-9_-]{0,63}$"] = value
        elif name == "tool.arguments.PATH":
            patterns[r"^tool\.arguments[.\[]"] = value
        else:
            properties[name] = value
    return _closed(properties, minProperties=1, patternProperties=patterns)


def _value_schema(quantity: Quantity) -> dict[str, Any]:
    comparison = rf"^ *(?:{'|'.join(OPERATORS)}) *{NUMBER_PATTERN} *$"
    match quantity.kind:
        case "number" | "count":
            return {"type": "string", "pattern": comparison}
        case "boolean":
            return {"type": "boolean"}
        case "choice":
            choice = {"enum": list(quantity.choices)}
            return {"anyOf": [choice, {"type": "array", "minItems": 1, "items": choice}]}
        case "argument":
            return {"anyOf": [{"type": "boolean"}, _words()]}
        case "names" | "patterns" | "hours":
            return _words()


def _words() -> dict[str, Any]:
    word = {"type": "string", "minLength": 1}
    return {"anyOf": [word, {"type": "array", "minItems": 1, "items": word}]}
