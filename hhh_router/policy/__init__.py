"""YAML + evidence → decision. Plain Python on a handful of floats."""

from hhh_router.policy.decide import (
    Attempt,
    Bounds,
    Threshold,
    asked_for,
    asks,
    attempts,
    bounds,
    decide,
    in_rollout,
    on_error_decision,
    steers,
    thresholds,
)
from hhh_router.policy.doors import Door, check_door, headers_read, lacking
from hhh_router.policy.jsonschema import policy_schema
from hhh_router.policy.load import list_library, list_policies, load_policy, parse_policy
from hhh_router.policy.overlays import for_tenant
from hhh_router.policy.quantities import CHECKPOINTS
from hhh_router.policy.rules import Condition, Facts, Floor, Rule
from hhh_router.policy.schema import Overlay, Policy, as_document

__all__ = [
    "CHECKPOINTS",
    "Attempt",
    "Bounds",
    "Condition",
    "Door",
    "Facts",
    "Floor",
    "Overlay",
    "Policy",
    "Rule",
    "Threshold",
    "as_document",
    "asked_for",
    "asks",
    "attempts",
    "bounds",
    "check_door",
    "decide",
    "for_tenant",
    "headers_read",
    "in_rollout",
    "lacking",
    "list_library",
    "list_policies",
    "load_policy",
    "on_error_decision",
    "parse_policy",
    "policy_schema",
    "steers",
    "thresholds",
]
