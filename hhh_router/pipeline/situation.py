"""What surrounds a reading, as far as this pipeline knows it: facts that policies ask for and no model measures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

from hhh_router.pipeline.conversations import UNKNOWN
from hhh_router.pipeline.language import tell_language
from hhh_router.policy import CHECKPOINTS
from hhh_router.policy.doors import Door
from hhh_router.types import Caller, Conversation, Message, Situation, ToolCall, ToolFacts

_KNOWN = frozenset({"role", "language", "length.characters", "length.tokens", "text", "time", "rollout"})
_CONVERSATION = frozenset(f"conversation.{f.name}" for f in fields(Conversation))

PIPELINE = Door(
    name="this door",
    checkpoints=frozenset(CHECKPOINTS),
    reads_at=frozenset(CHECKPOINTS),
    supplies=_KNOWN | _CONVERSATION | {"tool.name", "tool.arguments.PATH"},
    carries=frozenset({"redact"}),
    redacts_at=frozenset({"output"}),
)
"""What every door of the pipeline has where its own model answers: the SDK, the commands and the server."""

SERVER = replace(PIPELINE, name="the server", supplies=PIPELINE.supplies | {"tenant", "route", "key.scope"})
"""Where clients call with keys: a key's name is its tenant."""

SIDECAR = Door(
    name="the sidecar",
    checkpoints=frozenset(CHECKPOINTS),
    reads_at=frozenset(CHECKPOINTS),
    supplies=SERVER.supplies | {"model", "headers.NAME"},
    carries=frozenset({"hold", "redact", "upstream", "webhook", "steering"}),
    redacts_at=frozenset({"input", "output"}),
)
"""Where another model answers, behind a proxy that knows several."""


def asked_situation(messages: Sequence[Message], caller: Caller, at: datetime | None) -> Situation:
    """What surrounds the reading of a prompt.

    Its text is what came since the last reply; its role that of the last message. A rollout goes by the caller's own
    key where the door knows one, else by how the conversation began, which stays the same from turn to turn. A reply
    that the conversation ends with is one that is to be gone on with: what it is begun from has not been answered yet.
    """
    end = len(messages)
    while end and messages[end - 1].role == "assistant":
        end -= 1
    begin = max((i + 1 for i, m in enumerate(messages[:end]) if m.role == "assistant"), default=0)
    calls = {call.id: call for m in messages for call in m.tool_calls}
    new = [m for m in messages[begin:end] if m.role != "system"]
    return Situation(
        text="\n\n".join(m.content for m in new),
        role=messages[-1].role if messages else None,
        detect=tell_language,
        at=at,
        caller=caller if caller.sticky is not None else replace(caller, sticky=_beginning(messages)),
        results=tuple(_result(m, calls) for m in new if m.role == "tool"),
        earlier=tuple(_result(m, calls) for m in messages[:begin] if m.role == "tool"),
        conversation=Conversation(
            turns=sum(m.role == "user" for m in messages), tool_calls=sum(len(m.tool_calls) for m in messages)
        ),
    )


def with_calls(situation: Situation, calls: int) -> Situation:
    """The same when the reply has called so many tools, the one at hand included."""
    told = situation.conversation
    return replace(situation, conversation=replace(told, tool_calls=(told.tool_calls or 0) + calls))


def first_turn(situation: Situation) -> Situation:
    """The same for a conversation that begins here, where nobody keeps what it has used up."""
    told = replace(situation.conversation, tokens=0, refusals=0, minutes=0.0, tainted=False)
    return replace(situation, conversation=told)


def _result(message: Message, calls: Mapping[str, ToolCall]) -> ToolFacts:
    """What came back, with the call it answers as far as the conversation has it."""
    call = calls.get(message.tool_call_id or "")
    if call is None:
        return ToolFacts(name=UNKNOWN, call_id=message.tool_call_id, result=message.content)
    return ToolFacts(name=call.name, call_id=call.id, arguments=parsed_arguments(call), result=message.content)


def parsed_arguments(call: ToolCall) -> Any:
    """A call's arguments as JSON; None where they are none, so that no rule takes them for known."""
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return None


def answered_situation(asked: Situation, reply: str | None) -> Situation:
    """What surrounds the reading of a reply, or of the part of it that there is so far."""
    return replace(asked, text=reply, role="assistant")


def called_situation(asked: Situation, call: ToolCall) -> Situation:
    """What surrounds a call of a tool that a reply makes."""
    tool = ToolFacts(name=call.name, arguments=parsed_arguments(call))
    return replace(asked, text=call.arguments, role="assistant", tool=tool)


def _beginning(messages: Sequence[Message]) -> str | None:
    first = next((m.content for m in messages if m.role == "user"), None)
    return None if first is None else hashlib.sha256(first.encode("utf-8", "surrogatepass")).hexdigest()
