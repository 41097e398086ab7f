"""What the policy says of a call, a result and a definition, and what one session has used up."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from hhh_router.errors import HHHRouterError, PolicyError, ReaderError
from hhh_router.interfaces.mcp import texts
from hhh_router.interfaces.mcp.reading import Guards, Reading, read
from hhh_router.pipeline.language import ready_language, tell_language
from hhh_router.policy import Door, Facts, Policy, asks, check_door, decide, on_error_decision
from hhh_router.policy.quantities import find_quantity
from hhh_router.policy.reach import may_pass
from hhh_router.types import Action, Caller, Conversation, Decision, Situation, ToolFacts, Weights

_log = logging.getLogger(__name__)

CHECKPOINTS = ("tool_call", "tool_result")
MCP = Door(
    name="the MCP proxy",
    checkpoints=frozenset(CHECKPOINTS),
    reads_at=frozenset(CHECKPOINTS),
    supplies=frozenset(
        {
            "role",
            "language",
            "length.characters",
            "text",
            "time",
            "conversation.tool_calls",
            "conversation.refusals",
            "conversation.minutes",
            "conversation.tainted",
            "tool.name",
            "tool.arguments.PATH",
            "rollout",
        }
    ),
    carries=frozenset({"hold", "webhook"}),
)
"""No prompt and no reply passes here, so what a policy asks at ``input`` and ``output`` is not looked at."""

MOST_DEFINITIONS = 10_000
"""Definitions whose verdict is kept, so that a list that is asked for again is not read again."""
_NOT_READ = Weights(1.0, 0.0, 0.0, 0.0)


@dataclass(slots=True)
class Session:
    """One client with one server."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begun: float = field(default_factory=time.monotonic)
    calls: int = 0
    """Calls the client made, stopped ones included."""
    refusals: int = 0
    """Calls and results that the policy stopped."""
    tainted: bool = False
    """Whether a result came that was not simply allowed."""
    hidden: dict[str, Decision] = field(default_factory=dict)
    """Tools that the client was not told of for what their definitions say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One checkpoint, asked."""

    decision: Decision
    reading: Reading | None = None
    not_inspected: tuple[str, ...] = ()


def check_policy(policy: Policy) -> None:
    """Refuse a policy that this door could not carry out, or that asks nothing here.

    Raises:
        PolicyError: One line for each thing.
    """
    here = {c: rules for c, rules in policy.checkpoints.items() if c not in ("input", "output")}
    used = replace(policy, checkpoints=here, floors=())
    check_door(used, MCP)
    ready_language(used)
    if mixed := [q for checkpoint in CHECKPOINTS for q in _asked_for(policy, checkpoint) if q.startswith("weights.")]:
        raise PolicyError(f"policy {policy.name} asks for {mixed[0]}; no weights are applied to a tool")
    if not any(asks(policy, checkpoint) for checkpoint in CHECKPOINTS):
        raise PolicyError(
            f"policy {policy.name} has no rules at tool_call or tool_result, so nothing would be checked",
            hint="docs/mcp.md has a policy to begin with",
        )


def needs_reading(policy: Policy) -> bool:
    """Whether some rule asks for what only the model can measure."""
    return any(_reads(policy, checkpoint) for checkpoint in CHECKPOINTS)


