"""What surrounds a reading, as far as this pipeline knows it: facts that policies ask for and no model measures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from hhh_router.policy.doors import Door
from hhh_router.types import Caller, Conversation, Message, Situation

_KNOWN = frozenset({"role", "length.characters", "length.tokens", "text", "time", "conversation.turns", "rollout"})

PIPELINE = Door(
    name="this door",
    checkpoints=frozenset({"input", "output", "tool_call"}),
    reads_at=frozenset({"input", "output", "tool_call"}),
    supplies=_KNOWN | {"tool.name", "tool.arguments.PATH"},
)
"""What every door of the pipeline has where its own model answers: the SDK, the commands and the server."""

SERVER = replace(PIPELINE, name="the server", supplies=PIPELINE.supplies | {"tenant", "route", "key.scope"})
"""Where clients call with keys: a key's name is its tenant."""

SIDECAR = Door(
    name="the sidecar",
    checkpoints=SERVER.checkpoints,
    reads_at=SERVER.reads_at,
    supplies=SERVER.supplies | {"model", "headers.NAME"},
    carries=frozenset({"upstream", "steering"}),
)
"""Where another model answers, behind a proxy that knows several."""


def asked_situation(messages: Sequence[Message], caller: Caller, at: datetime | None) -> Situation:
    """What surrounds the reading of a prompt.

    Its text is what came since the last reply; its role that of the last message. A rollout goes by the caller's own
    key where the door knows one, else by how the conversation began, which stays the same from turn to turn.
    """
    said = [i for i, m in enumerate(messages) if m.role == "assistant"]
    new = [m for m in messages[said[-1] + 1 if said else 0 :] if m.role != "system"]
    return Situation(
        text="\n\n".join(m.content for m in new),
        role=messages[-1].role if messages else None,
        at=at,
        caller=caller if caller.sticky is not None else replace(caller, sticky=_beginning(messages)),
        conversation=Conversation(turns=sum(m.role == "user" for m in messages)),
    )


def answered_situation(asked: Situation, reply: str | None) -> Situation:
    """What surrounds the reading of a reply, or of the part of it that there is so far."""
    return replace(asked, text=reply, role="assistant")


def _beginning(messages: Sequence[Message]) -> str | None:
    first = next((m.content for m in messages if m.role == "user"), None)
    return None if first is None else hashlib.sha256(first.encode("utf-8", "surrogatepass")).hexdigest()
