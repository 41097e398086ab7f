"""What the proxy itself answers, in the protocol's own shapes."""

from __future__ import annotations

import logging
from typing import Any

from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, RequestId

from hhh_router.errors import HHHRouterError
from hhh_router.interfaces.held import HeldCall
from hhh_router.policy.decide import DEFAULT_MESSAGES
from hhh_router.types import Action, Decision

_log = logging.getLogger(__name__)

_NEEDED_APPROVAL = "This call needed a person's approval."


def refusal(decision: Decision, held: HeldCall | None) -> dict[str, Any]:
    """A result that tells the model why there is none."""
    said = decision.message or DEFAULT_MESSAGES.get(decision.action, "Blocked.")
    if held is not None:
        said = _NEEDED_APPROVAL if said == DEFAULT_MESSAGES[Action.HOLD] else said
        why = "It was denied" if held.status == "denied" else "Nobody approved it in time"
        said = f"{said} {why}{f': {held.note}' if held.note else '.'}"
    block = {**told(decision), **({"held": {"id": held.id, "status": held.status}} if held else {})}
    return {
        "content": [{"type": "text", "text": said}],
        "isError": True,
        "resultType": "complete",
        "_meta": {"hhh": block},
    }


def told(decision: Decision) -> dict[str, Any]:
    """A decision for clients, webhooks and the audit."""
    return {
        "checkpoint": decision.checkpoint,
        "action": str(decision.action),
        "rule": decision.rule,
        "reason": decision.reason,
    }


def error(request_id: RequestId | None, code: int, message: str) -> JSONRPCError:
    """An error in JSON-RPC."""
    return JSONRPCError(jsonrpc="2.0", id=request_id, error=ErrorData(code=code, message=f"hhh-router: {message}"))


def broken(request_id: RequestId, cause: Exception) -> JSONRPCError:
    """The answer where a part of the proxy failed."""
    if isinstance(cause, HHHRouterError):
        return error(request_id, INTERNAL_ERROR, cause.message)
    _log.error("unexpected %s", type(cause).__name__, exc_info=cause)
    return error(request_id, INTERNAL_ERROR, f"unexpected {type(cause).__name__}")