class Checks:
    """A policy, and what it needs to be asked.

    Args:
        policy: From `load_policy`, accepted by `check_policy`.
        guards: Reads; None where no rule asks for a reading.
        now: The time of day, with a zone.
        clock: Monotonic time, in seconds.
    """

    def __init__(
        self,
        policy: Policy,
        guards: Guards | None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self._guards = guards
        self._now = now
        self._clock = clock
        self._reads = {checkpoint: _reads(policy, checkpoint) for checkpoint in CHECKPOINTS}
        self._definitions: dict[str, Judged] = {}

    @property
    def enforced(self) -> bool:
        """False for a policy in shadow mode: it is asked, and nothing is done."""
        return self.policy.mode == "enforce"

    async def call(self, session: Session, tool: str, arguments: Mapping[str, Any]) -> Judged:
        """What ``tool_call`` says of a call before the server sees it. Counts it."""
        session.calls += 1
        if (hidden := session.hidden.get(tool)) is not None:
            judged = Judged(decision=hidden)
        elif not asks(self.policy, "tool_call"):
            judged = Judged(decision=_nothing_asked("tool_call"))
        else:
            told = "\n".join(texts.leaves(arguments)) or json.dumps(arguments)
            called = json.dumps(arguments, ensure_ascii=False)
            situation = Situation(text=called, role="assistant", detect=tell_language)
            judged = await self._judge(session, "tool_call", told, situation, ToolFacts(name=tool, arguments=arguments))
        session.refusals += judged.decision.action.stops and judged.decision.action is not Action.HOLD
        return judged

    async def result(
        self, session: Session, tool: str, arguments: Mapping[str, Any], text: str, unread: list[str]
    ) -> Judged:
        """What ``tool_result`` says of what came back, before the client sees it; what is not simply allowed taints."""
        if not asks(self.policy, "tool_result") or not (text or unread):
            return Judged(decision=_nothing_asked("tool_result"), not_inspected=tuple(unread))
        facts = ToolFacts(name=tool, arguments=arguments)
        judged = await self._judge(session, "tool_result", text, _brought_back(text), facts)
        session.tainted |= judged.decision.action is not Action.ALLOW or judged.decision.rule == "on_error"
        session.refusals += judged.decision.action.stops
        return replace(judged, not_inspected=tuple(unread))

    async def definition(self, session: Session, tool: Mapping[str, Any]) -> Judged:
        """Whether the client is to be told of a tool.

        It is not, where the rules stop every call by the name alone, or where its text is stopped at ``tool_result``:
        that too is text of the server's that a model sees.
        """
        name = str(tool.get("name"))
        if asks(self.policy, "tool_call") and not may_pass(self.policy.checkpoints["tool_call"], name):
            said = Decision(
                checkpoint="tool_call", action=Action.BLOCK, rule="name", reason="no call of it is ever allowed"
            )
            return Judged(decision=said)
        if not self._reads["tool_result"]:
            return Judged(decision=_nothing_asked("tool_result"))
        digest = hashlib.sha256(json.dumps(tool, sort_keys=True).encode()).hexdigest()
        judged = self._definitions.get(digest)
        if judged is None:
            text = texts.of_definition(tool)
            judged = await self._judge(
                session,
                "tool_result",
                text,
                _brought_back(text),
                ToolFacts(name=name, arguments={}),
            )
            if judged.decision.rule != "on_error" and len(self._definitions) < MOST_DEFINITIONS:
                self._definitions[digest] = judged
        if judged.decision.action.stops and self.enforced:
            session.hidden[name] = replace(judged.decision, checkpoint="tool_call")
        else:
            session.hidden.pop(name, None)
        return judged

    async def aclose(self) -> None:
        """Close what reads."""
        if self._guards is not None:
            await self._guards.aclose()

    async def _judge(
        self, session: Session, checkpoint: str, text: str, situation: Situation, tool: ToolFacts
    ) -> Judged:
        reading: Reading | None = None
        try:
            if self._reads[checkpoint] and text:
                if self._guards is None:
                    raise ReaderError("there is nothing to read with")
                reading = await read(self._guards, text)
        except HHHRouterError as error:
            _log.warning("%s of %s not read: %s", checkpoint, tool.name, error.message)
            return Judged(decision=on_error_decision(self.policy, checkpoint, error.message))
        about = replace(
            situation,
            at=self._now(),
            caller=Caller(sticky=session.id),
            tool=tool,
            conversation=Conversation(
                tool_calls=session.calls,
                refusals=session.refusals,
                minutes=(self._clock() - session.begun) / 60,
                tainted=session.tainted,
            ),
        )
        return Judged(decision=decide(self.policy, checkpoint, _facts(reading, about)), reading=reading)


def _facts(reading: Reading | None, situation: Situation) -> Facts:
    if reading is None:
        return Facts(
            needs={}, outcomes={}, weights=_NOT_READ, confidence=None, in_distribution=None, mode=None,
            situation=situation,
        )  # fmt: skip
    return Facts(
        needs=reading.needs,
        outcomes=reading.outcomes,
        weights=reading.weights,
        confidence=reading.confidence,
        in_distribution=reading.in_distribution,
        mode="prompt",
        situation=situation,
    )


def _nothing_asked(checkpoint: str) -> Decision:
    return Decision(checkpoint=checkpoint, action=Action.ALLOW, rule="none", reason="nothing to ask")


def _reads(policy: Policy, checkpoint: str) -> bool:
    return any(q is not None and q.of_reading for q in map(find_quantity, _asked_for(policy, checkpoint)))


def _asked_for(policy: Policy, checkpoint: str) -> Iterator[str]:
    for rule in policy.checkpoints.get(checkpoint, ()):
        yield from (condition.quantity for condition in rule.when)


def _brought_back(text: str) -> Situation:
    return Situation(text=text, role="tool", detect=tell_language)
