"""People who are asked or told: a call that waits for approval, a webhook that hears of a decision."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
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


class People:
    """Who is asked and told about the decisions of one request.

    Args:
        hold: Has people decide; None where nobody is there.
        tell: Tells webhooks; None where the door does not.
        about: What every decision of the request is about.
    """

    def __init__(self, hold: Hold | None, tell: Tell | None, about: Concerned) -> None:
        self._hold = hold
        self._tell = tell
        self._about = about
        self._told: set[tuple[object, ...]] = set()

    def inform(self, decision: Decision, *, call: ToolCall | None = None, number: int = 0) -> None:
        """Tell a decision's webhook, once for each rule, and for each call by its ``number``."""
        told = decision.checkpoint, decision.rule, decision.action, number
        if self._tell is not None and decision.webhook is not None and told not in self._told:
            self._told.add(told)
            self._tell(decision, self._concerned(call))

    def holds(self, decision: Decision) -> bool:
        """Whether a call has to wait for a person, and one is there."""
        return self._hold is not None and self._about.enforced and decision.action is Action.HOLD

    def ask(self, call: ToolCall, decision: Decision) -> asyncio.Future[Settled]:
        """Begin to have people decide about a call."""
        assert self._hold is not None
        return asyncio.ensure_future(self._hold(call, decision, self._concerned(call)))

    def _concerned(self, call: ToolCall | None) -> Concerned:
        return self._about if call is None else replace(self._about, tool=call.name)


async def beats(held: asyncio.Future[Settled]) -> AsyncGenerator[None, None]:
    """At once and every few seconds until a held call is settled. Whoever stops listening abandons the call."""
    try:
        while not held.done():
            yield
            await asyncio.wait({held}, timeout=BEAT_S)
    finally:
        if not held.done():
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)


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
