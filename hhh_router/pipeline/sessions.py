"""Readings of an answer while it grows, by any reader."""

from __future__ import annotations

from collections.abc import Sequence

from hhh_router.protocols import Reader, ReadingSession, SessionReader
from hhh_router.types import Message, ReadRequest, Scores, Tool


def open_session(reader: Reader, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> ReadingSession:
    """A session of the reader's own; for a reader that has none, one that reads the whole conversation every time."""
    if isinstance(reader, SessionReader):
        return reader.open(messages, tools)
    return _WholeReadings(reader, messages, tools)


class _WholeReadings:
    def __init__(self, reader: Reader, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        self._reader = reader
        self._messages = tuple(messages)
        self._tools = tuple(tools)

    async def read(self, response: str | None) -> Scores:
        request = ReadRequest(messages=self._messages, response=response, tools=self._tools)
        [scores] = await self._reader.read([request])
        return scores

    def close(self) -> None:
        """Nothing is kept."""
