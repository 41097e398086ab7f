"""What conversations have used up so far: the facts that no message tells, kept in memory from turn to turn.

A conversation is known by the id that the client tells, or else by whose it is and how it began. Nothing of it is
stored: keys are hashes, values a few numbers. They are forgotten when the process ends, a day after the last turn, and
when there are too many, the one that was quiet longest first. Only conversations under a policy that asks for these
facts are kept.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hhh_router.pipeline.kept import Kept
from hhh_router.policy import Policy, asked_for
from hhh_router.types import Caller, Situation, ToolCall, ToolFacts

MOST = 20_000
"""Conversations, and as many further names of theirs."""
LONGEST_S = 86_400.0
"""Since the last turn."""
MOST_CALLS = 64
"""Whose tools are remembered, of one conversation."""
_NAME_DIGITS = 16
UNKNOWN = "unknown"
"""What a tool is called whose call the client did not send along."""
_KEPT = frozenset(f"conversation.{name}" for name in ("tokens", "refusals", "minutes", "tainted"))
"""What no message tells."""
_TOLD = frozenset({"conversation.turns", "conversation.tool_calls", "tool.name"})
"""What messages tell, where all of them are sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one conversation had used up at the end of a turn."""

    begun: float
    """Seconds, on the book's clock."""
    turns: int = 0
    tool_calls: int = 0
    tokens: int = 0
    refusals: int = 0
    tainted: bool = False
    called: Mapping[str, str] = field(default_factory=dict)
    """Id → tool, of the latest calls; kept where later requests do not send them again."""


class Followed:
    """One request's place in its conversation.

    Args:
        book: Where it is kept.
        key: Of the conversation; None where nobody asks for what is kept.
        situation: What surrounds the request, with the facts of the conversation so far.
    """

    def __init__(self, book: Conversations, key: str | None, situation: Situation) -> None:
        self._book = book
        self._key = key
        self.situation = situation

    @property
    def name(self) -> str:
        """Names the conversation for people; empty where nobody follows it."""
        return (self._key or "")[:_NAME_DIGITS]

    def taint(self) -> None:
        """From here on the conversation is tainted."""
        self.situation = tainted(self.situation)
        self.spend()

    def spend(self, *, tokens: int = 0, refusals: int = 0, calls: Sequence[ToolCall] = ()) -> None:
        """Count what a turn has used up; ``calls`` are those of its reply."""
        if self._key is not None:
            found = self.situation.conversation
            self._book.add(
                self._key,
                Spent(
                    begun=math.inf,
                    turns=found.turns or 0,
                    tool_calls=(found.tool_calls or 0) + len(calls),
                    tokens=tokens,
                    refusals=refusals,
                    tainted=bool(found.tainted),
                    called={call.id: call.name for call in calls},
                ),
            )


class Conversations:
    """The book of all conversations. For one event loop.

    Args:
        most: Conversations that are kept.
        longest_s: How long after its last turn one is kept.
        clock: Seconds.
    """

    def __init__(
        self, *, most: int = MOST, longest_s: float = LONGEST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._kept = Kept[str, Spent](most=most, longest_s=longest_s, clock=clock)
        self._names = Kept[str, str](most=most, longest_s=longest_s, clock=clock)

    def follow(self, policy: Policy, situation: Situation, *, goes_on: bool = False) -> Followed:
        """A request's place in its conversation, which begins here where nobody knows it.

        Args:
            policy: As it applies to the caller.
            situation: What surrounds the request, as far as its messages tell.
            goes_on: Earlier turns were not sent, so that what is kept of them counts too.
        """
        asked = asked_for(policy)
        if not (asked & _KEPT or (goes_on and asked & _TOLD)):
            results = tuple(_named(tool, {}) for tool in situation.results) if goes_on else situation.results
            return Followed(self, None, replace(situation, earlier=(), results=results))
        key = self._key(situation.caller)
        spent = self._kept.find(key)
        is_new = spent is None
        if spent is None:
            spent = Spent(begun=self._clock())
            self._kept.keep(key, spent)
        told = situation.conversation
        conversation = replace(
            told,
            turns=(told.turns or 0) + (spent.turns if goes_on else 0),
            tool_calls=(told.tool_calls or 0) + (spent.tool_calls if goes_on else 0),
            tokens=spent.tokens,
            refusals=spent.refusals,
            minutes=(self._clock() - spent.begun) / 60,
            tainted=spent.tainted,
        )
        earlier = situation.earlier if is_new and "conversation.tainted" in asked else ()
        results = situation.results
        if goes_on:
            results = tuple(_named(tool, spent.called) for tool in results)
        return Followed(self, key, replace(situation, conversation=conversation, earlier=earlier, results=results))

    def add(self, key: str, more: Spent) -> None:
        """Add what a turn has used up to what stands there by now; turns and calls of tools are told as they stand."""
        before = self._kept.find(key) or Spent(begun=self._clock())
        after = replace(
            before,
            turns=max(before.turns, more.turns),
            tool_calls=max(before.tool_calls, more.tool_calls),
            tokens=before.tokens + more.tokens,
            refusals=before.refusals + more.refusals,
            tainted=before.tainted or more.tainted,
            called=dict([*before.called.items(), *more.called.items()][-MOST_CALLS:]),
        )
        self._kept.keep(key, after)

    def also_called(self, caller: Caller, name: str) -> None:
        """From here on the caller may name its conversation so, such as by the id of its latest response."""
        key = self._key(caller)
        if self._kept.find(key) is not None:
            self._names.keep(_digest(caller, "id", name), key)

    def _key(self, caller: Caller) -> str:
        if caller.conversation is None:
            return _digest(caller, "beginning", caller.sticky or "")
        named = _digest(caller, "id", caller.conversation)
        return self._names.find(named) or named


def _named(tool: ToolFacts, called: Mapping[str, str]) -> ToolFacts:
    """A result whose call was not sent. A call that is not known has no name, so that no rule takes one for known."""
    return tool if tool.name != UNKNOWN else replace(tool, name=called.get(tool.call_id or ""))


def tainted(situation: Situation) -> Situation:
    """The same once a tool has brought back what was not simply allowed."""
    return replace(situation, conversation=replace(situation.conversation, tainted=True))


def _digest(caller: Caller, kind: str, name: str) -> str:
    told = "\0".join((caller.tenant or "", caller.account or "", kind, name))
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
