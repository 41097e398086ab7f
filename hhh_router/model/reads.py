"""Texts that are only to be scored: those of all callers share padded passes that stop at l_r."""

from __future__ import annotations

import bisect
import hashlib
import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hhh_router.errors import ContextTooLong, InvalidRequest, Overloaded, ReaderError
from hhh_router.model.encode import Encoded, Encoder
from hhh_router.model.engine import EndRead, known
from hhh_router.model.reader import HeadReader
from hhh_router.types import ReadRequest, Scores

_log = logging.getLogger(__name__)
_SORTED = 512  # texts that are sorted by length at a time
_REMEMBERED = 4096
"""Readings that are kept. They are raw scores of token sequences, so no calibrator or policy makes them stale."""


@dataclass(slots=True, kw_only=True, eq=False)
class ReadJob:
    """The texts of one caller."""

    requests: Sequence[ReadRequest]
    end: EndRead
    """Called once, on the model's thread, with all scores in order, or with what went wrong."""
    cancelled: bool = False
    """Set by any thread: nobody waits for this any more."""
    found: list[Scores | None] = field(default_factory=list)
    left: int = 0
    """Texts still to be read."""

    def cancel(self) -> None:
        """As `hhh_router.model.engine.Ticket` has it."""
        self.cancelled = True


@dataclass(frozen=True, slots=True, order=True)
class _Waiting:
    length: int
    number: int
    """Of arrival; makes every entry different."""
    job: ReadJob = field(compare=False)
    index: int = field(compare=False)
    text: Encoded = field(compare=False)


class Remembered:
    """The latest readings. Used by one thread, the model's own."""

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._known: OrderedDict[bytes, Scores] = OrderedDict()

    def get(self, text: Encoded) -> Scores | None:
        """How a text was read before."""
        name = _name(text)
        if name in self._known:
            self._known.move_to_end(name)
        return self._known.get(name)

    def put(self, text: Encoded, scores: Scores) -> None:
        """Remember a reading."""
        self._known[_name(text)] = scores
        while len(self._known) > self._most:
            self._known.popitem(last=False)


class Reads:
    """Scores texts in batches of like length, whoever they came from. Used by one thread, the model's own."""

    def __init__(self, reader: HeadReader, encoder: Encoder, batch_tokens: int, *, max_waiting: int = 20_000) -> None:
        """For one model.

        Args:
            reader: Reads batches.
            encoder: Of its tokenizer.
            batch_tokens: Most tokens of a batch, with padding; a longer text is read alone.
            max_waiting: Texts that may wait; a call that finds more is turned away, unless nothing else waits.
        """
        self._reader = reader
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._max_waiting = max_waiting
        self._arriving: deque[tuple[ReadJob, int]] = deque()  # not yet encoded
        self._by_length: list[_Waiting] = []
        self._by_age: deque[_Waiting] = deque()
        self.remembered = Remembered()
        self._arrived = 0

    @property
    def busy(self) -> bool:
        """True while `turn` has something to do."""
        return bool(self._by_length or self._arriving)

    @property
    def waiting(self) -> int:
        """Texts that are still to be read."""
        return len(self._by_length) + len(self._arriving)

    def put(self, job: ReadJob) -> None:
        """Queue a caller's texts."""
        waiting = self.waiting
        if waiting and waiting + len(job.requests) > self._max_waiting:
            job.end(Overloaded(f"{waiting} texts are waiting to be read", hint="try again", retry_after_s=1.0))
            return
        job.found = [None] * len(job.requests)
        job.left = len(job.requests)
        self._arriving.extend((job, i) for i in range(len(job.requests)))
        self._finish(job)

    def turn(self) -> None:
        """Read one batch: the text that has waited longest, and others of like length."""
        self._encode()
        batch = self._next_batch()
        if not batch:
            return
        try:
            found: list[Scores | Exception] = [*self._reader.score([e.text for e in batch])]
        except Exception:  # whose fault it is shows when each is read alone
            _log.exception("reading a batch of %d failed; trying them one by one", len(batch))
            found = [self._alone(e) for e in batch]
        for entry, scores in zip(batch, found, strict=True):
            if isinstance(scores, Exception):
                self._fail(entry.job, scores)
                continue
            self.remembered.put(entry.text, scores)
            self._settle(entry.job, entry.index, scores)

    def _encode(self) -> None:
        """Encode what has arrived, as much as is worth sorting: a large call must not hold up the replies' steps.

        What was read before is answered from memory.
        """
        while self._arriving and len(self._by_length) < _SORTED:
            job, index = self._arriving.popleft()
            if job.cancelled:
                continue
            try:
                text = self._encoded(job, index)
            except Exception as error:  # a seam: it must reach its caller, not kill the thread
                self._fail(job, error)
                continue
            if (scores := self.remembered.get(text)) is not None:
                self._settle(job, index, scores)
                continue
            self._arrived += 1
            entry = _Waiting(len(text.ids), self._arrived, job, index, text)
            bisect.insort(self._by_length, entry)
            self._by_age.append(entry)

    def _settle(self, job: ReadJob, index: int, scores: Scores) -> None:
        job.found[index] = scores
        job.left -= 1
        self._finish(job)

    def _fail(self, job: ReadJob, error: Exception) -> None:
        if not job.cancelled:
            job.cancelled = True  # its other texts need not be read any more
            job.end(known(error, ReaderError))

    def close(self, error: Exception) -> None:
        """End everything that waits with an error."""
        jobs = [*(e.job for e in self._by_length), *(job for job, _ in self._arriving)]
        for job in {id(j): j for j in jobs}.values():
            if not job.cancelled:
                job.end(error)
        self._arriving.clear()
        self._by_length.clear()
        self._by_age.clear()

    def _next_batch(self) -> list[_Waiting]:
        self._by_length = [e for e in self._by_length if not e.job.cancelled]
        while self._by_age and (self._by_age[0].job.cancelled or self._by_age[0].job.found[self._by_age[0].index]):
            self._by_age.popleft()
        if not self._by_age:
            return []
        last = bisect.bisect_left(self._by_length, self._by_age[0])
        first = last
        longest = self._by_length[last].length
        while (
            first > 0
            and 2 * self._by_length[first - 1].length >= longest  # far shorter ones would mostly be padding
            and longest * (last - first + 2) <= self._batch_tokens
        ):
            first -= 1
        while last + 1 < len(self._by_length):
            longest = self._by_length[last + 1].length
            if longest * (last - first + 2) > self._batch_tokens:
                break
            last += 1
        batch = self._by_length[first : last + 1]
        del self._by_length[first : last + 1]
        return batch

    def _alone(self, entry: _Waiting) -> Scores | Exception:
        try:
            return self._reader.score([entry.text])[0]
        except Exception as error:  # this text's own, then
            return error

    def _encoded(self, job: ReadJob, index: int) -> Encoded:
        try:
            return self._encoder.encode(job.requests[index])
        except (ContextTooLong, InvalidRequest) as error:
            if len(job.requests) == 1:
                raise
            raise type(error)(f"text {index} of {len(job.requests)}: {error.message}", hint=error.hint) from error

    @staticmethod
    def _finish(job: ReadJob) -> None:
        if not job.left and not job.cancelled:
            job.end([s for s in job.found if s is not None])


def _name(text: Encoded) -> bytes:
    """Names a text by its tokens and what is read of them: 16 bytes in place of a prompt."""
    spans = (text.prompt_tokens, *text.focus, text.has_prompt)
    return hashlib.blake2b(array("q", [*spans, *text.ids]).tobytes(), digest_size=16).digest()
