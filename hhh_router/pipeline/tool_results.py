"""What tools brought back, each result read by itself: in a whole conversation's reading it could hide."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

from hhh_router.errors import BackendError, ContextTooLong, ReaderError, RequestError
from hhh_router.policy import Policy, asked_for
from hhh_router.policy.quantities import find_quantity
from hhh_router.protocols import Reader
from hhh_router.types import Message, ReadRequest, Scores, Situation, ToolFacts

PIECE_CHARACTERS = 4_000
"""Longer texts are read in pieces, of which the worst counts."""
OVERLAP_CHARACTERS = 200
"""What two pieces share, so that nothing hides in a cut."""
SMALLEST_PIECE = 500
MAX_CHARACTERS = 100_000
"""A longer text is not read at all, which is a failure of reading. As for a policy's ``text``."""

READ_S = 60.0
"""Longest wait for the reading of one result."""


def pieces(text: str, size: int) -> list[str]:
    """A text in pieces of a size that overlap.

    >>> [len(p) for p in pieces("x" * 1000, 600)], "".join(pieces("short", 600))
    ([600, 600], 'short')
    """
    step = size - OVERLAP_CHARACTERS
    found = [text[at : at + size] for at in range(0, max(1, len(text) - OVERLAP_CHARACTERS), step)]
    return [piece for piece in found if piece.strip()] or [text]


def reads_results(policy: Policy) -> bool:
    """Whether a rule at ``tool_result`` asks for what only the model can measure."""
    return any(q is not None and q.of_reading for q in map(find_quantity, asked_for(policy, "tool_result")))


async def with_readings(
    reader: Reader, policy: Policy, situation: Situation, *, timeout_s: float = READ_S
) -> Situation:
    """The situation with a reading of each result that has to be judged, where a rule asks for one.

    A result that cannot be read says why in its ``unread``; nothing is raised.
    """
    if not (situation.results or situation.earlier) or not reads_results(policy):
        return situation
    # one after the other: each is read in one batch of its pieces, and most turns bring one
    return replace(
        situation,
        results=tuple([await _read(reader, tool, timeout_s) for tool in situation.results]),
        earlier=tuple([await _read(reader, tool, timeout_s) for tool in situation.earlier]),
    )


async def _read(reader: Reader, tool: ToolFacts, timeout_s: float) -> ToolFacts:
    text = tool.result or ""
    if not text.strip():
        return replace(tool, unread="it has no text that could be read")
    if len(text) > MAX_CHARACTERS:
        return replace(tool, unread=f"{len(text):,} characters, up to {MAX_CHARACTERS:,} are read")
    try:
        async with asyncio.timeout(timeout_s):
            return replace(tool, scores=await _worst_of(reader, text))
    except (RequestError, BackendError) as error:
        return replace(tool, unread=error.message)
    except TimeoutError:
        return replace(tool, unread=f"no reading within {timeout_s:g} s")


async def _worst_of(reader: Reader, text: str) -> Scores:
    size = PIECE_CHARACTERS
    while True:
        asked = [ReadRequest(messages=(Message(role="user", content=piece),)) for piece in pieces(text, size)]
        try:
            found = await reader.read(asked)
        except ContextTooLong:
            if size <= SMALLEST_PIECE:
                raise
            size //= 2
            continue
        if len(found) != len(asked):
            raise ReaderError(f"the reader gave {len(found)} readings for {len(asked)} texts")
        return _worst(found)


def _worst(found: Sequence[Scores]) -> Scores:
    """For every head the highest of its logits; NaN stays, so that no rule takes it for low."""
    first = found[0]
    return replace(
        first,
        needs={n: _highest([s.needs[n] for s in found]) for n in first.needs},
        outcomes={o: _highest([s.outcomes[o] for s in found]) for o in first.outcomes},
        distance=_highest([s.distance for s in found]),
        tokens=sum(s.tokens for s in found),
    )


def _highest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)
