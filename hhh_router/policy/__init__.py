"""YAML + evidence → decision. Plain Python on a handful of floats."""

from hhh_router.policy.decide import (
    Attempt,
    Bounds,
    Threshold,
    attempts,
    bounds,
    decide,
    on_error_decision,
    steers,
    thresholds,
)
from hhh_router.policy.load import list_policies, load_policy, parse_policy
from hhh_router.policy.rules import Condition, Facts, Floor, Rule
from hhh_router.policy.schema import Policy, as_document, policy_schema

__all__ = [
    "Attempt",
    "Bounds",
    "Condition",
    "Facts",
    "Floor",
    "Policy",
    "Rule",
    "Threshold",
    "as_document",
    "attempts",
    "bounds",
    "decide",
    "list_policies",
    "load_policy",
    "on_error_decision",
    "parse_policy",
    "policy_schema",
    "steers",
    "thresholds",
]
