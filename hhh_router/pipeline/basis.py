"""What a request's decisions came from, noted for its record and taken from it again: raw readings, and no text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Final

from hhh_router.pipeline.situation import asked_situation
from hhh_router.trace.block import Basis, ConversationRecord, ReadingRecord, ResultRecord
from hhh_router.types import (
    Caller,
    ChatRequest,
    Conversation,
    GuardRequest,
    Message,
    Scores,
    Situation,
    ToolCall,
    ToolFacts,
)

MOST_READINGS: Final = 200
"""Of one request: some 50 kB of a record. Windows beyond are counted and left out."""
LOGPROB_FLOOR: Final = -20.0
"""As `calibration.confidence` cuts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What was said, where it was kept."""

    messages: tuple[Message, ...]
    response: str | None = None
    calls: tuple[ToolCall, ...] = ()
    """The calls in the response, where they could be found in it."""


class Notes:
    """Collects the basis of one request.

    Args:
        request: What was asked.
        mixes: Whether weights change the reply.
    """

    def __init__(self, request: ChatRequest | GuardRequest, *, mixes: bool) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._pinned = request.weights if isinstance(request, ChatRequest) else None
        self._mixes = mixes
        self._situation = Situation()
        self._stream = self._unseen = False
        self._attempts: list[list[ReadingRecord]] = [[]]
        self._calls: list[str] = []
        self._count = self._left_out = 0

    def asked(self, situation: Situation, *, stream: bool) -> None:
        """What surrounds the request."""
        self._situation, self._stream = situation, stream

    def read(
        self,
        scores: Scores,
        *,
        reply_tokens: int | None = None,
        is_final: bool = False,
        logprobs: Sequence[float] = (),
    ) -> None:
        """A reading; one without any head is one that failed."""
        known = [max(x, LOGPROB_FLOOR) for x in logprobs if not math.isnan(x)]
        told = (math.fsum(known) / len(known), min(known)) if known else None
        update = {"reply_tokens": reply_tokens, "is_final": is_final, "logprobs": told}
        self._put(_reading(scores).model_copy(update=update))

    def unread(self, reply_tokens: int) -> None:
        """A reading of the reply that failed."""
        self._put(ReadingRecord(mode="both", needs={}, outcomes={}, distance=None, tokens=0, reply_tokens=reply_tokens))

    def called(self, tool: str) -> None:
        """A tool is called."""
        self._calls.append(tool)

    def unseen(self) -> None:
        """The reply calls tools, and nobody looked at the calls."""
        self._unseen = True

    def again(self) -> None:
        """The reply is made once more."""
        self._attempts.append([])
        self._calls.clear()

    def basis(self) -> Basis:
        """What is known by now."""
        about, caller = self._situation, self._situation.caller
        return Basis(
            attempts=self._attempts,
            left_out=self._left_out,
            chat=self._chat,
            stream=self._stream,
            mixes=self._mixes,
            at=None if about.at is None else about.at.isoformat(),
            role=about.role,
            tenant=caller.tenant,
            route=caller.route,
            model=caller.model,
            key_scopes=None if caller.key_scopes is None else list(caller.key_scopes),
            sticky=caller.sticky,
            conversation=ConversationRecord(**asdict(about.conversation)),
            calls=self._calls,
            unseen_calls=self._unseen,
            results=[_result(tool) for tool in about.results],
            earlier=[_result(tool) for tool in about.earlier],
            pinned=None if self._pinned is None else self._pinned.as_dict(),
        )

    def _put(self, reading: ReadingRecord) -> None:
        self._count += 1
        if self._count > MOST_READINGS and not reading.is_final:
            self._left_out += 1
        else:
            self._attempts[-1].append(reading)


def _reading(scores: Scores) -> ReadingRecord:
    """A reading; one that is not finite, or has no head, is one that failed."""
    numbers = (*scores.needs.values(), *scores.outcomes.values(), scores.distance)
    failed = not scores.needs and not scores.outcomes
    if failed or not all(map(math.isfinite, numbers)):
        return ReadingRecord(mode=scores.mode, needs={}, outcomes={}, distance=None, tokens=scores.tokens)
    return ReadingRecord(
        mode=scores.mode,
        needs=dict(scores.needs),
        outcomes=dict(scores.outcomes),
        distance=scores.distance,
        tokens=scores.tokens,
    )


def _result(tool: ToolFacts) -> ResultRecord:
    reading = None if tool.scores is None else _reading(tool.scores)
    return ResultRecord(name=tool.name, reading=reading, unread=tool.unread)


def scores_of(reading: ReadingRecord) -> Scores | None:
    """A reading as it was made; None where it failed."""
    if reading.distance is None:
        return None
    return Scores(
        mode=reading.mode,
        needs=reading.needs,
        outcomes=reading.outcomes,
        distance=reading.distance,
        tokens=reading.tokens,
    )


def situation_of(basis: Basis, texts: Texts | None) -> Situation:
    """What surrounded the request, as far as it was kept; None stands for what was not."""
    at = None if basis.at is None else datetime.fromisoformat(basis.at)
    caller = Caller(
        model=basis.model,
        route=basis.route,
        tenant=basis.tenant,
        key_scopes=None if basis.key_scopes is None else tuple(basis.key_scopes),
        sticky=basis.sticky,
    )
    conversation = Conversation(**basis.conversation.model_dump())
    results, earlier = (tuple(map(_tool, its)) for its in (basis.results, basis.earlier))
    if texts is not None:
        told = asked_situation(texts.messages, caller, at)
        return replace(
            told,
            results=_with_text(results, told.results),
            earlier=_with_text(earlier, told.earlier),
            conversation=conversation,
        )
    return Situation(
        role=basis.role,
        at=at,
        caller=caller,
        results=results,
        earlier=earlier,
        conversation=conversation,
    )


def _tool(result: ResultRecord) -> ToolFacts:
    reading, unread = result.reading, result.unread
    if reading is not None and reading.distance is None:
        unread = unread or "the reading is not finite"
    return ToolFacts(name=result.name, scores=None if reading is None else scores_of(reading), unread=unread)


def _with_text(kept: tuple[ToolFacts, ...], told: tuple[ToolFacts, ...]) -> tuple[ToolFacts, ...]:
    """Results with their text and the call's arguments, where the texts have as many."""
    if len(kept) != len(told):
        return kept
    return tuple(replace(k, arguments=t.arguments, result=t.result) for k, t in zip(kept, told, strict=True))
