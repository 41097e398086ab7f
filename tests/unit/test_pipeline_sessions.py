"""Sessions of any reader, and what an engine is told by them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from hhh_router.errors import ContextTooLong, ReaderError
from hhh_router.model.engine import EndRead, EngineReader, ReadStep, SessionLost
from hhh_router.pipeline.sessions import open_session
from hhh_router.testing import FakeReader, make_scores
from hhh_router.types import Message, ReadRequest, Scores

PROMPT = (Message(role="user", content="Hi"),)


class OnlyWhole:
    """A reader without sessions."""

    def __init__(self) -> None:
        self.asked: list[ReadRequest] = []

    async def read(self, requests: Sequence[ReadRequest]) -> list[Scores]:
        self.asked += requests
        return [make_scores(mode=r.mode) for r in requests]


class Told:
    """An engine that remembers what it is told, and answers or fails as a test wants."""

    load: Any = None

    def __init__(self, *answers: Exception | None) -> None:
        self.steps: list[ReadStep] = []
        self.closed: list[str] = []
        self.cancelled = 0
        self._answers = list(answers)

    def read_on(self, step: ReadStep, end: EndRead) -> Any:
        self.steps.append(step)
        answer = self._answers.pop(0) if self._answers else None
        if not isinstance(answer, TimeoutError):
            end([make_scores(mode="both")] if answer is None else answer)
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def close_session(self, session: str) -> None:
        self.closed.append(session)


def session(engine: Told) -> Any:
    return EngineReader(engine).open(PROMPT)  # type: ignore[arg-type]


async def test_a_reader_without_sessions_reads_everything_each_time() -> None:
    reader = OnlyWhole()
    opened = open_session(reader, PROMPT)

    found = [await opened.read(None), await opened.read("a"), await opened.read("ab")]
    opened.close()

    assert [s.mode for s in found] == ["prompt", "both", "both"]
    assert [r.response for r in reader.asked] == [None, "a", "ab"]
    assert {r.messages for r in reader.asked} == {PROMPT}


async def test_a_readers_own_sessions_are_used() -> None:
    reader = FakeReader()
    opened = open_session(reader, PROMPT)

    await opened.read("a")
    opened.close()

    assert [s.closed for s in reader.sessions] == [True]
    assert reader.calls == [[ReadRequest(messages=PROMPT, response="a")]]


async def test_an_engine_is_told_only_what_is_new() -> None:
    engine = Told()
    opened = session(engine)
    for response in (None, "Paris", "Paris is", "Part"):
        await opened.read(response)

    assert [(s.kept, s.added) for s in engine.steps] == [(0, None), (0, "Paris"), (5, " is"), (3, "t")]
    assert [s.opens is None for s in engine.steps] == [False, True, True, True]
    assert len({s.session for s in engine.steps}) == 1
    assert len({s.digest for s in engine.steps}) == 4


async def test_the_same_text_has_the_same_digest_however_it_came() -> None:
    one, other = Told(), Told()
    first, second = session(one), session(other)
    await first.read("Par")
    await first.read("Paris")
    await second.read("Paris")

    assert one.steps[-1].digest == other.steps[-1].digest


async def test_a_lost_session_is_told_whole() -> None:
    engine = Told(None, SessionLost("gone"))
    opened = session(engine)
    await opened.read("Paris")
    await opened.read("Paris is")

    assert [(s.opens is None, s.kept, s.added) for s in engine.steps] == [
        (False, 0, "Paris"),
        (True, 5, " is"),
        (False, 0, "Paris is"),
    ]
    assert engine.steps[0].session != engine.steps[2].session


async def test_one_that_is_lost_twice_is_a_failed_reading() -> None:
    with pytest.raises(ReaderError):
        await session(Told(SessionLost("gone"), SessionLost("gone"))).read("x")


async def test_after_a_failure_nothing_is_taken_for_known() -> None:
    engine = Told(None, ReaderError("broken"))
    opened = session(engine)
    await opened.read("Paris")
    with pytest.raises(ReaderError):
        await opened.read("Paris is")
    await opened.read("Paris is it")

    assert engine.closed == [engine.steps[0].session]
    assert (engine.steps[2].opens is None, engine.steps[2].added) == (False, "Paris is it")


async def test_a_step_nobody_waits_for_is_cancelled_and_its_session_closed() -> None:
    engine = Told(None, TimeoutError())
    opened = session(engine)
    await opened.read("Paris")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await opened.read("Paris is")

    assert engine.cancelled == 2
    assert engine.closed == [engine.steps[0].session]


async def test_what_is_too_long_is_not_sent_again_with_more_behind_it() -> None:
    engine = Told(ContextTooLong("too long"))
    opened = session(engine)
    for response in ("long", "longer", "longest"):
        with pytest.raises(ContextTooLong):
            await opened.read(response)
    await opened.read("l")

    assert [s.added for s in engine.steps] == ["long", "l"]


async def test_closing_twice_tells_the_engine_once() -> None:
    engine = Told()
    opened = session(engine)
    opened.close()
    await opened.read("x")
    opened.close()
    opened.close()

    assert len(engine.closed) == 1
