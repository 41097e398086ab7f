"""The ``model`` field: which mixture, and optionally which policy."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hhh_router.errors import InvalidRequest
from hhh_router.interfaces.server.http import WireError
from hhh_router.types import DIMENSIONS, Weights

AUTO = "hhh-auto"
MODEL_NAMES = (AUTO, *(f"hhh-{d}" for d in DIMENSIONS))
_DESCRIPTIONS = {
    AUTO: "the mixture that the router chooses for each request",
    **{f"hhh-{d}": f"the {d} expert alone, within the policy's bounds" for d in DIMENSIONS},
}
_PATTERN = "hhh@base-helpful-harmless-honest, in sixteenths, such as hhh@2-6-5-3"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What a model name asks for."""

    weights: Weights | None
    """None leaves them to the router."""
    policy: str | None
    """The part after the colon."""


def parse_model(name: object) -> ModelChoice:
    """What a model name asks for.

    >>> parse_model("hhh-honest:strict")
    ModelChoice(weights=Weights(base=0.0, helpful=0.0, harmless=0.0, honest=1.0), policy='strict')

    Raises:
        InvalidRequest: There is no name.
        WireError: 404, no such model. An unknown mixture must never be answered by another one.
    """
    if not isinstance(name, str) or not name:
        raise InvalidRequest("model: missing", hint=f"use {', '.join(MODEL_NAMES)}, or {_PATTERN}")
    base, _, policy = name.partition(":")
    if base == AUTO:
        return ModelChoice(weights=None, policy=policy or None)
    if base in MODEL_NAMES:
        return ModelChoice(weights=Weights.from_mapping({base.removeprefix("hhh-"): 1.0}), policy=policy or None)
    try:
        return ModelChoice(weights=Weights.from_mixture(base), policy=policy or None)
    except ValueError as error:
        raise WireError(
            404,
            f"the model {name[:100]!r} does not exist; use {', '.join(MODEL_NAMES)}, or {_PATTERN};"
            " append :policy to pick a policy",
            code="model_not_found",
            param="model",
        ) from error


def list_models(created: int) -> dict[str, object]:
    """The answer to ``GET /v1/models``: OpenAI's list, and System One's beside it."""
    day = datetime.fromtimestamp(created, UTC).date().isoformat()
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": created, "owned_by": "hhh-router"} for name in MODEL_NAMES],
        "models": [{"name": n, "description": _DESCRIPTIONS[n], "release_date": day} for n in MODEL_NAMES],
    }
