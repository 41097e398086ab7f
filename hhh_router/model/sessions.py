"""Answers that are read while they grow: what was read of them is kept, and a further window costs its own tokens.

A session keeps the keys and values of its tokens in the layers up to l_r, and what the heads' attention has gathered of
their states. The tokens that are new in several sessions are run together. A conversation that begins like another one
begins with what that one has read: there states depend on tokens alone. What is kept is bounded; sessions that were
closed go first, then the one that was asked longest ago, and its next window is read whole.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hhh_router.errors import Overloaded, ReaderError
from hhh_router.model.encode import Encoded, Encoder
from hhh_router.model.engine import EndRead, ReadStep, SessionLost, known
from hhh_router.model.extension import Extension, Kept
from hhh_router.model.growing import GrowingIds
from hhh_router.model.heads import Pooled, Side, Views
from hhh_router.model.pooling import RunningPool
from hhh_router.model.reader import HeadReader
from hhh_router.model.reads import Remembered
from hhh_router.types import Mode

_log = logging.getLogger(__name__)
_ROWS = 16  # texts that are read on together
_ALIKE = 8  # tokens; a shorter beginning is not worth a copy
_LEAST = 64  # tokens that a session counts at least, so that there cannot be too many


@dataclass(slots=True, eq=False)
class StepJob:
    """A step of one session."""

    step: ReadStep
    end: EndRead
    """Called once, on the model's thread."""
    cancelled: bool = False
    """Set by any thread: nobody waits for this any more."""

    def cancel(self) -> None:
        """As `hhh_router.model.engine.Ticket` has it."""
        self.cancelled = True


@dataclass(slots=True, eq=False)
class CloseSession:
    """Nobody will read on there."""

    session: str


