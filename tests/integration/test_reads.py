"""Texts that are only scored: shared batches, a memory, and failures that stay with whoever caused them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from hhh_router.bundle import Bundle
from hhh_router.errors import Overloaded, ReaderError
from hhh_router.model.encode import Encoded
from hhh_router.model.reads import ReadJob, Reads
from hhh_router.model.worker import open_reader
from hhh_router.settings import Settings
from hhh_router.types import Message, ReadRequest, Scores

pytestmark = pytest.mark.integration


class Watched:
    """Reads that tell which batches were made; texts that hold ``boom`` break the pass they are in."""

    def __init__(self, bundle: Bundle, cache: Path, batch_tokens: int = 600) -> None:
        reader, encoder = open_reader(bundle, Settings.load(cache_dir=cache, threads=1))
        self.batches: list[int] = []
        self.encoder = encoder
        self.reads = Reads(reader, encoder, batch_tokens, max_waiting=2000)
        score = reader.score

        def watched(texts: Sequence[Encoded]) -> list[Scores]:
            self.batches.append(len(texts))
            if any("boom" in encoder.tokenizer.decode(t.ids) for t in texts):
                raise RuntimeError("boom")
            return score(texts)

        reader.score = watched  # type: ignore[method-assign]

    def put(self, *texts: str) -> list[list[Scores] | Exception]:
        found: list[list[Scores] | Exception] = []
        self.reads.put(ReadJob(requests=[asked(t) for t in texts], end=found.append))
        return found

    def finish(self) -> None:
        while self.reads.busy:
            self.reads.turn()


def asked(text: str) -> ReadRequest:
    return ReadRequest(messages=(Message(role="user", content=text),))


@pytest.fixture
def watched(tiny: Bundle, tmp_path: Path) -> Watched:
    return Watched(tiny, tmp_path)


def test_texts_of_several_callers_share_a_pass_and_each_gets_its_own(watched: Watched) -> None:
    callers = [watched.put(f"question {i}") for i in range(6)]
    watched.finish()
    together = watched.batches.copy()
    alone = Watched.put(watched, "something else", "question 3")
    watched.finish()

    assert max(together) > 1
    assert len(together) < 6
    assert callers[3][0] == pytest.approx([alone[0][1]])
    assert len({repr(c[0]) for c in callers}) == 6


def test_a_long_list_is_read_in_batches_of_like_length_and_in_order(watched: Watched) -> None:
    texts = ["word " * (1 + (7 * i) % 40) for i in range(40)]
    (found,) = [watched.put(*texts)]
    watched.finish()
    (single,) = [watched.put(texts[5] + " ")]
    watched.finish()

    assert len(found[0]) == 40
    assert [s.tokens for s in found[0]] == [len(watched.encoder.encode(asked(t)).ids) for t in texts]
    assert found[0][5].tokens == single[0][0].tokens - 1
    assert len(watched.batches) < 30


def test_what_was_read_before_is_not_read_again(watched: Watched) -> None:
    first = watched.put("hello", "there")
    watched.finish()
    before = len(watched.batches)

    again = watched.put("there", "hello")
    watched.finish()

    assert again == [list(reversed(first[0]))]
    assert len(watched.batches) == before
    assert not watched.reads.busy


def test_a_text_that_breaks_the_pass_fails_its_own_caller(watched: Watched) -> None:
    good, bad, other = watched.put("calm"), watched.put("boom", "fine"), watched.put("also")
    watched.finish()

    assert len(good[0]) == len(other[0]) == 1
    (error,) = bad
    assert isinstance(error, ReaderError)
    assert "boom" in error.message


def test_a_caller_who_left_is_not_read_for(watched: Watched) -> None:
    found: list[object] = []
    job = ReadJob(requests=[asked("one"), asked("two")], end=found.append)
    watched.reads.put(job)
    job.cancelled = True
    stays = watched.put("three")
    watched.finish()

    assert found == []
    assert watched.batches == [1]
    assert len(stays[0]) == 1


def test_closing_tells_everyone_once(watched: Watched) -> None:
    found = watched.put("one", "two")
    watched.reads.close(ReaderError("closed"))

    assert [str(e) for e in found] == [str(ReaderError("closed"))]
    assert not watched.reads.busy


def test_a_large_call_is_encoded_in_portions(watched: Watched) -> None:
    found = watched.put(*(f"text {i}" for i in range(900)))
    watched.reads.turn()

    assert len(watched.reads._by_length) < 600
    watched.finish()
    assert len(found[0]) == 900


def test_more_texts_than_may_wait_are_turned_away_but_a_large_call_alone_is_not(watched: Watched) -> None:
    large = watched.put(*(f"text {i}" for i in range(2500)))
    turned_away = watched.put("one more")
    watched.finish()

    assert len(large[0]) == 2500
    (error,) = turned_away
    assert isinstance(error, Overloaded)
    assert error.retry_after_s
