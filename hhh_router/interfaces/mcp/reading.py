"""Reading what goes to and comes from tools, with whatever can guard: a pipeline here, or a server elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hhh_router.errors import BackendTimeout, ContextTooLong, ReaderError
from hhh_router.pipeline import GuardResult
from hhh_router.pipeline.tool_results import MAX_CHARACTERS, PIECE_CHARACTERS, SMALLEST_PIECE, pieces
from hhh_router.types import GuardRequest, Message, ReadRequest, Weights

READ_S = 60.0


class Guards(Protocol):
    """What a `Pipeline` and a `RemotePipeline` can do."""

    async def guard(self, requests: Sequence[GuardRequest]) -> list[GuardResult]:
        """Judge texts."""
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was measured of one text."""

    needs: Mapping[str, float]
    outcomes: Mapping[str, float]
    weights: Weights
    confidence: float
    in_distribution: bool
    calibrated: bool

    def as_json(self) -> dict[str, Any]:
        """For the audit."""
        return {
            "needs": dict(self.needs),
            "outcomes": dict(self.outcomes),
            "confidence": self.confidence,
            "in_distribution": self.in_distribution,
            "calibrated": self.calibrated,
        }


async def read(guards: Guards, text: str, *, timeout_s: float = READ_S) -> Reading:
    """Read a text as a prompt, all of it.

    Args:
        guards: Reads.
        text: Not empty.
        timeout_s: For all of its pieces.

    Raises:
        HHHRouterError: It was not read, or not all of it.
    """
    if len(text) > MAX_CHARACTERS:
        raise ReaderError(f"{len(text):,} characters, up to {MAX_CHARACTERS:,} are read")
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            return await _read(guards, text)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise BackendTimeout(f"not read within {timeout_s:g} s") from error


async def _read(guards: Guards, text: str) -> Reading:
    size = PIECE_CHARACTERS
    while True:
        try:
            return _worst(await guards.guard([_asked(piece) for piece in pieces(text, size)]))
        except ContextTooLong:
            if size <= SMALLEST_PIECE:
                raise
            size //= 2


def _asked(piece: str) -> GuardRequest:
    return GuardRequest(read=ReadRequest(messages=(Message(role="user", content=piece),)))


def _worst(results: Sequence[GuardResult]) -> Reading:
    blocks = [result.metadata for result in results]
    for block in blocks:
        if not block.needs:  # the reader failed, and the guard's own policy said what then holds there
            raise ReaderError(block.decisions[0].reason if block.decisions else "nothing was measured")
    first = max(blocks, key=lambda b: b.needs.get("injection", 0.0))
    return Reading(
        needs={n: max(b.needs.get(n, 0.0) for b in blocks) for n in first.needs},
        outcomes={o: max(b.outcomes.get(o, 0.0) for b in blocks) for o in first.outcomes},
        weights=Weights.from_mapping(first.weights),
        confidence=min(b.confidence for b in blocks),
        in_distribution=all(b.calibration.in_distribution for b in blocks),
        calibrated=all(b.calibration.calibrated for b in blocks),
    )