@dataclass(slots=True, eq=False)
class _Session:
    prompt: Encoded
    answer: GrowingIds
    pools: dict[Side, RunningPool]
    kept: Kept = field(default_factory=Kept)

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens that were read."""
        return (*self.prompt.ids, *self.answer.ids)[: self.kept.tokens]

    @property
    def tokens(self) -> int:
        """That count against what may be kept."""
        return max(self.kept.room, _LEAST)

    def take(self, kept: int, added: str) -> None:
        """More of the answer, or another end of it: what was read of the old end is dropped."""
        same = self.answer.become(kept, added)
        read = self.pools["response"].tokens
        if read > same and not self.pools["response"].cut(same):
            self.pools["response"].clear()
        past = self.prompt.prompt_tokens + self.pools["response"].tokens
        self.kept.tokens = min(self.kept.tokens, past)

    def pooled(self, side: Side, *, present: bool) -> Pooled:
        return self.pools[side].pooled() if present else self.pools[side].nothing()


@dataclass(slots=True, eq=False)
class _Run:
    """A step on its way."""

    job: StepJob
    session: _Session
    ids: Sequence[int]
    """All tokens of the text."""
    mode: Mode

    @property
    def past(self) -> int:
        return self.session.kept.tokens

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return max(0, len(self.ids) - self.past)


class Sessions:
    """Reads answers on. Used by one thread, the model's own."""

    def __init__(
        self,
        reader: HeadReader,
        encoder: Encoder,
        remembered: Remembered,
        *,
        batch_tokens: int,
        max_tokens: int,
        max_waiting: int = 20_000,
    ) -> None:
        """For one model.

        Args:
            reader: Its layers and heads.
            encoder: Of its tokenizer.
            remembered: Readings of prompts; those of answers are not repeated.
            batch_tokens: Most tokens of a turn, with padding; a longer text takes several turns.
            max_tokens: Tokens that may be kept while nothing runs.
            max_waiting: Steps that may wait; one more is turned away.
        """
        self._reader = reader
        self._encoder = encoder
        self._remembered = remembered
        self._batch_tokens = batch_tokens
        self._max_tokens = max_tokens
        self._max_waiting = max_waiting
        self._boundary = max(reader.read_layers)
        self._arriving: deque[StepJob] = deque()
        self._running: list[_Run] = []
        self._open: OrderedDict[str, _Session] = OrderedDict()  # asked longest ago first
        self._closed: OrderedDict[str, _Session] = OrderedDict()  # longest ago first; for what begins alike

    @property
    def busy(self) -> bool:
        """True while `turn` has something to do."""
        return bool(self._arriving or self._running)

    @property
    def waiting(self) -> int:
        """Texts that are still to be read."""
        return len(self._arriving) + len(self._running)

    @property
    def tokens(self) -> int:
        """Tokens kept, or room for them."""
        return sum(s.tokens for s in [*self._open.values(), *self._closed.values()])

    def put(self, job: StepJob) -> None:
        """Queue a step."""
        if self.waiting >= self._max_waiting:
            job.end(Overloaded(f"{self.waiting} texts are waiting to be read", hint="try again", retry_after_s=1.0))
            return
        self._arriving.append(job)

    def close_session(self, session: str) -> None:
        """Nobody asks on there; a step of it that still waits was cancelled before."""
        found = self._open.pop(session, None)
        if found is not None and found.kept.tokens:
            self._closed[session] = found
            self._make_room()

    def close(self, error: Exception) -> None:
        """End everything that waits with an error, and keep nothing."""
        for job in [*self._arriving, *(r.job for r in self._running)]:
            if not job.cancelled:
                job.end(error)
        self._arriving.clear()
        self._running.clear()
        self._open.clear()
        self._closed.clear()

    @torch.inference_mode()  # what is kept was made by passes, and inference tensors may not be changed outside
    def turn(self) -> None:
        """Read some tokens of the step that has waited longest, and of others of like length."""
        self._running = [r for r in self._running if not r.job.cancelled]
        while self._arriving and len(self._running) < _ROWS:
            self._begin(self._arriving.popleft())
        batch = self._next_batch()
        batch = self._each(batch, self._read)
        for run in [r for r in batch if r.left]:  # a long text goes to the end of the line after each of its turns
            self._running.remove(run)
            self._running.append(run)
        self._each([r for r in batch if not r.left], self._finish)
        self._make_room()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _begin(self, job: StepJob) -> None:
        if job.cancelled:
            return
        try:
            run = self._run(job)
        except Exception as error:  # a seam: it must reach its caller, not kill the thread
            self._fail(job, error)
            return
        if run.mode == "prompt" and (scores := self._remembered.get(run.session.prompt)) is not None:
            job.end([scores])  # its tokens are read with those of the first window
        else:
            self._running.append(run)

    def _run(self, job: StepJob) -> _Run:
        step = job.step
        if step.opens is not None:
            self._open[step.session] = self._opened(step)
        session = self._open.get(step.session)
        if session is None or step.kept > len(session.answer.text):
            raise SessionLost("nothing is known of what this goes on from", hint="tell it whole")
        self._open.move_to_end(step.session)
        prompt = session.prompt
        if step.added is None:
            return _Run(job, session, prompt.ids, "prompt")
        session.take(step.kept, step.added)
        ids = [*prompt.ids, *session.answer.ids]
        self._encoder.check_length(len(ids))
        return _Run(job, session, ids, "both" if prompt.has_prompt else "response")

    def _opened(self, step: ReadStep) -> _Session:
        assert step.opens is not None
        pools: dict[Side, RunningPool] = {s: RunningPool(self._reader.heads, s) for s in ("prompt", "response")}
        session = _Session(self._encoder.encode(step.opens), GrowingIds(self._encoder), pools)
        text = session.prompt
        name, tokens = self._alike(text.ids[: text.prompt_span[0] if text.has_prompt else text.prompt_tokens])
        if name in self._closed and tokens >= self._closed[name].prompt.prompt_tokens:  # its next turn, most likely
            session.kept = self._closed.pop(name).kept
            session.kept.tokens = tokens
        elif tokens >= _ALIKE:
            session.kept = (self._open.get(name) or self._closed[name]).kept.begun(tokens)
        elif (cache := self._reader.opening(text)) is not None:
            session.kept.copy(cache, self._boundary)
        return session

    def _alike(self, ids: tuple[int, ...]) -> tuple[str, int]:
        """The session that has read most of a beginning, and how many tokens of it."""
        sessions = [*self._open.items(), *self._closed.items()]
        return max(((name, _shared(s.ids, ids)) for name, s in sessions), key=lambda found: found[1], default=("", 0))

    def _fail(self, job: StepJob, error: Exception) -> None:
        self._open.pop(job.step.session, None)  # half of the step may have been taken
        if not job.cancelled:
            job.end(known(error, ReaderError))

    def _each(self, runs: list[_Run], work: Callable[[list[_Run]], None]) -> list[_Run]:
        """Do something with some steps together, or where that fails with each alone; those with which it went well."""
        if not runs:
            return []
        try:
            work(runs)
        except Exception:  # whose fault it is shows when each is read alone
            _log.exception("reading %d answers on failed; trying them one by one", len(runs))
        else:
            return runs
        well = []
        for run in runs:
            try:
                work([run])
            except Exception as error:  # this text's own, then
                self._running.remove(run)
                self._fail(run.job, error)
            else:
                well.append(run)
        return well

    # -- a turn -------------------------------------------------------------------------------------------------------

    def _next_batch(self) -> list[_Run]:
        """The step that has waited longest, and those that cost less beside it than alone: half may be padding."""
        batch: list[_Run] = []
        for run in self._running:
            runs = [*batch, run]
            new, places = [self._next(r) for r in runs], [r.past + self._next(r) for r in runs]
            if batch and (
                len(runs) * max(new) > min(self._batch_tokens, 2 * sum(new))
                or len(runs) * max(places) > 2 * sum(places)
            ):
                continue
            batch = runs
        return batch

    def _next(self, run: _Run) -> int:
        return min(run.left, self._batch_tokens)

    def _read(self, batch: list[_Run]) -> None:
        """Run the next tokens of some texts through the lower layers, and pool them."""
        batch = [r for r in batch if r.left]
        if not batch:
            return
        rows = [r.ids[r.past : r.past + self._next(r)] for r in batch]
        for run, row in zip(batch, rows, strict=True):
            run.session.kept.reserve(run.past + len(row))
        extension = Extension([r.session.kept for r in batch], [len(row) for row in rows])
        state = self._reader.stack.extend(rows, extension)
        layers = torch.stack(list(self._reader.states(state)), dim=2)  # (B, T, L, D)
        found = {side: self._features(layers, batch, extension, side) for side in ("prompt", "response")}
        extension.advance()
        for side, parts in found.items():
            for run, (features, topmost) in zip(batch, parts, strict=True):
                if len(features):
                    run.session.pools[side].add(features, topmost)

    def _features(
        self, layers: Tensor, batch: Sequence[_Run], extension: Extension, side: Side
    ) -> list[tuple[Tensor, Tensor]]:
        """What the heads make of each text's new tokens of one side, and their states of the last read layer."""
        parts = []
        for i, (run, past, length) in enumerate(zip(batch, extension.past, extension.lengths, strict=True)):
            prompt = run.session.prompt
            first, stop = prompt.prompt_span if side == "prompt" else (prompt.prompt_tokens, len(run.ids))
            if side == "prompt" and not prompt.has_prompt:
                first = stop
            parts.append(layers[i, max(first - past, 0) : max(0, min(stop - past, length))])
        lengths = [len(part) for part in parts]
        features = self._reader.heads.tokens(torch.cat(parts), side)
        return list(zip(features.split(lengths), [part[:, -1] for part in parts], strict=True))

    def _finish(self, batch: list[_Run]) -> None:
        """Score texts whose tokens were all read."""
        heads, modes = self._reader.heads, [r.mode for r in batch]
        views = Views(
            prompt=_rows([r.session.pooled("prompt", present=r.mode != "response") for r in batch]),
            response=_rows([r.session.pooled("response", present=r.mode != "prompt") for r in batch]),
            modes=modes,
        )
        found = heads.scores(views, tokens=[len(r.ids) for r in batch], layers_run=self._boundary)
        for run, scores in zip(batch, found, strict=True):
            if run.mode == "prompt":
                self._remembered.put(run.session.prompt, scores)
            self._running.remove(run)
            if not run.job.cancelled:
                run.job.end([scores])

    def _make_room(self) -> None:
        """Keep no more than is allowed; what a turn is in the middle of stays."""
        busy = {r.job.step.session for r in self._running}
        excess = self.tokens - self._max_tokens
        for kept, names in ((self._closed, list(self._closed)), (self._open, [n for n in self._open if n not in busy])):
            for name in names:
                if excess <= 0:
                    return
                excess -= kept.pop(name).tokens


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens that two texts begin with alike, by halving: slices are compared far faster than tokens one by one."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _rows(sides: Sequence[Pooled]) -> Pooled:
    """One side of several texts."""
    return Pooled(features=torch.cat([s.features for s in sides]), summary=torch.cat([s.summary for s in sides]))
