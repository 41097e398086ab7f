"""People who are asked or told: a call that waits for approval, a webhook that hears of a decision."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from hhh_router.policy.decide import DEFAULT_MESSAGES
from hhh_router.types import Action, Decision, ToolCall

BEAT_S = 5.0
"""While a call is held, whoever waits for the answer hears so often that it still is."""
NEEDED_APPROVAL = "This call needed a person's approval."


@dataclass(frozen=True, slots=True, kw_only=True)
class Concerned:
    """What a decision is about, for people."""

    request_id: str
    policy: str
    """``name@version``."""
    enforced: bool
    """False where the decision is recorded and nothing is done."""
    conversation: str = ""
    """Names it for as long as the process lives; empty where nobody follows it."""
    tool: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What became of a held call."""

    is_approved: bool
    id: str | None
    """In the queue; None where it could not be held."""
    why: str
    """For people: ``approved by ann``, ``denied by ann``, ``nobody approved it in time``."""
    note: str | None = None


Hold = Callable[[ToolCall, Decision, Concerned], Awaitable[Settled]]
"""Returns once a call waits no longer. Cancelling it abandons the call."""
Tell = Callable[[Decision, Concerned], None]
"""Tells a decision's webhook; returns at once."""


def settled_decision(decision: Decision, settled: Settled) -> Decision:
    """What a held call's decision has become: one that flags an approved call, or one that stops it."""
    reason = f"{decision.reason}; held{f' as {settled.id}' if settled.id else ''}, {settled.why}"
    if settled.is_approved:
        return replace(decision, action=Action.FLAG, reason=reason, message=None, webhook=None)
    said = decision.message
    if said is None or said == DEFAULT_MESSAGES[Action.HOLD]:
        said = NEEDED_APPROVAL
    return replace(decision, reason=reason, message=said, webhook=None)


def told(decision: Decision, about: Concerned) -> dict[str, Any]:
    """A decision as a webhook hears of it."""
    return {
        "event": "decision",
        "request_id": about.request_id,
        "conversation": about.conversation,
        "policy": about.policy,
        "enforced": about.enforced,
        "tool": about.tool,
        "checkpoint": decision.checkpoint,
        "action": str(decision.action),
        "rule": decision.rule,
        "reason": decision.reason,
        "message": decision.message,
    }
