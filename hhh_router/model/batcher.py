"""Many replies at once, each under its own mixture: rows join and leave between decode steps.

A request is read to l_r, planned, and taken on through the upper layers by itself, then its row joins the batch. Each
step draws a token for every row, runs the bare lower layers on all of them together, pools them for the output heads,
and runs the upper layers with each row's own gates. What a row says does not depend on who shares its step; a row that
fails leaves alone.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hhh_router.errors import (
    BackendTimeout,
    ContextTooLong,
    GeneratorError,
    Overloaded,
    Quarantined,
)
from hhh_router.model.deltas import Deltas, Spelling, told_of_prompt
from hhh_router.model.encode import Encoder
from hhh_router.model.engine import known
from hhh_router.model.grammar import Grammars
from hhh_router.model.heads import Views
from hhh_router.model.int8 import Phase
from hhh_router.model.memory import KEPT_BYTES
from hhh_router.model.mixture import Gates
from hhh_router.model.prefixes import BLOCK, Found, Prefixes, whole_tokens
from hhh_router.model.reader import HeadReader, RunningReply
from hhh_router.model.rows import ChatJob, Pace, Row
from hhh_router.model.sampler import Drawn, Sampler, check_biases, draw_rows
from hhh_router.model.slots import Opening, Slots
from hhh_router.model.stack import Pass
from hhh_router.protocols import Finished, FinishReason, Load, Planned, Steered, Window

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batcher:
    """Decodes all requests under way together. Used by one thread, the model's own."""

    reader: HeadReader
    encoder: Encoder
    gates: Gates
    phase: Phase = field(default_factory=Phase)
    """Of the backbone's int8 layers, where it has any."""
    max_rows: int = 16
    """Replies decoded together."""
    max_tokens: int = 32_768
    """Room for keys and values, rows times their longest prompt + reply."""
    prefix_tokens: int = 4096
    """Tokens of earlier prompts whose keys and values are kept for prompts that begin alike."""
    max_waiting: int = 256
    """Chats that may wait for a row."""
    max_waiting_tokens: int = 131_072
    """Tokens of their prompts."""
    free_bytes: Callable[[], int | None] = lambda: None
    """Memory that can still be had; None where nobody tells."""
    _rows: list[Row] = field(default_factory=list)
    """In slot order."""
    _waiting: deque[ChatJob] = field(default_factory=deque)
    _slots: Slots = field(init=False)
    _pace: Pace = field(default_factory=Pace)
    _prefixes: Prefixes = field(init=False)
    _ends: frozenset[int] = frozenset()
    _grammars: Grammars = field(init=False)
    _spelling: Spelling = field(init=False)

    def __post_init__(self) -> None:
        self._ends = frozenset({self.encoder.end_id, *self.reader.stack.end_ids})
        self._slots = Slots(self.max_tokens)
        boundary, depth = max(self.reader.read_layers), self.reader.stack.depth
        self._prefixes = Prefixes(boundary, depth, self.prefix_tokens)
        self._grammars = Grammars(self.encoder, self.reader.stack.config.vocab_size, self._ends)
        self._spelling = Spelling(self.encoder.tokenizer)

    @property
    def busy(self) -> bool:
        """True while `turn` has something to do."""
        return bool(self._rows or self._waiting)

    @property
    def load(self) -> Load:
        """Rows decoding, jobs waiting, room taken."""
        return Load(
            rows=len(self._rows), waiting=len(self._waiting), waiting_tokens=self._waiting_tokens,
            slot_tokens=self._slots.tokens, wait_s=self._wait_s(0),
        )  # fmt: skip

    @property
    def _waiting_tokens(self) -> int:
        return sum(j.prompt_tokens for j in list(self._waiting))

    def _wait_s(self, tokens: int) -> float:
        """About how long a chat with such a prompt would wait for its plan: prompts before it, then free rows."""
        ahead = len(self._waiting) + 1 - (self.max_rows - len(self._rows))
        rows = max(0, ahead) * self._pace.row_s / self.max_rows
        return rows + (self._waiting_tokens + tokens) * self._pace.token_s

    def put(self, job: ChatJob) -> None:
        """Queue a request, or end it at once where it can never be answered."""
        try:
            job.text = self.encoder.prompt(job.request)
            prompt = len(job.text.ids)
            job.budget = self.encoder.reply_tokens(prompt, job.request.sampling.max_tokens)
            check_biases(job.request.sampling.logit_bias, self.reader.stack.config.vocab_size)
            job.following = self._grammars.follow(job.request.sampling.json_schema, job.request.tools)
            if job.need > self.max_tokens:
                raise ContextTooLong(
                    f"{prompt} tokens of prompt and up to {job.budget} of reply, there is room for {self.max_tokens}",
                    hint="ask for fewer tokens, or raise HHH_ROUTER_KV_TOKENS",
                )
            self._check_queue(job)
        except Exception as error:  # a seam: it must reach its caller, not kill the thread
            job.end(known(error, GeneratorError))
            return
        self._waiting.append(job)

    def _check_queue(self, job: ChatJob) -> None:
        """Turn away what would wait too long.

        Raises:
            Overloaded: The queue is full, or the wait would outlast the caller's deadline.
        """
        wait, left = self._wait_s(job.prompt_tokens), job.deadline - time.monotonic()
        tokens = self._waiting_tokens + job.prompt_tokens
        free = self.max_rows - len(self._rows)  # those that come together wait for a turn, not for a row
        if len(self._waiting) >= self.max_waiting + free:
            found = f"{len(self._waiting) - free} chats are waiting"
        elif self._waiting and tokens > self.max_waiting_tokens:
            found = f"{tokens} tokens of prompts are waiting"
        elif wait > left:
            found = f"the wait is about {wait:.1f} s, and this request has {max(left, 0):.1f} s"
        else:
            return
        raise Overloaded(found, hint=f"try again in {max(wait, 1):.0f} s", retry_after_s=max(wait, 1.0))

    @torch.inference_mode()  # slots hold what passes made, and inference tensors may not be changed outside
    def turn(self) -> None:
        """Drop what is cancelled, let one request in if there is room, and decode one token of every row."""
        self._drop_cancelled()
        if self._waiting and self._has_room(self._waiting[0]):
            self._admit(self._waiting.popleft())
        if self._rows:
            with self.phase.decoding():
                self._decode()
        if not self._rows and not self._waiting:
            self._slots.trim()

    def close(self, error: Exception) -> None:
        """End everything under way with an error."""
        for job in [*(r.job for r in self._rows), *self._waiting]:
            job.end(error)
        self._rows.clear()
        self._waiting.clear()
        self._prefixes.clear()
        self._slots.clear()  # whatever went wrong may be in there

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for job in [j for j in self._waiting if j.cancelled or now > j.deadline]:
            self._waiting.remove(job)
            job.end(None if job.cancelled else _too_late(job))
        for row in [r for r in self._rows if r.job.cancelled or now > r.job.deadline]:
            self._leave(row)
            row.job.end(None if row.job.cancelled else _too_late(row.job))

    def _has_room(self, job: ChatJob) -> bool:
        rows = len(self._rows) + 1
        longest = max([job.need, *(r.job.need for r in self._rows)])
        if rows > self.max_rows or (rows > 1 and rows * longest > self.max_tokens):
            return False
        return rows == 1 or self._has_memory(job)  # the first is let in or turned away, for nothing would get better

    def _has_memory(self, job: ChatJob) -> bool:
        """Whether a row's keys and values fit into what is left; twice, for room that grows is copied."""
        free = self.free_bytes()
        return free is None or free - 2 * job.need * self.reader.stack.token_bytes >= KEPT_BYTES

    def _admit(self, job: ChatJob) -> None:
        try:
            if not (self._rows or self._has_memory(job)):  # beside others it was asked before
                raise MemoryError
            self._slots.reserve(len(self._rows) + 1, max([job.need, *(r.job.need for r in self._rows)]))
            opening = self._slots.opening()
        except (MemoryError, torch.OutOfMemoryError):
            found = f"no memory for keys and values of {job.need} more tokens"
            wait = max(self._pace.row_s, 1.0)
            job.end(Overloaded(found, hint="try again later, or lower HHH_ROUTER_KV_TOKENS", retry_after_s=wait))
            return
        row = None
        try:
            row = self._prefill(job, opening)
        except Exception as error:  # a seam, as above
            job.end(known(error, GeneratorError))
        if row is None:
            self._slots.forget(opening)
        else:
            self._slots.keep(opening)
            self._rows.append(row)

    @torch.inference_mode()
    def _prefill(self, job: ChatJob, opening: Opening) -> Row | None:
        """Read the prompt, ask the planner, and go on with the mixture; None where the plan stops."""
        text, stack = job.text, self.reader.stack
        assert text is not None
        started = time.perf_counter()
        shared = self._prefixes.below(text.ids, text.prompt_span[0])  # what the heads pool is read anew
        state = self._begin(text.ids, opening, shared)
        prompt = self.reader.prompt(list(self.reader.states(state)), text, shared.tokens)
        entering = state.hidden[0]  # of the tokens that were not known
        views = Views(prompt=prompt, response=prompt, modes=["prompt"])  # mode prompt looks at no response
        layers_run = state.next_layer
        scores = self.reader.heads.scores(views, tokens=[len(text.ids)], layers_run=layers_run)[0]
        plan = job.planner(scores)
        planned_at = time.perf_counter()
        logits = prompt_logprobs = None
        if not plan.stops:
            self.gates.set([plan.weights])
            shared = self._prefixes.above(shared, plan.weights)
            hidden = stack.run(self._go_on(state, opening, shared), stack.depth)
            logits = stack.logits(hidden[0, -1])
            prompt_logprobs = told_of_prompt(stack, hidden[0], text.ids, self._spelling, job.request.sampling)
            layers_run = stack.depth
            if logits.isfinite().all():
                self._prefixes.keep(text.ids, self._slots, opening.slot, entering, shared.tokens, plan.weights)
        prefilled_at = time.perf_counter()
        self._pace.prompt(len(text.ids), prefilled_at - started)
        timing = {"read": 1000 * (planned_at - started), "prefill": 1000 * (prefilled_at - started)}
        job.tell(
            Planned(
                plan=plan, prompt_tokens=len(text.ids), layers_run=layers_run, read_ms=timing["read"],
                prompt_logprobs=prompt_logprobs,
            )
        )  # fmt: skip
        if logits is None or not job.budget:
            reason: FinishReason = "content_filter" if logits is None else "length"
            job.tell(Finished(reason=reason, prompt_tokens=len(text.ids), completion_tokens=0, timing_ms=timing))
            job.end(None)
            return None
        return Row(
            job=job,
            weights=plan.weights,
            sampler=Sampler(job.request.sampling, stack.device, job.following),
            stream=Deltas(self.encoder.tokenizer, self._spelling, job.request.sampling),
            reply=RunningReply(self.reader, prompt, len(text.ids)),
            timing=timing,
            prefilled_at=prefilled_at,
            logits=logits,
            entering=[entering[whole_tokens(len(text.ids)) - shared.tokens :].clone()],
        )

    def _begin(self, ids: Sequence[int], opening: Opening, shared: Found) -> Pass:
        """A pass over the tokens of a prompt that are not known below the boundary."""
        stack = self.reader.stack
        if not shared.tokens:
            state = stack.begin(torch.tensor([ids], device=stack.device))
            state.cache = opening
            return state
        below = range(self._prefixes.boundary)
        for number, block in enumerate(shared.lower):
            self._slots.put(opening.slot, slice(number * BLOCK, (number + 1) * BLOCK), below, block.lower)
        return stack.resume(shared.tokens, opening, input_ids=torch.tensor([ids[shared.tokens :]], device=stack.device))

    def _go_on(self, state: Pass, opening: Opening, shared: Found) -> Pass:
        """The same pass above the boundary, where fewer tokens may be known than below it."""
        if (between := shared.between) is None and not shared.upper:
            return state
        above = range(self._prefixes.boundary, self.reader.stack.depth)
        for number, kept in enumerate(shared.upper):
            self._slots.put(opening.slot, slice(number * BLOCK, (number + 1) * BLOCK), above, kept)
        hidden = state.hidden if between is None else torch.cat([between[None], state.hidden], dim=1)
        return self.reader.stack.resume(shared.upper_tokens, opening, hidden=hidden, layer=self._prefixes.boundary)

    def _leave(self, row: Row) -> None:
        slot = self._rows.index(row)
        self._slots.release(slot)
        last = self._rows.pop()
        if last is not row:
            self._rows[slot] = last
        self._pace.row(time.perf_counter() - row.prefilled_at)

    def _fail(self, row: Row, error: Exception) -> None:
        self._leave(row)
        row.job.end(known(error, GeneratorError))

    # -- one step -----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        rows = list(self._rows)
        drawn = draw_rows([r.sampler for r in rows], torch.stack([r.logits for r in rows]))
        for row, found in zip(rows, drawn, strict=True):
            try:
                if isinstance(found, Exception):
                    raise found
                self._say(row, found)
            except Exception as error:  # a row with NaN logits, or a caller who has left: the others go on
                self._fail(row, error)
        for row in [r for r in self._rows if r.reason == "stop" and not (r.empty or r.stream.stopped)]:
            self._finish(row)  # its end marker is no part of the reply
        if not self._rows:
            return
        places = range(len(self._rows))
        try:
            self._pass(places)
        except Exception:  # whose fault it is shows when each is tried alone
            _log.exception("a step of %d rows failed; trying them one by one", len(self._rows))
            for place in places:
                self._alone(place)
        self._slots.advance()
        for row in [r for r in self._rows if r.error is not None]:
            assert row.error is not None
            self._fail(row, row.error)
        for row in [r for r in self._rows if r.reason is not None]:
            self._finish(row)

    def _alone(self, slot: int) -> None:
        try:
            self._pass([slot])
        except Exception as error:  # this row's own, then
            _log.error("a row failed twice", exc_info=error)
            found = Quarantined(
                f"this request made the model fail twice: {type(error).__name__}: {error}", hint="do not send it again"
            )
            found.__cause__ = error
            self._rows[slot].error = found

    def _say(self, row: Row, found: Drawn) -> None:
        if found.token in self._ends:
            row.reason = "stop"
            row.empty = row.drawn == 0
            row.token = self.encoder.end_id
            return
        row.drawn += 1
        row.token = found.token
        row.logprobs.append(found.logprob)
        row.tokens.append(found.token)
        row.job.tell(row.stream.push(found))
        if row.stream.stopped:
            row.reason = "stop"
        elif row.drawn == row.job.budget:
            row.reason = "length"

    @torch.inference_mode()
    def _pass(self, slots: Sequence[int]) -> None:
        """Run some rows' new tokens through the lower layers, and on through the upper ones where a reply goes on.

        A row may have been in a pass that failed: what it was told then is not told again.
        """
        stack = self.reader.stack
        rows = [self._rows[i] for i in slots]
        self.gates.set(None)
        state = stack.step([r.token for r in rows], self._slots, slots)
        layers = torch.stack([s[:, 0] for s in self.reader.states(state)], dim=1)  # (B, L, D)
        features = self.reader.heads.tokens(layers, "response")
        for i, row in enumerate(rows):
            if row.reply.tokens < max(row.drawn, 1):
                try:
                    self._take(row, features[i : i + 1], layers[i, -1])
                except Exception as error:  # a seam, as above
                    row.error = error
        if any(r.reason is None for r in rows):
            self.gates.set([r.weights for r in rows])
            logits = stack.logits(stack.run(state, stack.depth)[:, -1])
            for i, row in enumerate(rows):
                row.logits = logits[i]

    def _take(self, row: Row, features: Tensor, topmost: Tensor) -> None:
        """Add a token to what the heads read; at the end of a window tell what they say, and steer by it."""
        row.reply.append(features, topmost)
        if self._keeps_replies:
            row.entering.append(topmost[None].clone())
        if not row.drawn or row.stream.stopped or row.drawn % row.job.window_tokens:
            return
        scores = row.reply.scores()
        row.job.tell(Window(scores=scores, completion_tokens=row.drawn, is_final=False))
        if row.job.steer is None or row.reason is not None:
            return
        weights = row.job.steer(scores, row.logprobs)
        if weights is not None and weights != row.weights:
            row.weights, row.steered = weights, True
            row.job.tell(Steered(weights=weights, completion_tokens=row.drawn))

    def _finish(self, row: Row) -> None:
        """Send what is left of a reply, and its last reading."""
        try:
            if rest := row.stream.end():
                row.job.tell(rest)
            row.job.tell(Window(scores=row.reply.scores(), completion_tokens=row.drawn, is_final=True))
            row.timing["decode"] = 1000 * (time.perf_counter() - row.prefilled_at)
            text = row.job.text
            assert text is not None
            if row.drawn > 1 and self._keeps_replies and not row.steered:
                ids, start = (
                    [*text.ids, *row.tokens[:-1]],
                    whole_tokens(len(text.ids)),
                )  # the last one's pass may be half
                slot = self._rows.index(row)
                self._prefixes.keep(ids, self._slots, slot, torch.cat(row.entering), start, row.weights)
            assert row.reason is not None
            row.job.tell(
                Finished(
                    reason=row.reason, prompt_tokens=len(text.ids), completion_tokens=row.drawn, timing_ms=row.timing,
                    stop=row.stream.stop,
                )
            )  # fmt: skip
        except Exception as error:  # a seam, as above
            self._fail(row, error)
            return
        self._leave(row)
        row.job.end(None)

    @property
    def _keeps_replies(self) -> bool:
        """Whether later prompts may find replies: not those of int8 layers, for readings are calibrated without."""
        return self._prefixes.max_tokens > 0 and not self.phase.quantised


def _too_late(job: ChatJob) -> BackendTimeout:
    return BackendTimeout(
        f"no end of the reply after {job.request.timeout_s:g} s", hint="ask for fewer tokens, or allow more time"
    )
